"""Loaded pipelines: edited in place or not at all, saved, and refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from helpers import QUICK, tree

from realera_edit import RealEraError, RealEraWarning, edit_model, inspect_path
from realera_edit.errors import CheckpointError
from realera_edit.provenance import RECORD

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def differing(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, w in module.state_dict().items() if not torch.equal(w.nan_to_num(7), before[n].nan_to_num(7))}


def test_a_saved_pipeline_loads_and_tells_what_was_done(family: str, model: Path, tmp_path: Path) -> None:
    pipe = load(model)
    result = edit_model(pipe, ["cat"], config=QUICK)
    result.save(tmp_path / "out")
    assert not differing(load(tmp_path / "out").unet, pipe.unet.state_dict())
    assert differing(load(model).unet, pipe.unet.state_dict()) == {p.name for p in result.source.projections}
    record = inspect_path(tmp_path / "out")
    assert (record["model"], record["undo"]) == ("the pipeline", False)
    assert record["tensors"] == result.tensors
    assert set(record["tensors"]["unet"]) == {p.name for p in result.source.projections}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_pipeline_in_16_bits_gets_the_edit_of_its_file(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    """Its encoder computes in float32 meanwhile, and is afterwards as it was; in its own type the edit is another."""
    load(model, dtype).save_pretrained(tmp_path / "half")
    edit_model(tmp_path / "half", ["cat"], config=QUICK).save(tmp_path / "out")
    from_file = load(tmp_path / "out", dtype).unet.state_dict()
    pipe, own = load(tmp_path / "half", dtype), load(tmp_path / "half", dtype)
    places = [(w.data_ptr(), w.dtype) for w in pipe.text_encoder.parameters()]
    edit_model(pipe, ["cat"], config=QUICK)
    assert not differing(pipe.unet, from_file)
    assert [(w.data_ptr(), w.dtype) for w in pipe.text_encoder.parameters()] == places
    edit_model(own, ["cat"], config=QUICK, dtype=dtype)
    assert differing(own.unet, from_file)


def test_a_save_that_fails_leaves_nothing(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(sd1)
    result = edit_model(pipe, ["cat"], config=QUICK)
    before = tree(tmp_path)

    def half(folder: Path, **_: Any) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe, "save_pretrained", half)
    with pytest.raises(CheckpointError, match="out: cannot be written: the disk is full"):
        result.save(tmp_path / "out")
    assert tree(tmp_path) == before
    with pytest.raises(CheckpointError, match="sd1: already exists"):
        result.save(sd1)


def test_a_control_net_is_edited_with_its_pipeline(sd1: Path) -> None:
    plain = load(sd1)
    net = ControlNetModel.from_unet(plain.unet, conditioning_channels=3)
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=net, requires_safety_checker=False)
    before = {"unet": snapshot(pipe.unet), "controlnet": snapshot(net)}
    result = edit_model(pipe, ["cat"], config=QUICK)
    assert {name: set(tensors) for name, tensors in result.tensors.items()} == {
        name: differing(getattr(pipe, name), weights) for name, weights in before.items()
    }
    assert all(len(tensors) >= 6 for tensors in result.tensors.values())
    result.undo()
    assert not any(differing(getattr(pipe, name), weights) for name, weights in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_stops_the_edit_before_it_begins(value: float, sd1: Path) -> None:
    pipe = load(sd1)
    pipe.unet.state_dict()[KEY][0, 0] = value
    before = snapshot(pipe.unet)
    with pytest.raises(CheckpointError, match=f"unet: {KEY} contains NaN or inf"):
        edit_model(pipe, ["cat"], config=QUICK)
    assert not differing(pipe.unet, before)


def test_an_overflow_stops_the_edit_before_it_begins(sd1: Path) -> None:
    pipe = load(sd1, torch.float16)
    pipe.unet.state_dict()[KEY].sign_().mul_(65504)
    before = snapshot(pipe.unet)
    with pytest.raises(RealEraError, match=rf"unet: the edited {KEY} overflows torch\.float16"):
        edit_model(pipe, ["cat"], config=QUICK)
    assert not differing(pipe.unet, before)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_offloaded_weights_are_an_error(name: str, sd1: Path) -> None:
    pipe = load(sd1)
    getattr(pipe, name).to("meta")
    with pytest.raises(CheckpointError, match=rf"weights of {name} are offloaded \(meta .* before enable_sequential"):
        edit_model(pipe, ["cat"], config=QUICK)


def test_what_is_no_pipeline_of_ours_is_an_error(sd1: Path) -> None:
    pipe = load(sd1)
    for thing in (object(), pipe.unet, None):
        with pytest.raises(CheckpointError, match=f"{type(thing).__name__} has no U-Net: give a loaded Stable Diff"):
            edit_model(thing, ["cat"], config=QUICK)
    encoder = pipe.text_encoder
    pipe.text_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="text_encoder is a Linear; supported: CLIPTextModel"):
        edit_model(pipe, ["cat"], config=QUICK)
    pipe.text_encoder = None
    with pytest.raises(CheckpointError, match="the pipeline has no text encoder loaded"):
        edit_model(pipe, ["cat"], config=QUICK)
    pipe.text_encoder = encoder
    assert edit_model(pipe, ["cat"], config=QUICK).tensors


def test_a_lora_is_pointed_out(sd1: Path) -> None:
    pipe = load(sd1)
    pipe.unet.conv_in.lora_A = torch.nn.Linear(2, 2)
    with pytest.warns(RealEraWarning, match="unet carries a LoRA: the base weights are edited"):
        edit_model(pipe, ["cat"], config=QUICK)


def test_the_record_is_the_same_for_the_same_edit(sd1: Path, tmp_path: Path) -> None:
    records = []
    for name in ("one", "two"):
        edit_model(load(sd1), ["cat"], config=QUICK).save(tmp_path / name)
        records.append((tmp_path / name / RECORD).read_bytes())
    assert records[0] == records[1]
