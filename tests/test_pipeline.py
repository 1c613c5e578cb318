"""Loaded pipelines: edited in place or not at all, saved, and refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from helpers import QUICK, tree
from torch.testing._internal.two_tensor import TwoTensor

from realera_edit import EditFile, RealEraError, RealEraWarning, apply_edit, edit_model, inspect_path
from realera_edit.errors import CheckpointError
from realera_edit.layers import compare
from realera_edit.pipeline import LoadedPipeline
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


def test_several_control_nets_are_edited_and_named_as_their_folders(sd1: Path, tmp_path: Path) -> None:
    """Also one that is there twice. The folder of the same pipeline gets the same weights and the same record."""
    plain = load(sd1)
    nets = [ControlNetModel.from_unet(plain.unet, conditioning_channels=3) for _ in range(2)]
    nets[1].state_dict()[KEY].mul_(1.5)
    pipe = StableDiffusionControlNetPipeline(
        **plain.components, controlnet=[*nets, nets[0]], requires_safety_checker=False
    )
    before = [snapshot(net) for net in nets]
    pipe.save_pretrained(tmp_path / "plain")
    result = edit_model(pipe, ["cat"], config=QUICK)
    assert set(result.tensors) == {"unet", "controlnet", "controlnet_1", "controlnet_2"}
    assert set(result.tensors["controlnet_1"]) == differing(nets[1], before[1])
    assert result.tensors["controlnet"] == result.tensors["controlnet_2"] != result.tensors["controlnet_1"]
    result.save(tmp_path / "loaded")
    edit_model(tmp_path / "plain", ["cat"], config=QUICK).save(tmp_path / "filed")
    filed = inspect_path(tmp_path / "filed")["tensors"]
    assert {str(Path(name).parent): hashes for name, hashes in filed.items()} == result.tensors
    for net in ("controlnet", "controlnet_1"):
        one, two = (ControlNetModel.from_pretrained(tmp_path / place / net) for place in ("loaded", "filed"))
        assert not differing(one, two.state_dict())
    result.undo()
    assert not any(differing(net, weights) for net, weights in zip(nets, before, strict=True))


def compiled(pipe: Any, *names: str) -> Any:
    """The pipeline with these components compiled, as far as that goes without a call."""
    for name in names:
        setattr(pipe, name, torch.compile(getattr(pipe, name)))
    return pipe


def test_a_compiled_pipeline_is_edited_saved_and_restored(family: str, model: Path, tmp_path: Path) -> None:
    pipe, plain = compiled(load(model), "unet", "text_encoder"), load(model)
    before = snapshot(plain.unet)
    part = plain.unet.mid_block.attentions[0]
    plain.unet.mid_block.attentions[0] = torch.compile(part)
    results = [edit_model(one, ["cat"], config=QUICK) for one in (pipe, plain)]
    plain.unet.mid_block.attentions[0] = part
    for result in results:
        assert result.tensors == edit_model(load(model), ["cat"], config=QUICK).tensors
        assert set(result.tensors["unet"]) == differing(plain.unet, before)
    results[0].save(tmp_path / "out")
    assert not differing(load(tmp_path / "out").unet, plain.unet.state_dict())
    for result in results:
        result.undo()
    assert not differing(plain.unet, before)
    assert not differing(pipe.unet._orig_mod, before)


def test_compiled_control_nets_are_edited(sd1: Path) -> None:
    plain = load(sd1)
    nets = [ControlNetModel.from_unet(plain.unet, conditioning_channels=3) for _ in range(2)]
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=nets, requires_safety_checker=False)
    pipe.controlnet.nets[1] = torch.compile(nets[1])
    before = snapshot(nets[1])
    result = edit_model(compiled(pipe, "controlnet"), ["cat"], config=QUICK)
    assert set(result.tensors) == {"unet", "controlnet", "controlnet_1"}
    assert set(result.tensors["controlnet_1"]) == differing(nets[1], before)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int8", lambda w: (w * 99).to(torch.int8)),  # as bitsandbytes has 8 bits
        ("uint8", lambda w: (w * 99).to(torch.uint8).reshape(-1, 1)[::2]),  # and 4 bits
        ("float8_e4m3fn", lambda w: w.to(torch.float8_e4m3fn)),
        ("TwoTensor", lambda w: TwoTensor(w, w)),  # packed in a tensor of its own kind, as torchao does
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("robust", [0, 1])
def test_quantised_weights_are_refused_before_anything_is_done(
    kind: str, change: Any, robust: float, sd1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(sd1)
    block = pipe.unet.get_submodule(KEY.removesuffix(".to_k.weight"))
    for layer in (block.to_k, block.to_v):
        layer.weight = torch.nn.Parameter(change(layer.weight.data), requires_grad=False)
    monkeypatch.setattr("realera_edit.edit.compute_edit", lambda *_: pytest.fail("computed"))
    before = {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters() if "attn2" not in name}
    with pytest.raises(
        CheckpointError, match=rf"pipeline's unet: {KEY} is {kind}; only fp64, .* Load it unquantised, or .*wrap_text_e"
    ):
        edit_model(pipe, ["cat"], config=replace(QUICK, robust=robust))
    assert before == {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters() if "attn2" not in name}


def test_quantised_weights_that_stay_do_not_stop_the_edit(sd1: Path) -> None:
    pipe = load(sd1)
    block = pipe.unet.get_submodule(KEY.removesuffix(".to_k.weight"))
    block.to_v.weight = torch.nn.Parameter(block.to_v.weight.data.to(torch.int8), requires_grad=False)
    assert edit_model(pipe, ["cat"], config=replace(QUICK, edit="k")).tensors
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    with pytest.raises(CheckpointError, match=r"attn2.to_v.weight is int8"):
        apply_edit(edit, pipe)
    with pytest.raises(CheckpointError, match=r"attn2.to_v.weight is int8"):
        compare(LoadedPipeline(load(sd1)), LoadedPipeline(pipe))


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
