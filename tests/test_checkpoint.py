"""Editing a folder: only the text's projections change, by file as in memory, whatever the layout of the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import QUICK, UNET, header, split_file, tensor_bytes, tree, write_file
from safetensors.torch import load_file, save_file

from realera_edit import RealEraWarning, edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError
from realera_edit.front_matter import CARD
from realera_edit.projections import POOLED
from realera_edit.provenance import METADATA_KEY, RECORD, UNDO

Tiny = Callable[..., Path]
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
OWN = {RECORD, UNDO, CARD}


def erase(model: Any, out: Path | None = None, config: Any = QUICK, **options: Any) -> Any:
    """One quick edit, saved where `out` is given."""
    saving = {key: options.pop(key) for key in ("force", "link", "undo") if key in options}
    result = edit_model(model, ["cat"], config=config, **options)
    if out is not None:
        result.save(out, **saving)
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def changed(before: Path, after: Path, name: str = UNET) -> set[str]:
    """Tensors whose bytes differ; names, order, dtypes and shapes must not."""
    old, new = tensor_bytes(before / name), tensor_bytes(after / name)
    assert list(old) == list(new)
    assert [entry[:2] for entry in old.values()] == [entry[:2] for entry in new.values()]
    return {key for key in old if old[key] != new[key]}


def projections(folder: Path, roles: str = "kv pooled") -> set[str]:
    return {p.name for p in open_checkpoint(folder).projections if p.role in roles}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_by_file_is_in_memory_to_the_bit(family: str, dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(family, dtype)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    before = tree(folder)
    inside = erase(pipe)
    result = erase(folder, tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=dtype).unet.state_dict()
    stored, original = weights(tmp_path / "out" / "unet"), weights(folder / "unet")
    wanted = projections(folder)
    assert set(stored) == set(loaded) == set(original)
    for name, weight in pipe.unet.state_dict().items():
        assert weight.dtype == stored[name].dtype == dtype
        assert torch.equal(weight, stored[name]), name
        assert torch.equal(weight, loaded[name]), name
        # control: and the edit is no identity
        assert torch.equal(weight, original[name]) != (name in wanted), name
    assert inside.tensors["unet"] == result.tensors[UNET]
    assert tree(folder) == before


def test_everything_else_is_byte_identical(family: str, model: Path, tmp_path: Path) -> None:
    (model / "vae" / "notes").mkdir()
    (model / "vae" / "notes" / "a b.txt").write_text("kept")
    (model / "empty.txt").touch()
    before = tree(model)
    erase(model, tmp_path / "out")
    after = tree(tmp_path / "out")
    assert tree(model) == before
    assert set(after) == set(before) | OWN
    assert {name for name in before if before[name] != after[name]} == {UNET}
    assert changed(model, tmp_path / "out") == projections(model)
    assert list(header(tmp_path / "out" / UNET)) == list(header(model / UNET))


def test_metadata_and_layout_of_the_header_are_kept(sd1: Path, tmp_path: Path) -> None:
    """Whatever the order of keys and data, and though other software's metadata stands in the header."""
    head, (_, data) = header(sd1 / UNET), split_file(sd1 / UNET)
    entries = [(name, entry) for name, entry in head.items() if name != "__metadata__"]
    shuffled = {"__metadata__": {"format": "pt", "作者": "猫"}, **dict(reversed(entries))}
    write_file(sd1 / UNET, shuffled, data)
    erase(sd1, tmp_path / "out")
    assert changed(sd1, tmp_path / "out") == projections(sd1)
    written = header(tmp_path / "out" / UNET)
    assert list(written) == list(shuffled)
    recipe = json.loads(written["__metadata__"].pop(METADATA_KEY))
    assert written["__metadata__"] == shuffled["__metadata__"]
    assert recipe["concepts"] == [{"name": "cat", "target": "object", "aliases": []}]
    assert recipe["config"] == QUICK.to_dict()


def test_both_variants_are_edited(sd1: Path, pristine: Tiny, tmp_path: Path) -> None:
    half = pristine("sd1", torch.float16, "fp16")
    shutil.copytree(half, sd1, dirs_exist_ok=True)
    twin = UNET.replace(".safetensors", ".fp16.safetensors")
    result = erase(sd1, tmp_path / "out")
    assert changed(sd1, tmp_path / "out") == changed(sd1, tmp_path / "out", twin) == projections(sd1)
    assert set(result.tensors) == {UNET, twin}
    narrow = DiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", torch_dtype=torch.float16)
    wide = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for name, weight in wide.unet.state_dict().items():
        torch.testing.assert_close(narrow.unet.state_dict()[name].float(), weight, rtol=2e-3, atol=2e-3)


