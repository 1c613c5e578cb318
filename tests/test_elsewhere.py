"""An edit with the text encoder or the pipeline on another device: nothing meets the CPU's tensors by mistake.

On the stand-in of `elsewhere.py` here, which is slow and exact; on a real GPU in test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from elsewhere import DEVICE, Elsewhere
from helpers import DENSE, QUICK, UNET, made
from safetensors.torch import load_file

from realera_edit import (
    Concept,
    EditConfig,
    EditFile,
    apply_edit,
    attack_model,
    edit_model,
    embeddings,
    pipeline,
    wrap_text_encoder,
)

CONFIGS = {
    "low-rank": QUICK,
    "no prior": replace(QUICK, prior_words=0),
    "exact moments": DENSE,
    "sampled": replace(DENSE, samples=50),
    "covariance": replace(QUICK, perturbation="covariance", words=3, word_similarity=-1.0),
    "robust": replace(QUICK, robust=2),
    "words": replace(QUICK, words=3, word_similarity=-1.0, beyond=4, strength=None),
}
IGNORED = "ignore:.*(keep more than was asked|moved by more than)"


def test_the_stand_in_refuses_what_a_device_refuses() -> None:
    with Elsewhere():
        here = torch.ones(3, 3)
        there = here.to(DEVICE)
        assert there.device.type == DEVICE
        assert float((there @ there).sum()) == 27
        assert torch.equal((there[[0, 2]] * torch.tensor(2.0)).cpu(), torch.full((2, 3), 2.0))
        for wrong in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here @ there):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        there += 1
        assert torch.equal(here, torch.ones(3, 3))
        here.copy_(there)
        assert float(here.sum()) == 18
        with pytest.raises(RuntimeError, match="other bits"):
            there.index_add(0, torch.tensor([0]).to(DEVICE), there[:1])
    with Elsewhere(torch.float64), pytest.raises(TypeError, match=r"no torch\.float64 there"):
        torch.ones(3).to(DEVICE).double()


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_edited_there_is_the_same_to_the_bit(
    config: EditConfig, family: str, pristine: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pristine(family)  # type: ignore[operator]
    concepts, kept = [Concept("cat", aliases=("large cat",)), Concept("monet", "<average>")], ["dog", "horse"]
    edit_model(model, concepts, preserve=kept, config=config, device="cpu").save(tmp_path / "cpu")
    monkeypatch.setenv("REALERA_EDIT_CACHE", str(tmp_path / "cache"))  # the prior is made there as well
    with Elsewhere():
        result = edit_model(model, concepts, preserve=kept, config=config, device=DEVICE)
        assert result.edit.cross.factor.left.device.type == DEVICE
        assert EditFile.of(result).cross.left.device.type == "cpu"
        assert result.geometry(weighted=True).names
        result.save_edit(tmp_path / "edit.safetensors")
        result.save(tmp_path / "there")
        again = edit_model(model, concepts, preserve=kept, config=config, device=DEVICE)  # the prior from the cache
    assert torch.equal(again.edit.cross.factor.delta().cpu(), result.edit.cross.factor.delta().cpu())
    here, there = (load_file(tmp_path / name / UNET) for name in ("cpu", "there"))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())


@pytest.mark.filterwarnings(IGNORED)
def test_a_device_without_float64_leaves_the_solve_to_the_cpu(
    family: str, pristine: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = pristine(family), replace(QUICK, robust=1)  # type: ignore[operator]
    here = edit_model(model, ["cat", "monet"], config=config, device="cpu").edit
    monkeypatch.setenv("REALERA_EDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embeddings, "SINGLE_PRECISION", (DEVICE,))
    with Elsewhere(torch.float64):
        there = edit_model(model, ["cat", "monet"], config=config, device=DEVICE).edit
    assert torch.equal(there.cross.factor.delta(), here.cross.factor.delta())
    assert torch.equal(there.residual, here.residual)


@pytest.fixture
def moved(family: str, pristine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pipeline whose networks are there. A check for missing weights takes the stand-in for them."""
    monkeypatch.setattr(pipeline, "_check_present", lambda *_: None)
    pipe = DiffusionPipeline.from_pretrained(pristine(family))
    with Elsewhere():
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(DEVICE)
        yield pipe


def test_a_pipeline_there_is_edited_applied_to_and_restored(
    moved: Any, family: str, pristine: Any, tmp_path: Path
) -> None:
    before = {name: weight.cpu() for name, weight in moved.unet.state_dict().items()}
    edit_model(pristine(family), ["cat"], config=replace(QUICK, robust=1), device="cpu").save(tmp_path / "cpu")
    wanted = load_file(tmp_path / "cpu" / UNET)
    result = edit_model(moved, ["cat"], config=replace(QUICK, robust=1))
    assert all(weight.device.type == DEVICE for weight in moved.unet.state_dict().values())
    assert all(torch.equal(weight.cpu(), wanted[name]) for name, weight in moved.unet.state_dict().items())
    assert result.geometry(weighted=True).names
    result.undo()
    assert all(torch.equal(weight.cpu(), before[name]) for name, weight in moved.unet.state_dict().items())
    result.save_edit(tmp_path / "cat.safetensors")
    applied = apply_edit(tmp_path / "cat.safetensors", moved)
    assert all(torch.equal(weight.cpu(), wanted[name]) for name, weight in moved.unet.state_dict().items())
    applied.undo()


def test_states_there_are_edited_on_their_way(moved: Any, family: str, pristine: Any, tmp_path: Path) -> None:
    made(pristine(family), "cat").save(tmp_path / "cat.safetensors")
    where = {"device": torch.device(DEVICE), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        plain = moved.encode_prompt("a cat", **where)[0]
        with wrap_text_encoder(moved, tmp_path / "cat.safetensors"):
            edited = moved.encode_prompt("a cat", **where)[0]
    assert edited.device.type == DEVICE
    assert not torch.equal(edited.cpu(), plain.cpu())


def test_an_attack_there_is_that_of_the_cpu(family: str, pristine: Any, tmp_path: Path) -> None:
    model = pristine(family)
    edit_model(model, ["cat"], config=QUICK, device="cpu").save(tmp_path / "edited")
    options: dict[str, Any] = {"budgets": (0.1, 0.5), "words": 40}
    [here] = attack_model(model, tmp_path / "edited", "cat", **options, device="cpu")
    with Elsewhere():
        [there] = attack_model(model, tmp_path / "edited", "cat", **options, device=DEVICE)
    assert there == here
