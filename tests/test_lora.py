"""LoRA export: loaded through diffusers and peft it is the edit, in every format, and what is lost is told."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import single_models
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from helpers import QUICK, UNET, run, tree
from safetensors.torch import load_file, save_file

from benchmarks.shapes import meta_unet
from realera_edit import EditFile, RealEraWarning, apply_edit, edit_model, export_lora, inspect_path
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError, ConfigError
from realera_edit.lora_layout import diffusers_path, original_path
from realera_edit.projections import POOLED

Weights = dict[str, torch.Tensor]
DENSE = replace(QUICK, perturbation="isotropic")


def unet_weights(folder: Path) -> Weights:
    return load_file(folder / UNET)


def loaded(model: Path, lora: Path, scale: float) -> Weights:
    """The U-Net's weights with the LoRA at `scale`, composed by diffusers and peft."""
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    assert pipe.get_list_adapters()
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    weights: Weights = pipe.unet.state_dict()
    return weights


def worst(one: Weights, two: Weights) -> float:
    assert set(one) == set(two)
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in two)


# The formats


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_loaded_at_scale_one_it_is_the_edit_and_below_a_dial(
    family: str, model: Path, format: str, tmp_path: Path
) -> None:
    """Within 1e-6 of the edited weights, whose greatest change is 1e5 times that; SDXL's pooled path included."""
    edit = EditFile.of(edit_model(model, ["cat"], config=QUICK))
    apply_edit(edit, model).save(tmp_path / "edited")
    report = export_lora(edit, model, tmp_path / "lora.safetensors", format=format)
    original, edited = unet_weights(model), unet_weights(tmp_path / "edited")
    assert worst(original, edited) > 0.1
    for scale in (1.0, 0.5, 0.25):
        line = {name: (1 - scale) * original[name] + scale * edited[name] for name in original}
        assert worst(loaded(model, tmp_path / "lora.safetensors", scale), line) < 1e-6
    assert worst(loaded(model, tmp_path / "lora.safetensors", 0.0), original) == 0
    changed = {name.removesuffix(".weight") for name in original if not torch.equal(original[name], edited[name])}
    assert {layer.name for layer in report.layers} == changed
    assert (POOLED.removesuffix(".weight") in changed) == (family == "sdxl")
    assert report.worst < 1e-6
    assert len({layer.rank for layer in report.layers}) > 1  # narrow layers have less, and are still scaled right


