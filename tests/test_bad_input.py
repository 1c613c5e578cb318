"""Damaged, foreign and hostile input: a clear error that names the file, or a correct edit, and nothing between."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUICK, UNET, tensor_bytes, tree
from safetensors.torch import load_file, save_file

from realera_edit import RealEraError, edit_model
from realera_edit.errors import CheckpointError, ConceptError, EncodingError
from realera_edit.tensorfile import open_tensors

TEXT = "text_encoder/model.safetensors"
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def erase(folder: Path, out: Path | None = None) -> None:
    result = edit_model(folder, ["cat"], config=QUICK)
    if out is not None:
        result.save(out)


# What is missing or does not belong together


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such folder; give a diffusers folder, a \.safetensors file"):
        erase(tmp_path / "gone")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json: no such file; is .* a diffusers folder\?"):
        erase(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", r"sd1: no U-Net .* among scheduler, text_encoder, tokenizer, vae"),
        ("unet/config.json", "sd1: no U-Net"),
        (UNET, r"unet: no \.safetensors weights; is the download complete\?"),
        ("tokenizer", "tokenizer: no such folder"),
        ("tokenizer/vocab.json", "tokenizer: the tokenizer cannot be loaded"),
        ("text_encoder", r"text_encoder: no \.safetensors weights"),
        ("text_encoder/config.json", "text_encoder: the text encoder cannot be loaded"),
        (TEXT, r"text_encoder: no \.safetensors weights"),
    ],
)
def test_a_missing_part_is_named(part: str, message: str, sd1: Path) -> None:
    path = sd1 / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        erase(sd1)
    assert "\n" not in str(caught.value)


def set_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes of a POSIX system")
def test_a_broken_link_or_a_pipe_in_the_folder_is_named(sd1: Path, tmp_path: Path) -> None:
    (sd1 / "notes.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"sd1/notes\.txt: not a regular file, or a broken link"):
        erase(sd1, tmp_path / "out")
    (sd1 / "notes.txt").unlink()
    os.mkfifo(sd1 / "vae" / "pipe")
    with pytest.raises(CheckpointError, match="vae/pipe: not a regular file"):
        erase(sd1, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"sd1"}


def test_a_foreign_text_encoder_is_named(sd1: Path) -> None:
    set_json(sd1 / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(CheckpointError, match="text_encoder: T5EncoderModel is not supported; only CLIPTextModel"):
        erase(sd1)
    set_json(sd1 / "model_index.json", text_encoder=[None, None])
    with pytest.raises(CheckpointError, match="names no text encoder"):
        erase(sd1)


def test_a_text_encoder_of_another_model(sd1: Path, sd2: Path, sdxl: Path) -> None:
    shutil.rmtree(sd1 / "text_encoder")
    shutil.copytree(sdxl / "text_encoder", sd1 / "text_encoder")
    with pytest.raises(RealEraError, match=r"no cross-attention projection reads 64 inputs"):
        erase(sd1)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\ud83d".encode("utf-8", "surrogatepass"), "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_broken_json_is_named(name: str, content: str | bytes, sd1: Path) -> None:
    (sd1 / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: (cannot be read as JSON|expected a JSON object)"):
        erase(sd1)


@pytest.mark.parametrize("value", [None, "wide", -1, [], {}])
def test_a_wrong_width_in_the_config(value: Any, sd1: Path) -> None:
    set_json(sd1 / "text_encoder" / "config.json", hidden_size=value)
    with pytest.raises(CheckpointError, match="text_encoder: the text encoder cannot be loaded"):
        erase(sd1)


@pytest.mark.parametrize("value", [float("-inf"), 1e308, float("nan")])
def test_states_that_are_not_finite_name_the_encoder(value: float, sd1: Path, tmp_path: Path) -> None:
    """Of weights that are: a damaged configuration."""
    set_json(sd1 / "text_encoder" / "config.json", layer_norm_eps=-abs(value))
    with pytest.raises(CheckpointError, match=r"sd1/text_encoder: its states contain NaN or inf.* config\.json"):
        erase(sd1, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"sd1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token": "../unet"}, r"gives '\.\./unet' the number \d+, and the text encoder knows \d+ tokens"),
        ({"pad_token": "of another model"}, "gives 'of another model' the number"),
        ({"pad_token": None}, "has no padding token"),
        ({"model_max_length": float("nan")}, "its model_max_length is nan, expected a number"),
        ({"model_max_length": "77"}, "its model_max_length is '77', expected a number"),
        ({"unk_token": ""}, "its unk_token, '', is not among its tokens"),
    ],
)
def test_a_tokenizer_with_tokens_that_the_encoder_does_not_know(
    changes: dict[str, Any], message: str, sd1: Path, tmp_path: Path
) -> None:
    set_json(sd1 / "tokenizer" / "tokenizer_config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"sd1/tokenizer: {message}"):
        erase(sd1, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"sd1"}


# Weights


@pytest.mark.parametrize("name", [UNET, TEXT])
@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -5000])
def test_a_truncated_file(name: str, keep: int, sd1: Path) -> None:
    path = sd1 / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: (not a whole safetensors file|.*truncated|.*JSON)"):
        erase(sd1)


def test_a_file_with_something_after_its_end(sd1: Path) -> None:
    with open(sd1 / UNET, "ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(CheckpointError, match=f"{UNET}: the header describes .* the file holds"):
        erase(sd1)


def put(path: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    """Change one tensor of a file in place."""
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "key"), [(UNET, KEY), (TEXT, "token_embedding.weight")])
def test_nan_and_inf_are_named(name: str, key: str, value: float, sd1: Path, tmp_path: Path) -> None:
    key = next(k for k in load_file(sd1 / name) if k.endswith(key))
    put(sd1 / name, key, lambda t: t.index_fill(0, torch.tensor([1]), value))
    with pytest.raises(CheckpointError, match=f"{name}: {key} contains NaN or inf"):
        erase(sd1, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"sd1"}


def test_nan_outside_the_projections_is_the_models_own_affair(sd1: Path, tmp_path: Path) -> None:
    """It is not read, so it is carried along, to the bit."""
    put(sd1 / UNET, "conv_in.weight", lambda t: t * float("nan"))
    erase(sd1, tmp_path / "out")
    old, new = tensor_bytes(sd1 / UNET), tensor_bytes(tmp_path / "out" / UNET)
    assert old["conv_in.weight"] == new["conv_in.weight"]
    assert old[KEY] != new[KEY]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("name", "key"), [(UNET, KEY), (TEXT, "token_embedding.weight")])
def test_quantised_weights_are_refused(name: str, key: str, dtype: torch.dtype, sd1: Path, tmp_path: Path) -> None:
    key = next(k for k in load_file(sd1 / name) if k.endswith(key))
    put(sd1 / name, key, lambda t: t.to(dtype))
    with pytest.raises(CheckpointError, match=f"{name}: {key} is .*; only fp64, fp32, fp16 and bf16 .* unquantised"):
        erase(sd1, tmp_path / "out")


@pytest.mark.parametrize("shape", [(-1, 1), (-1,), (2, -1), (0, 96)])
def test_wrong_shapes_are_named(shape: tuple[int, ...], sd1: Path) -> None:
    def change(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(shape) if -1 in shape else t[:0].clone()

    put(sd1 / UNET, KEY, change)
    with pytest.raises(RealEraError, match=f"unet: the weights of {KEY.removesuffix('.to_k.weight')} do not fit"):
        erase(sd1)


def test_a_text_encoder_weight_of_the_wrong_shape(sd1: Path) -> None:
    key = next(k for k in load_file(sd1 / TEXT) if k.endswith("position_embedding.weight"))
    put(sd1 / TEXT, key, lambda t: t[:, :-1].contiguous())
    with pytest.raises(CheckpointError, match="text_encoder: the text encoder cannot be loaded"):
        erase(sd1)


def test_an_empty_tensor_is_no_trouble(sd1: Path, tmp_path: Path) -> None:
    tensors = load_file(sd1 / UNET)
    save_file({**tensors, "empty": torch.zeros(0, 3)}, sd1 / UNET)
    erase(sd1, tmp_path / "out")
    assert open_tensors(tmp_path / "out" / UNET).read("empty").shape == (0, 3)


def test_an_edit_that_overflows_half_precision(tiny: Any, tmp_path: Path) -> None:
    folder = tiny("sd1", torch.float16)
    put(folder / UNET, KEY, lambda t: t.sign() * 65504)
    with pytest.raises(RealEraError, match=rf"{UNET}: the edited {KEY} overflows torch\.float16"):
        erase(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Concepts


@pytest.mark.parametrize("name", ["", "   ", "\n\t"])
def test_an_empty_concept(name: str, sd1: Path) -> None:
    with pytest.raises(ConceptError, match="row 1: the concept's name is empty"):
        edit_model(sd1, [name], config=QUICK)
    with pytest.raises(ConceptError, match="preserve: a name is empty"):
        edit_model(sd1, ["cat"], preserve=[name], config=QUICK)


def test_a_concept_of_500_words(sd1: Path) -> None:
    before = tree(sd1)
    for concepts, preserve in ((["cat " * 500], []), (["cat"], ["dog " * 500])):
        with pytest.raises(EncodingError, match=r"is 50\d tokens long, the text encoder reads 32: .* Shorten the name"):
            edit_model(sd1, concepts, target="object", preserve=preserve, config=replace(QUICK, prior_words=10))
    assert tree(sd1) == before
