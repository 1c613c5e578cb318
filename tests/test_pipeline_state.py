"""Whether an edit of a loaded pipeline is in force: undo and save ask the weights, and the record tells of them all."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from helpers import QUICK, made

from realera_edit import apply_edit, edit_model, inspect_path
from realera_edit.errors import CheckpointError, ConceptError

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def load(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def snapshot(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}


def same(pipe: Any, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, weights[name]) for name, weight in pipe.unet.state_dict().items())


def erase(pipe: Any, name: str = "cat", **options: Any) -> Any:
    return edit_model(pipe, [name], config=QUICK, **options)


def names(record: dict[str, Any]) -> list[str]:
    """What the edits of a record erased, oldest first."""
    return [concept["name"] for one in (*record.get("previous", ()), record) for concept in one["concepts"]]


def test_edits_are_undone_in_the_reverse_order(model: Path) -> None:
    pipe = load(model)
    before = snapshot(pipe)
    first = erase(pipe)
    middle = snapshot(pipe)
    second = erase(pipe, "dog")
    after = snapshot(pipe)
    with pytest.raises(CheckpointError, match="the pipeline: another edit was made since this one: undo that first"):
        first.undo()
    assert same(pipe, after)
    second.undo()
    assert same(pipe, middle)
    second.undo()  # was undone: nothing is left to do, and the other edit stays
    assert same(pipe, middle)
    first.undo()
    assert same(pipe, before)
    again = erase(pipe)
    first.undo()
    assert same(pipe, middle)
    again.undo()
    assert same(pipe, before)


def test_only_the_edit_in_force_is_saved(sd1: Path, tmp_path: Path) -> None:
    pipe, out = load(sd1), tmp_path / "out"
    first = erase(pipe)
    second = erase(pipe, "dog")
    with pytest.raises(CheckpointError, match=r"another edit was made since this one: .* or save its result"):
        first.save(out)
    second.undo()
    with pytest.raises(CheckpointError, match="the pipeline: this edit was undone"):
        second.save(out)
    assert not out.exists()
    first.save(out)
    assert names(inspect_path(out)) == ["cat"]
    first.undo()
    with pytest.raises(CheckpointError, match="this edit was undone"):
        first.save(out, force=True)


def test_weights_that_something_else_changed_are_neither_undone_nor_saved(sd1: Path, tmp_path: Path) -> None:
    pipe = load(sd1)
    result = erase(pipe)
    left = snapshot(pipe)
    pipe.unet.state_dict()[KEY].mul_(1.5)
    now = snapshot(pipe)
    for call in (result.undo, lambda: result.save(tmp_path / "out")):
        with pytest.raises(CheckpointError, match="weights are not as this edit left them: they were edited, cast"):
            call()
    assert same(pipe, now)
    pipe.unet.load_state_dict(left)
    unet, pipe.unet = pipe.unet, load(sd1).unet
    with pytest.raises(CheckpointError, match="has other weights than those that this edit changed: a component was"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipe.unet = unet
    result.save(tmp_path / "out")
    assert same(load(tmp_path / "out"), left)


def test_weights_cast_since_are_undone_in_their_order_and_not_saved(sd1: Path, tmp_path: Path) -> None:
    """No hash tells of them, and the record would hold false ones."""
    pipe = load(sd1)
    before = {name: weight.to(torch.bfloat16) for name, weight in snapshot(pipe).items()}
    first, second = erase(pipe), erase(pipe, "dog")
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"cast.* since\. Undo that first \(save before a cast\)"):
        second.save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="another edit was made since this one"):
        first.undo()
    second.undo()
    first.undo()
    assert same(pipe, before)


def test_weights_offloaded_since_are_not_undone_in_silence(sd1: Path, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    pipe = load(sd1)
    result = erase(pipe)
    cpu_offload(pipe.unet, "cpu")
    for call in (result.undo, lambda: result.save(tmp_path / "out")):
        with pytest.raises(CheckpointError, match="its weights were offloaded since; put them back first"):
            call()


def test_the_record_tells_of_the_edits_before(model: Path, tmp_path: Path) -> None:
    """Of either kind, also where nobody kept their results; not of those that are no longer in force."""
    pipe = load(model)
    before = snapshot(pipe)
    gone = erase(pipe, "horse")
    gone.undo()
    apply_edit(made(model, "bird"), pipe)
    erase(pipe)
    gc.collect()
    result = erase(pipe, "dog")
    assert names(result.save(tmp_path / "three") and inspect_path(tmp_path / "three")) == ["bird", "cat", "dog"]
    bird, cat = inspect_path(tmp_path / "three")["previous"]
    assert "applied" in bird
    assert "applied" not in cat
    chain = [edit["tensors"]["unet"] for edit in (bird, cat, result.to_dict())]
    for one, two in pairwise(chain):
        assert {name: pair["after"] for name, pair in one.items()} == {name: two[name]["before"] for name in one}
    assert result.report()
    pipe.unet.load_state_dict(before)
    assert names(erase(pipe, "lion").to_dict()) == ["lion"]


def test_edits_of_other_weights_go_by_the_same_order(sd1: Path) -> None:
    pipe = load(sd1)
    keys = edit_model(pipe, ["cat"], config=replace(QUICK, edit="k"))
    values = edit_model(pipe, ["dog"], config=replace(QUICK, edit="v"))
    assert names(values.to_dict()) == ["cat", "dog"]
    with pytest.raises(CheckpointError, match="another edit was made since this one"):
        keys.undo()
    values.undo()
    keys.undo()


def test_a_shared_network_has_one_order_and_two_pipelines(sd1: Path) -> None:
    """Also where it is compiled in one of them."""
    plain = load(sd1)
    first = erase(plain)
    net = ControlNetModel.from_unet(plain.unet, conditioning_channels=3)
    parts = {**plain.components, "controlnet": net, "requires_safety_checker": False}
    both = StableDiffusionControlNetPipeline(**parts)
    both.unet = torch.compile(both.unet)
    second = erase(both, "dog")
    assert names(second.to_dict()) == ["cat", "dog"]
    with pytest.raises(CheckpointError, match="another edit was made since this one"):
        first.undo()
    second.undo()
    first.undo()
    assert same(plain, snapshot(load(sd1)))


def test_an_edit_that_changes_nothing_is_not_remembered(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(sd1)
    with monkeypatch.context() as patch:
        patch.setattr("realera_edit.edit.apply_by_role", lambda edit, roles, weights: [w.clone() for w in weights])
        with pytest.raises(ConceptError, match="the edit changed no weight"):
            erase(pipe)
    assert names(erase(pipe, "dog").to_dict()) == ["dog"]


def test_nothing_keeps_a_pipeline_that_is_no_longer_used(sd1: Path) -> None:
    pipe = load(sd1)
    result = erase(pipe)
    unet = ref(pipe.unet)
    gc.collect()
    gc.disable()
    try:
        del pipe, result
        alive = unet() is not None
    finally:
        gc.enable()
    assert not alive
