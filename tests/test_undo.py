"""The way back: `undo` restores each byte, never leaves its folder, and refuses what it cannot vouch for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import QUICK, UNET, header, split_file, tensor_bytes, tree, write_file

from realera_edit import edit_model, inspect_path, undo_folder
from realera_edit.errors import CheckpointError
from realera_edit.provenance import METADATA_KEY, RECORD, UNDO

Tiny = Callable[..., Path]


def save(model: Path, out: Path, **options: Any) -> Any:
    result = edit_model(model, ["cat"], config=QUICK)
    result.save(out, **options)
    return result


def test_undo_restores_each_byte_of_each_tensor(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """The stated bound is zero: in every precision, and in shards."""
    for place, options in enumerate([(torch.float32,), (torch.float16, "fp16"), (torch.bfloat16, None, "400KB")]):
        base = tmp_path / str(place)
        model = tiny(family, *options).rename(tmp_path / f"model{place}")
        save(model, base / "out")
        edited = tree(base / "out")
        assert undo_folder(base / "out", base / "back") == base / "back"
        files = {name for name in tree(model) if name.startswith("unet/") and name.endswith(".safetensors")}
        for name in files:
            assert tensor_bytes(base / "back" / name) == tensor_bytes(model / name)
            assert list(tensor_bytes(base / "back" / name)) == list(tensor_bytes(model / name))
        assert any(tensor_bytes(base / "out" / name) != tensor_bytes(model / name) for name in files)
        rest = {name: digest for name, digest in tree(model).items() if name not in files}
        assert {n: d for n, d in tree(base / "back").items() if n not in files} == rest
        assert tree(base / "out") == edited


def test_an_undone_folder_has_no_record_of_the_edit(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out")
    undo_folder(tmp_path / "out", tmp_path / "back")
    with pytest.raises(CheckpointError, match=f"back: no {RECORD}; this folder was not written by realera-edit"):
        inspect_path(tmp_path / "back")
    assert json.loads(header(tmp_path / "back" / UNET)["__metadata__"][METADATA_KEY])["undone"] is True
    assert "cat" not in (tmp_path / "back" / UNET).read_bytes().decode("latin-1")[:5000]


def test_undo_needs_its_file(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out", undo=False)
    assert not (tmp_path / "out" / UNDO).exists()
    with pytest.raises(CheckpointError, match=f"no {UNDO}: it was saved without one"):
        undo_folder(tmp_path / "out", tmp_path / "back")
    with pytest.raises(CheckpointError, match="was not written by realera-edit"):
        undo_folder(sd1, tmp_path / "back")


def test_undo_refuses_a_weight_that_changed_since(sd1: Path, tmp_path: Path) -> None:
    result = save(sd1, tmp_path / "out")
    name = next(iter(result.tensors[UNET]))
    head, (_, data) = header(tmp_path / "out" / UNET), split_file(tmp_path / "out" / UNET)
    at = head[name]["data_offsets"][0]
    write_file(tmp_path / "out" / UNET, head, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match=f"{name} is not as the edit left it; undo would mix two models"):
        undo_folder(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("place", ["../victim.safetensors", "/tmp/victim.safetensors"])
@pytest.mark.parametrize("both", [True, False])
def test_undo_never_leaves_its_folder(place: str, both: bool, sd1: Path, tmp_path: Path) -> None:
    """Though the undo file, or the undo file and the record, name a file elsewhere."""
    result = save(sd1, tmp_path / "out")
    head, data = split_file(tmp_path / "out" / UNDO)
    name = next(iter(result.tensors[UNET]))
    write_file(tmp_path / "out" / UNDO, head.replace(f"{UNET}::{name}".encode(), f"{place}::{name}".encode()), data)
    if both:
        edit_json(
            tmp_path / "out" / RECORD, lambda d: d["tensors"].update({place: {name: d["tensors"][UNET].pop(name)}})
        )
    (tmp_path / "victim.safetensors").write_bytes((sd1 / UNET).read_bytes())
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="outside of its folder" if both else "not among the tensors"):
        undo_folder(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path) == before


def test_undo_never_writes_to_a_file_that_only_the_record_names(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out")
    (tmp_path / "victim.safetensors").write_bytes((sd1 / UNET).read_bytes())
    edit_json(tmp_path / "out" / RECORD, lambda d: d["tensors"].update({"../victim.safetensors": {}}))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"names '\.\./victim\.safetensors', which is outside of its folder"):
        undo_folder(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path) == before


def test_undo_refuses_a_damaged_original(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out")
    path = tmp_path / "out" / UNDO
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{UNDO}: the original of .* is damaged"):
        undo_folder(tmp_path / "out", tmp_path / "back")
    path.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=f"{UNDO}: the header describes .* truncated"):
        undo_folder(tmp_path / "out", tmp_path / "back")


def test_undo_refuses_a_tensor_that_was_never_edited(sd1: Path, tmp_path: Path) -> None:
    result = save(sd1, tmp_path / "out")
    name = next(iter(result.tensors[UNET]))
    head, data = split_file(tmp_path / "out" / UNDO)
    write_file(tmp_path / "out" / UNDO, head.replace(f"::{name}".encode(), b"::conv_in.weight"), data)
    with pytest.raises(CheckpointError, match=f"{UNDO}: {UNET}::conv_in.weight is not among the tensors that {RECORD}"):
        undo_folder(tmp_path / "out", tmp_path / "back")


def test_undo_refuses_to_restore_a_part(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out")
    head, data = split_file(tmp_path / "out" / UNDO)
    entries = json.loads(head)
    name = list(entries)[-1]
    cut = entries.pop(name)["data_offsets"][0]
    write_file(tmp_path / "out" / UNDO, entries, data[:cut])
    with pytest.raises(CheckpointError, match=f"{UNDO}: holds no original of {name.partition('::')[2]}"):
        undo_folder(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize("change", [
    lambda d: d.pop("tensors"),
    lambda d: d.update(tensors=[]),
    lambda d: d.update(tensors={UNET: {"a": {"before": 1, "after": 2}}}),
    lambda d: d["tensors"][UNET].update(a={}),
    lambda d: d.update(concepts=5),
    lambda d: d.update(spaces={"cross": {}}),
    lambda d: d.update(projections={}),
])  # fmt: skip
def test_a_damaged_record_is_one_clear_error(change: Callable[[Any], None], sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out")
    edit_json(tmp_path / "out" / RECORD, change)
    for call in (lambda: inspect_path(tmp_path / "out"), lambda: undo_folder(tmp_path / "out", tmp_path / "back")):
        with pytest.raises(CheckpointError, match=f"{RECORD}: is damaged"):
            call()


def test_a_pipeline_is_restored_to_the_bit(family: str, model: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    first = edit_model(pipe, ["cat"], config=QUICK)
    middle = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    second = edit_model(pipe, ["dog"], config=QUICK)
    moved = {name for name in before if not torch.equal(before[name], pipe.unet.state_dict()[name])}
    assert moved == {p.name for p in first.source.projections}
    for result, wanted in ((second, middle), (first, before), (first, before)):
        result.undo()
        assert all(torch.equal(weight, wanted[name]) for name, weight in pipe.unet.state_dict().items())


def test_an_edited_folder_is_edited_again_and_undone_step_by_step(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "one")
    edit_model(tmp_path / "one", ["dog"], config=QUICK).save(tmp_path / "two")
    assert [concept["name"] for concept in inspect_path(tmp_path / "two")["concepts"]] == ["dog"]
    for source, target, wanted in (("two", "one again", "one"), ("one", "none", "sd1")):
        undo_folder(tmp_path / source, tmp_path / target)
        assert tensor_bytes(tmp_path / target / UNET) == tensor_bytes(tmp_path / wanted / UNET)
    assert tensor_bytes(tmp_path / "two" / UNET) != tensor_bytes(tmp_path / "one" / UNET)


def test_only_a_pipeline_is_undone_in_place(sd1: Path) -> None:
    with pytest.raises(CheckpointError, match=r"sd1: was not changed; for a saved edit call undo_folder\("):
        edit_model(sd1, ["cat"], config=QUICK).undo()


@pytest.mark.parametrize("place", ["out", "out/back", "."])
def test_undo_never_touches_what_it_reads(place: str, sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"is or lies in the input|holds the input"):
        undo_folder(tmp_path / "out", tmp_path / place, force=True)
    assert tree(tmp_path) == before