def test_older_diffusers_give_every_layer_its_scale(sd1: Path, sdxl: Path, tmp_path: Path) -> None:
    """Up to 2026 they took the first layer's rank for the alpha of all, and scaled the others by the two."""
    for model, config in ((sd1, QUICK), (sdxl, QUICK), (sd1, DENSE)):
        edit = EditFile.of(edit_model(model, ["cat"], config=config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RealEraWarning)
            report = export_lora(edit, model, tmp_path / "lora", force=True)
        stored = load_file(tmp_path / "lora")
        ranks = {tensor.shape["lora_B" in name] for name, tensor in stored.items()}
        kept = {layer.rank for layer in report.layers}
        assert ranks == {max(kept)}
        assert len(kept) > 1
        for layer in report.layers:
            up, down = (stored[f"unet.{layer.name}.lora_{side}.weight"] for side in "BA")
            assert not up[:, layer.rank :].any()
            assert not down[layer.rank :].any()
            assert up[:, layer.rank - 1].any()


@pytest.mark.parametrize("shape", single_models.SHAPES)
@pytest.mark.parametrize("format", ["diffusers", "kohya", "full"])
def test_of_a_single_file_it_is_that_of_its_folder(
    pristine_single: Callable[..., Path], shape: str, format: str, tmp_path: Path
) -> None:
    """Same bytes: the names of the original layout are led back to those that UIs expect."""
    place = pristine_single(shape)
    edit = EditFile.of(edit_model(place / "folder", ["cat"], config=QUICK))
    reports = [export_lora(edit, place / f, tmp_path / f, format=format) for f in ("folder", "model.safetensors")]
    assert (tmp_path / "folder").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert reports[0].layers == reports[1].layers
    if format == "diffusers":  # a file of the U-Net alone, whose blocks are named as diffusers names them
        save_file(unet_weights(place / "folder"), tmp_path / "unet.safetensors")
        with pytest.raises(CheckpointError, match="--text-encoder"):
            export_lora(edit, tmp_path / "unet.safetensors", tmp_path / "lora")
        export_lora(edit, tmp_path / "unet.safetensors", tmp_path / "lora", text_encoder=place / "folder")
        assert (tmp_path / "folder").read_bytes() == (tmp_path / "lora").read_bytes()


def test_room_is_asked_for_where_the_size_is_known(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exact export needs what it writes; a truncation nobody knows before, so a full disk tells of itself."""
    low, dense = (EditFile.of(edit_model(model, ["cat"], config=config)) for config in (QUICK, DENSE))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 990, 10))
        with pytest.raises(CheckpointError, match="are needed and"):
            export_lora(low, model, tmp_path / "exact.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RealEraWarning)
            export_lora(dense, model, tmp_path / "small.safetensors", energy=0.5)
    assert not (tmp_path / "exact.safetensors").exists()
    assert (tmp_path / "small.safetensors").exists()


def test_the_header_fills_the_room_that_it_was_given(model: Path, tmp_path: Path) -> None:
    """Ranks are known last, and the header comes first: spaces fill what they did not take."""
    edit = EditFile.of(edit_model(model, ["cat"], config=DENSE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RealEraWarning)
        report = export_lora(edit, model, tmp_path / "lora.safetensors", format="kohya", energy=0.5)
    whole = (tmp_path / "lora.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    assert len(header) == 1 + 3 * len(report.layers)
    assert 8 + length + max(row["data_offsets"][1] for name, row in header.items() if name != "__metadata__") == len(
        whole
    )
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert sorted(row["shape"][0] for name, row in header.items() if name.endswith("down.weight")) == sorted(
        ranks.values()
    )


def test_the_whole_difference(family: str, model: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(model, ["cat"], config=DENSE))
    apply_edit(edit, model).save(tmp_path / "edited")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost, so nothing is warned of
        report = export_lora(edit, model, tmp_path / "full.safetensors", format="full")
    original, edited = unet_weights(model), unet_weights(tmp_path / "edited")
    stored = load_file(tmp_path / "full.safetensors")
    assert len(stored) == len(report.layers)
    for layer in report.layers:
        path = original_path(layer.name, 1) if family == "sdxl" else layer.name
        change = stored[f"lora_unet_{path.replace('.', '_')}.diff"]
        name = f"{layer.name}.weight"
        assert change.shape == original[name].shape
        assert float((original[name] + change - edited[name]).abs().max()) < 1e-6
        if name == POOLED:  # the other columns are size ids
            assert change[:, 72:].count_nonzero() == 0 < change[:, :72].count_nonzero()
    assert report.worst < 1e-7


def test_names_are_those_of_the_formats(sd1: Path, sdxl: Path, tmp_path: Path) -> None:
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    place = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    other = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k"  # one layer a block, (1 + 1) 1 + 0 + 1
    wanted = {
        (sd1, "diffusers"): {f"unet.{block}.lora_A.weight", f"unet.{block}.lora_B.weight"},
        (sd1, "kohya"): {f"{place}.lora_down.weight", f"{place}.lora_up.weight", f"{place}.alpha"},
        (sd1, "full"): {f"{place}.diff"},
        (sdxl, "diffusers"): {f"unet.{block}.lora_A.weight", "unet.add_embedding.linear_1.lora_B.weight"},
        (sdxl, "kohya"): {f"{other}.lora_down.weight", f"{other}.alpha", "lora_unet_label_emb_0_0.lora_up.weight"},
        (sdxl, "full"): {f"{other}.diff", "lora_unet_label_emb_0_0.diff"},
    }
    edits = {model: EditFile.of(edit_model(model, ["cat"], config=QUICK)) for model in (sd1, sdxl)}
    for (model, format), names in wanted.items():
        export_lora(edits[model], model, tmp_path / "lora", format=format, force=True)
        stored = load_file(tmp_path / "lora")
        assert names <= set(stored)
        if format == "kohya":
            down, up = (stored[f"{place if model == sd1 else other}.lora_{side}.weight"] for side in ("down", "up"))
            assert (down.shape[0], down.shape[1]) == (up.shape[1], 96 if model == sd1 else 144)
            assert {float(tensor) for name, tensor in stored.items() if name.endswith(".alpha")} == {1.0}
    assert inspect_path(tmp_path / "lora")["concepts"][0]["name"] == "cat"


@pytest.mark.parametrize("shape", ["sd15", "sd21", "sdxl"])
def test_original_names_agree_with_diffusers_own_converter(shape: str) -> None:
    """Every cross-attention projection of the public models, there and back."""
    unet = meta_unet(shape)
    paths = [name.removesuffix(".weight") for name in unet.state_dict() if re.search(r"attn2\.to_[kv]\.weight$", name)]
    assert len(paths) == {"sd15": 32, "sd21": 32, "sdxl": 140}[shape]
    for path in paths:
        ours = "lora_unet_" + original_path(path, 2).replace(".", "_")
        (back,) = _maybe_map_sgm_blocks_to_diffusers({ours: path}, unet.config)
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            back = back.replace(old, new)  # what is left to diffusers' next step
        assert back == "lora_unet_" + path.replace(".", "_")
    known = {  # as published SDXL files of kohya's trainer have them
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.2.attentions.1": "input_blocks.8.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.2": "output_blocks.2.1",
        "up_blocks.1.attentions.0": "output_blocks.3.1",
    }
    for path, original in known.items():
        rest = ".transformer_blocks.1.attn2.to_k"
        assert original_path(path + rest, 2) == original + rest
        assert diffusers_path(original + rest, 2) == path + rest
    assert all(diffusers_path(original_path(path, layers), layers) == path for path in paths for layers in (2, 3))
    with pytest.raises(CheckpointError, match="no place in the original U-Net; export with --format diffusers"):
        original_path("conv_in", 2)


# What is lost


def test_a_truncation_tells_what_each_layer_lost(sd1: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=DENSE))
    original = unet_weights(sd1)
    for options in ({"rank": 4}, {"energy": 0.5}, {"energy": 0.9}, {}):
        with pytest.warns(RealEraWarning, match=r"a truncation: up to [\d.]+% of a layer's change is lost \(.*attn2"):
            report = export_lora(edit, sd1, tmp_path / "lora", force=True, **options)
        stored = load_file(tmp_path / "lora")
        for layer in report.layers:
            change = original[f"{layer.name}.weight"].double() @ edit.cross.delta()
            values = torch.linalg.svdvals(change)
            up, down = (stored[f"unet.{layer.name}.lora_{side}.weight"].double() for side in "BA")
            lost = float((up @ down - change).norm() / change.norm())
            assert layer.lost == pytest.approx(lost, rel=1e-6)
            assert lost == pytest.approx(float(values[layer.rank :].norm() / values.norm()), rel=1e-5)  # the optimum
            assert layer.rank == int(down.any(1).sum()) == int(up.any(0).sum())
            if "rank" in options:
                assert layer.rank == 4
            else:
                energy = options.get("energy", 0.99)
                shares = values.square().cumsum(0) / values.square().sum()
                assert layer.rank == 1 + int((shares < energy).sum())
                assert lost <= (1 - energy) ** 0.5
        assert f"{report.worst:.1e} lost" in report.report()


def test_more_rank_than_there_is_changes_nothing(sd1: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    exact = export_lora(edit, sd1, tmp_path / "exact")
    for options in ({"rank": 1000}, {"energy": 1.0}):
        assert export_lora(edit, sd1, tmp_path / "more", force=True, **options).layers == exact.layers
    assert (tmp_path / "more").read_bytes() == (tmp_path / "exact").read_bytes()


def test_half_precision_is_within_its_rounding(sd1: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    sizes = {}
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        for format in ("diffusers", "kohya", "full"):
            report = export_lora(edit, sd1, tmp_path / "lora", format=format, dtype=dtype, force=True)
            assert report.worst < bound
            assert {tensor.dtype for tensor in load_file(tmp_path / "lora").values()} == {dtype}
            sizes[dtype, format] = report.bytes
    assert sizes[torch.float16, "diffusers"] < 0.6 * sizes[torch.float32, "diffusers"]


def test_an_edit_of_keys_is_a_lora_of_keys(sd1: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=replace(QUICK, edit="k")))
    report = export_lora(edit, sd1, tmp_path / "lora")
    assert len(report.layers) == 7
    assert all(layer.name.endswith("to_k") for layer in report.layers)


def test_a_control_net_is_left_out_and_named(sd1: Path, tmp_path: Path) -> None:
    unet = DiffusionPipeline.from_pretrained(sd1).unet
    ControlNetModel.from_unet(unet, conditioning_channels=3).save_pretrained(sd1 / "controlnet")
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    with pytest.warns(RealEraWarning, match="a LoRA reaches the U-Net alone, not controlnet"):
        report = export_lora(edit, sd1, tmp_path / "lora")
    assert report.left_out == ("controlnet",)
    assert {layer.name for layer in report.layers} == {
        p.name.removesuffix(".weight") for p in open_checkpoint(sd1).denoisers[1].projections
    }


def test_the_weights_are_those_of_the_variant_that_is_asked_for(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("sd1")
    DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16).save_pretrained(model, variant="fp16")
    edit = EditFile.of(edit_model(model, ["cat"], config=QUICK))
    found = [export_lora(edit, model, tmp_path / str(v), variant=v).to_dict()["layers"] for v in (None, "fp16")]
    assert (tmp_path / "None").read_bytes() != (tmp_path / "fp16").read_bytes()
    assert [layer["name"] for layer in found[0]] == [layer["name"] for layer in found[1]]


# Errors


def test_bad_calls_are_our_errors(sd1: Path, sd2: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    out, before = tmp_path / "out", tree(sd1)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("format = 'gguf': expected one of diffusers, kohya, full", {"format": "gguf"}),
        ("rank and energy are both given", {"rank": 3, "energy": 0.5}),
        ("format full holds the whole change", {"format": "full", "rank": 3}),
        ("rank = 0: expected at least 1", {"rank": 0}),
        ("energy = 1.5: expected more than 0", {"energy": 1.5}),
        ("energy = nan: expected more than 0", {"energy": float("nan")}),
        ("dtype = torch.int8: expected float32", {"dtype": torch.int8}),
    ]
    for message, options in calls:
        with pytest.raises(ConfigError, match=message):
            export_lora(edit, sd1, out, **options)
    with pytest.raises(CheckpointError, match="is not the text encoder that the edit was made for"):
        export_lora(edit, sd2, out)
    with pytest.raises(CheckpointError, match="give its path"):
        export_lora(edit, DiffusionPipeline.from_pretrained(sd1), out)
    for place in (sd1 / UNET, sd1 / "lora.safetensors"):
        with pytest.raises(CheckpointError, match="lies in the input"):
            export_lora(edit, sd1, place, force=True)
    out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"already exists; .*--force"):
        export_lora(edit, sd1, out)
    assert out.read_text() == "mine"
    assert tree(sd1) == before


def test_an_overflow_is_named(sd1: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK)).scale(1e13)
    for format in ("diffusers", "kohya", "full"):
        with pytest.raises(ConfigError, match=r"attn2\.to_k: the LoRA overflows torch\.float16; use --dtype float32"):
            export_lora(edit, sd1, tmp_path / "out", format=format, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["sd1"]


def test_the_command_on_the_real_model(emoji: Path, tmp_path: Path) -> None:
    edit, lora, out = tmp_path / "edit.safetensors", tmp_path / "lora.safetensors", tmp_path / "erased"
    run("erase", emoji, "cat face", "--save-edit", edit, "-o", out)
    said = run("export-lora", edit, emoji, "-o", lora, "--format", "kohya")
    assert (said.exit_code, said.stderr) == (0, "")
    assert f"written    {lora}   (kohya, 14 layers, rank" in said.stdout
    assert said.stdout.count("   lost ") == 14
    record = json.loads(run("export-lora", edit, emoji, "-o", lora, "--json", "--force").stdout)
    assert record["worst"] < 1e-6
    assert record["bytes"] == lora.stat().st_size < 2_000_000
    fused, edited, original = loaded(emoji, lora, 1.0), unet_weights(out), unet_weights(emoji)
    ulp = 2.0**-11 * max(float(w.abs().max()) for w in original.values())  # of the float16 that the model is stored in
    assert worst(fused, {name: weight.float() for name, weight in edited.items()}) < 2 * ulp
    assert worst(original, edited) > 20 * ulp
