"""Which keys of a single file read the text, with diffusers' own converter as the judge, at the public structures."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from benchmarks.shapes import SHAPES, meta_unet
from benchmarks.single_file import UNET, ema_name, unet_name, unet_state
from realera_edit.errors import CheckpointError, ProjectionError
from realera_edit.layouts import MAIN, ema_projections, file_projections, unet_prefixes
from realera_edit.lora import original_path
from realera_edit.projections import Projection, text_projections

# Key and value projections of the text, and pooled paths.
COUNTS = {"sd15": 32, "sd21": 32, "sdxl": 141}
PUBLIC = pytest.mark.parametrize("shape", COUNTS)


@functools.cache
def unet(shape: str) -> Any:
    return meta_unet(shape)


def widths(shape: str) -> tuple[int, int | None]:
    width = int(SHAPES[shape].unet["cross_attention_dim"])
    return width, 1280 if shape == "sdxl" else None


def state_of(shape: str) -> dict[str, torch.Tensor]:
    return {UNET + name: weight for name, weight in unet_state(unet(shape)).items()}


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in state.items()}


def found(shape: str, state: dict[str, torch.Tensor] | None = None) -> tuple[Projection, ...]:
    return file_projections(shapes_of(state or state_of(shape)), UNET, *widths(shape), "file")


@PUBLIC
def test_the_file_of_our_tests_is_one_that_diffusers_reads(shape: str) -> None:
    """Control: every weight of the U-Net comes back, the very tensor, under its own name."""
    own = unet(shape).state_dict()
    state = {UNET + unet_name(name, unet(shape).config): weight for name, weight in own.items()}
    back = convert_ldm_unet_checkpoint(state, unet(shape).config)
    assert set(back) == set(own)
    assert len(state) == len(own)
    assert all(back[name] is own[name] for name in own)


@PUBLIC
def test_every_attn2_key_is_found_where_the_converter_puts_it(shape: str) -> None:
    model, state = unet(shape), state_of(shape)
    marked = {name: torch.tensor(float(place)) for place, name in enumerate(state)}
    converted = convert_ldm_unet_checkpoint(marked, model.config)
    key_of = {float(mark): key for key, mark in marked.items()}
    folder = text_projections(shapes_of(model.state_dict()), model.config, *widths(shape), "folder")
    wanted = {(key_of[float(converted[p.name])], p.role, p.columns) for p in folder}
    assert {(p.name, p.role, p.columns) for p in found(shape)} == wanted
    assert len(wanted) == COUNTS[shape]
    attn2 = {name for name in state if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert {p.name for p in found(shape)} - attn2 == ({f"{UNET}label_emb.0.0.weight"} if shape == "sdxl" else set())
    assert attn2 <= {p.name for p in found(shape)}
    assert not any("attn1" in p.name for p in found(shape))


@PUBLIC
def test_the_export_of_a_lora_agrees(shape: str) -> None:
    """The map that `export-lora` uses, for each layer, to the name in the file."""
    model = unet(shape)
    for p in text_projections(shapes_of(model.state_dict()), model.config, *widths(shape), "folder"):
        path = original_path(p.name.removesuffix(".weight"), 2)
        assert path + ".weight" == unet_name(p.name, model.config)


def test_the_ema_copies_are_those_that_the_converter_takes() -> None:
    """With values of their own, so that a copy is told from what it is a copy of."""
    model, keys = unet("sd15"), list(state_of("sd15"))
    marked = {name: torch.tensor(float(place)) for place, name in enumerate(keys)}
    marked |= {ema_name(name): torch.tensor(-float(place)) for place, name in enumerate(keys)}
    converted = convert_ldm_unet_checkpoint(marked, model.config, extract_ema=True)
    state = state_of("sd15")
    state |= {ema_name(name): weight for name, weight in state.items()} | {"model_ema.decay": torch.empty(())}
    copies = ema_projections(shapes_of(state), found("sd15", state), "file")
    folder = text_projections(shapes_of(model.state_dict()), model.config, 768, None, "folder")
    assert sorted(float(marked[p.name]) for p in copies) == sorted(float(converted[p.name]) for p in folder)
    assert len(copies) == 32
    assert ema_projections(shapes_of(state_of("sd15")), found("sd15"), "file") == ()


def test_an_ema_copy_that_is_missing_is_named() -> None:
    state = state_of("sd15")
    copies = {ema_name(name): weight for name, weight in state.items()}
    name = next(name for name in copies if "attn2to_v" in name)
    for broken in ({**copies, name: torch.empty(3, 4)}, {k: v for k, v in copies.items() if k != name}):
        with pytest.raises(CheckpointError, match=rf"holds EMA copies, but {name} is (\[3, 4\]|missing)"):
            ema_projections(shapes_of(state | broken), found("sd15"), "file")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "unet.", "control_model."])
def test_whatever_stands_before_the_blocks(prefix: str) -> None:
    shapes = {prefix + name: tuple(weight.shape) for name, weight in unet_state(unet("tiny-sdxl")).items()}
    shapes["first_stage_model.decoder.mid_block.attentions.0.to_k.weight"] = (192, 192)
    assert unet_prefixes(shapes) == [prefix]
    here = {p.name.removeprefix(prefix) for p in file_projections(shapes, prefix, 192, 128, "file")}
    plain = shapes_of(unet_state(unet("tiny-sdxl")))
    assert here == {p.name for p in file_projections(plain, "", 192, 128, "file")}
    assert "label_emb.0.0.weight" in here
    both = {**shapes, **{MAIN + name: shape for name, shape in plain.items()}}
    assert unet_prefixes(both) == [MAIN, prefix]
    main = {p.name.removeprefix(MAIN) for p in file_projections(both, MAIN, 192, 128, "file")}
    assert main == here


def test_two_networks_are_kept_apart() -> None:
    """Though what stands before their blocks is of one length."""
    shapes = {}
    for prefix, where in (("one.", "middle_block.1"), ("two.", "input_blocks.1.1")):
        for leaf, width in (("to_q", 32), ("to_k", 64), ("to_v", 64)):
            shapes[f"{prefix}{where}.transformer_blocks.0.attn2.{leaf}.weight"] = (32, width)
    assert unet_prefixes(shapes) == ["one.", "two."]
    for prefix in ("one.", "two."):
        found = file_projections(shapes, prefix, 64, None, "file")
        assert [p.name.partition(".")[0] + "." for p in found] == [prefix] * 2


def test_another_width_is_told() -> None:
    with pytest.raises(
        ProjectionError, match=r"no cross-attention projection reads 1024 inputs.*cross_attention_dim = 768"
    ):
        file_projections(shapes_of(state_of("sd15")), UNET, 1024, None, "file")
    with pytest.raises(ProjectionError, match=r"the pooled text path .* is missing"):
        file_projections(shapes_of(state_of("sd15")), UNET, 768, 1280, "file")


def test_the_self_attention_of_equal_width_is_left_alone() -> None:
    """Where the text is as wide as a layer, the width alone does not tell."""
    shapes = {}
    for block in ("attn1", "attn2"):
        for leaf in ("to_q", "to_k", "to_v"):
            shapes[f"{UNET}middle_block.1.transformer_blocks.0.{block}.{leaf}.weight"] = (64, 64)
    names = [p.name.rpartition("blocks.0.")[2] for p in file_projections(shapes, UNET, 64, None, "file")]
    assert names == ["attn2.to_k.weight", "attn2.to_v.weight"]
