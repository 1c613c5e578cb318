"""Safetensors headers, damaged by hand and at random: a clear error, or an edit that is right all the same."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK, UNET, header, split_file, tensor_bytes, write_file
from safetensors.torch import load_file

from realera_edit import RealEraError, edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError
from realera_edit.tensorfile import open_tensors

TEXT = "text_encoder/model.safetensors"


def erase(folder: Path, out: Path) -> None:
    edit_model(folder, ["cat"], config=QUICK).save(out)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADERS: dict[str, tuple[Any, str]] = {
    "a list": ([], "is not a mapping"),
    "no json": (b"{,}", "is not valid JSON"),
    "utf-16": (json.dumps({"a": ENTRY}).encode("utf-16"), "is not valid JSON"),
    "surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}', "is not valid JSON"),
    "deep": (b"[" * 100_000, "is not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "metadata": ({"__metadata__": {"a": 1}, "a": ENTRY}, "__metadata__ is not a mapping of strings"),
    "metadata list": ({"__metadata__": ["a"], "a": ENTRY}, "__metadata__ is not a mapping of strings"),
    "entry": ({"a": 5}, "the header entry of a is malformed"),
    "no dtype": ({"a": {k: v for k, v in ENTRY.items() if k != "dtype"}}, "the header entry of a is malformed"),
    "negative": ({"a": {**ENTRY, "shape": [-2, -3]}}, "the header entry of a is malformed"),
    "fraction": ({"a": {**ENTRY, "shape": [2, 3.0]}}, "the header entry of a is malformed"),
    "boolean": ({"a": {**ENTRY, "data_offsets": [False, 24]}}, "the header entry of a is malformed"),
    "three offsets": ({"a": {**ENTRY, "data_offsets": [0, 24, 24]}}, "the header entry of a is malformed"),
    "backwards": ({"a": {**ENTRY, "data_offsets": [24, 0]}}, "a is F32 .* but spans -24 bytes"),
    "wrong size": ({"a": {**ENTRY, "shape": [2, 4]}}, r"a is F32 \[2, 4\] but spans 24 bytes"),
    "enormous": ({"a": {**ENTRY, "shape": [2**61, 2**61]}}, "but spans 24 bytes"),
    "gap": ({"a": {**ENTRY, "shape": [1, 1], "data_offsets": [20, 24]}}, "a starts at byte 20, expected 0"),
    "overlap": (
        {"a": ENTRY, "b": {**ENTRY, "shape": [1], "data_offsets": [20, 24]}},
        "b starts at byte 20, expected 24",
    ),
    "too short": ({"a": {**ENTRY, "shape": [2, 2], "data_offsets": [0, 16]}}, "describes 16 bytes .* holds 24"),
    "too long": ({"a": {**ENTRY, "shape": [2, 4], "data_offsets": [0, 32]}}, "describes 32 bytes .* holds 24"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_explained(case: str, tmp_path: Path) -> None:
    head, message = HEADERS[case]
    path = tmp_path / "a.safetensors"
    write_file(path, {"a": ENTRY}, bytes(24))
    assert open_tensors(path).read("a").shape == (2, 3)
    write_file(path, head, bytes(24))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: .*{message}"):
        open_tensors(path)


def test_a_header_that_claims_to_be_enormous_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file \(header of 1152921504606846976 bytes"):
        open_tensors(path)


def damage(text: bytes, dice: random.Random) -> bytes:
    """One to three random bytes changed, most often in the entries of the text's projections."""
    data = bytearray(text)
    spots = [m.start() for m in re.finditer(rb"attn2\.to_[kv]|token_emb|dtype|shape|offsets", text)]
    for _ in range(dice.randint(1, 3)):
        at = dice.choice(spots) + dice.randint(0, 60) if dice.random() < 0.8 else dice.randrange(len(data))
        data[min(at, len(data) - 1)] = dice.choice((dice.randrange(256), dice.choice(b'0123456789",:[]{}FBI_')))
    return bytes(data)


@pytest.mark.parametrize("name", [UNET, TEXT])
def test_random_damage_to_a_header_is_an_error_or_harmless(name: str, sd1: Path, tmp_path: Path) -> None:
    """Never another exception; and where the edit goes through, each projection is edited as in the sound folder."""
    erase(sd1, tmp_path / "sound")
    sound = {key: value[2] for key, value in tensor_bytes(tmp_path / "sound" / UNET).items()}
    wanted = [sound[p.name] for p in open_checkpoint(sd1).projections]
    text, data = split_file(sd1 / name)
    dice = random.Random(0)
    went = {"error": 0, "edited": 0}
    for _ in range(120):
        write_file(sd1 / name, damage(text, dice), data)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            erase(sd1, tmp_path / "out")
        except RealEraError:
            went["error"] += 1
            assert not (tmp_path / "out").exists()
            continue
        went["edited"] += 1
        result = tensor_bytes(tmp_path / "out" / UNET)
        assert [result[p.name][2] for p in open_checkpoint(tmp_path / "out").projections] == wanted
        assert split_file(tmp_path / "out" / name)[1][:64] == split_file(tmp_path / "sound" / name)[1][:64]
    assert went["error"] > 60, went
    if name == UNET:
        assert went["edited"] > 2, went


def test_the_header_tool_of_these_tests_reads_what_safetensors_wrote(sd1: Path) -> None:
    """Control: our own reader of headers and bytes agrees with the library's."""
    tensors = load_file(sd1 / UNET)
    mine = tensor_bytes(sd1 / UNET)
    assert set(mine) == set(tensors) == set(header(sd1 / UNET)) - {"__metadata__"}
    assert all(mine[k] == ("F32", tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items())