def test_only_the_fp16_variant(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("sd2", torch.float16, "fp16")
    twin = UNET.replace(".safetensors", ".fp16.safetensors")
    assert not (folder / UNET).exists()
    for place, variant in enumerate((None, "fp16")):
        erase(folder, tmp_path / f"out{place}", variant=variant)
        assert changed(folder, tmp_path / f"out{place}", twin) == projections(folder)
    with pytest.raises(CheckpointError, match=r"text_encoder: no variant 'ema'; it has fp16"):
        erase(folder, variant="ema")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(variant: str | None, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("sdxl", torch.float16, variant, "400KB")
    shards = sorted(path.name for path in (folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    erase(folder, tmp_path / "out")
    touched = {name for shard in shards for name in changed(folder, tmp_path / "out", f"unet/{shard}")}
    assert touched == projections(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, variant=variant)
    out = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16, variant=variant)
    differ = {n for n, w in pipe.unet.state_dict().items() if not torch.equal(w, out.unet.state_dict()[n])}
    assert differ == touched


def test_a_whole_file_beside_shards(sd1: Path, tmp_path: Path) -> None:
    """Both hold the model, and which one a program loads is its own affair: both are edited."""
    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet")
    unet.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    shutil.copytree(tmp_path / "shards", sd1 / "unet", dirs_exist_ok=True)
    erase(sd1, tmp_path / "out")
    shards = [f"unet/{path.name}" for path in (tmp_path / "shards").glob("*.safetensors")]
    assert len(shards) > 1
    assert {n for s in shards for n in changed(sd1, tmp_path / "out", s)} == changed(sd1, tmp_path / "out")


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", ".."])
def test_an_index_that_points_elsewhere_is_refused(name: str, tiny: Tiny) -> None:
    folder = tiny("sd1", torch.float32, None, "2MB")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["conv_in.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"points to '.*', which is not a weight file in its own folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("content", "message"), [("{}", "has no weight_map"), ("[", "cannot be read as JSON")])
def test_an_index_that_is_broken_is_refused(content: str, message: str, tiny: Tiny) -> None:
    folder = tiny("sd1", torch.float32, None, "2MB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tiny: Tiny) -> None:
    folder = tiny("sd1", torch.float32, None, "2MB")
    shard = sorted((folder / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickles_only_are_refused_with_the_command_that_converts(component: str, sd1: Path) -> None:
    weight = next((sd1 / component).glob("*.safetensors"))
    torch.save({}, sd1 / component / weight.name.replace(".safetensors", ".bin"))
    weight.unlink()
    with pytest.raises(CheckpointError, match=rf"{component}: only pickled .* convert it: python -c .*{sd1}.*use_safe"):
        open_checkpoint(sd1)


def test_unedited_copies_are_left_out_with_a_warning(sd1: Path, tmp_path: Path) -> None:
    copies = {
        "sd-v1.safetensors",
        "sd-v1.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "unet/a.safetensors",
    }
    for name in copies:
        (sd1 / name).write_bytes(b"the model, unedited")
    (sd1 / "text_encoder" / "pytorch_model.bin").write_bytes(b"no text projection in here")
    before = tree(sd1)
    with pytest.warns(RealEraWarning, match="left out of the output, since they hold the model unedited: sd-v1"):
        erase(sd1, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == (set(before) - copies) | OWN
    assert tree(sd1) == before


def test_a_linked_folder_is_copied_and_a_cycle_is_not_followed(sd1: Path, tmp_path: Path) -> None:
    shutil.move(sd1 / "vae", tmp_path / "shared-vae")
    (sd1 / "vae").symlink_to(tmp_path / "shared-vae")
    (sd1 / "scheduler" / "loop").symlink_to(sd1)
    erase(sd1, tmp_path / "out")
    assert tree(tmp_path / "out" / "vae") == tree(tmp_path / "shared-vae")
    assert not (tmp_path / "out" / "vae").is_symlink()
    assert not (tmp_path / "out" / "scheduler" / "loop").exists()


def test_pooled_columns_beyond_the_text_stay(sdxl: Path, tmp_path: Path) -> None:
    erase(sdxl, tmp_path / "out")
    before, after = (load_file(folder / UNET)[POOLED] for folder in (sdxl, tmp_path / "out"))
    text = open_checkpoint(sdxl).encoder.pairs[1][1].config.projection_dim
    assert torch.equal(before[:, text:], after[:, text:])
    assert not (before[:, :text] == after[:, :text]).all(dim=0).any()


@pytest.mark.parametrize(
    ("change", "roles"),
    [({"pooled": False}, "kv"), ({"edit": "k"}, "k pooled"), ({"edit": "v", "pooled": False}, "v")],
)
def test_parts_of_the_edit(change: dict[str, Any], roles: str, sdxl: Path, tmp_path: Path) -> None:
    result = erase(sdxl, tmp_path / "out", replace(QUICK, **change))
    assert changed(sdxl, tmp_path / "out") == projections(sdxl, roles)
    counts = result.counts()
    assert counts["k_found"] == counts["v_found"] == 11
    for role in ("k", "v", "pooled"):
        assert counts[f"{role}_edited"] == (counts[f"{role}_found"] if role in roles else 0)


def test_the_same_recipe_gives_the_same_bytes(family: str, model: Path, tmp_path: Path) -> None:
    config = replace(QUICK, perturbation="covariance", samples=8, seed=3)
    for place, seed in enumerate((3, 3, 4)):
        erase(model, tmp_path / f"out{place}", replace(config, seed=seed))
    one, two, other = (tree(tmp_path / f"out{place}") for place in range(3))
    assert one == two
    assert one[UNET] != other[UNET]


def test_other_dtypes_in_the_file_are_carried_along(sd1: Path, tmp_path: Path) -> None:
    tensors = load_file(sd1 / UNET)
    save_file({**tensors, "counter": torch.arange(5), "scale": torch.ones(3).to(torch.float8_e4m3fn)}, sd1 / UNET)
    erase(sd1, tmp_path / "out")
    assert changed(sd1, tmp_path / "out") == projections(sd1)
