"""On a CUDA device: the edit is that of the CPU, up to rounding, and everything else works there as well.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import DENSE, QUICK, UNET, gap, run, tree, weights
from safetensors.torch import load_file

from realera_edit import EditConfig, EvaluationConfig, apply_edit, edit_model, evaluate
from realera_edit.apply import apply_factor
from realera_edit.embeddings import PromptEncoder
from realera_edit.pipeline import LoadedPipeline
from realera_edit.probe import Probe
from realera_edit.solve import Factor, residuals, solve
from realera_edit.statistics import Keep, Pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
# float32 text states differ by 1e-6 of their size between the devices; the solve amplifies that by its condition.
CLOSE = 1e-3


@pytest.fixture(autouse=True)
def careless() -> Iterator[None]:
    """TF32 is allowed, as in many scripts that draw: the edit must not use it."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def changes(folder: Path, model: Path) -> dict[str, torch.Tensor]:
    """What an edit added to each weight: closeness of whole weights would say little."""
    before = weights(model)
    return {name: tensor - before[name] for name, tensor in weights(folder).items()}


@pytest.mark.filterwarnings("ignore:.*keep more than was asked")
@pytest.mark.parametrize("config", [QUICK, DENSE], ids=["low-rank", "dense"])
def test_an_edited_folder_is_that_of_the_cpu(config: EditConfig, family: str, model: Path, tmp_path: Path) -> None:
    for device in ("cpu", GPU):
        result = edit_model(model, ["cat", "monet"], config=config, device=device)
        result.save(tmp_path / device)
        assert result.edit.cross.factor.left.device.type == device
    assert gap(changes(tmp_path / GPU, model), changes(tmp_path / "cpu", model)) < CLOSE


def test_the_same_bytes_twice(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        edit_model(model, ["cat"], config=DENSE, device=GPU).save(tmp_path / name)
    one, two = (load_file(tmp_path / name / UNET) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_pipeline_is_edited_where_it_is_and_restored(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(GPU)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    result = edit_model(pipe, ["cat"], config=QUICK)
    changed = {name for name, weight in pipe.unet.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {p.name for p in result.source.projections}
    assert all(weight.device.type == GPU and weight.dtype == dtype for weight in pipe.unet.state_dict().values())
    result.save(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / UNET)
    assert all(torch.equal(weight.cpu(), stored[name]) for name, weight in pipe.unet.state_dict().items())
    result.undo()
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


def test_an_edit_file_made_there_fits_the_cpu(sd1: Path, tmp_path: Path) -> None:
    result = edit_model(sd1, ["cat"], config=QUICK, device=GPU)
    result.save(tmp_path / "whole")
    result.save_edit(tmp_path / "cat.safetensors")
    apply_edit(tmp_path / "cat.safetensors", sd1).save(tmp_path / "applied")
    assert gap(changes(tmp_path / "applied", sd1), changes(tmp_path / "whole", sd1)) < 1e-6


def test_robust_rounds_are_those_of_the_cpu(sd1: Path, tmp_path: Path) -> None:
    for device in ("cpu", GPU):
        edit_model(sd1, ["cat"], config=EditConfig(prior_words=60, robust=2), device=device).save(tmp_path / device)
    assert gap(changes(tmp_path / GPU, sd1), changes(tmp_path / "cpu", sd1)) < CLOSE


def problem(device: str) -> tuple[Pairs, Keep]:
    """Twenty concepts of six rows in a space of width 96, of one seed on every device."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    group = torch.arange(20, device=device).repeat_interleave(6)
    none = torch.zeros(120, dtype=torch.bool, device=device)
    share = torch.full((120,), 1 / 6, dtype=torch.float64, device=device)
    pairs = Pairs(normal(120, 96), normal(120, 96), share, group, none)
    kept = normal(300, 96)
    return pairs, Keep(kept.T @ kept, None, normal(4, 96))


def test_the_solve_is_in_float64_there_too() -> None:
    wanted = torch.full((20,), 0.3, dtype=torch.float64)
    found = {d: solve(*problem(d), residual=wanted.to(d), ridge=1e-3) for d in ("cpu", GPU)}
    one, two = (found[d].factor.delta().cpu() for d in ("cpu", GPU))
    assert float((one - two).norm() / one.norm()) < 1e-10
    pairs, keep = problem(GPU)
    assert residuals(found[GPU].factor, pairs).device.type == GPU
    assert float((found[GPU].factor.map(keep.fixed) - keep.fixed).norm() / keep.fixed.norm()) < 1e-10


def test_weights_are_multiplied_in_full_float32() -> None:
    """With TF32 the product would be off by 3e-4."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(s, generator=generator, dtype=torch.float64).to(GPU) for s in ((256, 16), (16, 256)))
    weight = torch.randn(512, 256, generator=generator).to(GPU)
    [new] = apply_factor(Factor(left, right), [weight])
    exact = weight.double() + weight.double() @ left @ right
    assert float((new - exact).norm() / exact.norm()) < 1e-6
    rough = weight + weight @ left.float() @ right.float()
    assert float((rough - exact).norm() / exact.norm()) > 1e-5  # else this card has no TF32 to be kept off


def test_text_states_are_those_of_the_cpu(model: Path) -> None:
    from realera_edit.checkpoint import open_checkpoint

    prompts = ["cat", "a photo of a cat on a table", "van gogh", ""]

    def states(device: str) -> list[Any]:
        encoder: PromptEncoder = open_checkpoint(model, device=device).encoder
        return encoder.encode(prompts, 2)

    for here, there in zip(states("cpu"), states(GPU), strict=True):
        assert float((here.states - there.states.cpu()).norm() / here.states.norm()) < 1e-5
        if here.pooled is not None and there.pooled is not None:
            assert float((here.pooled - there.pooled.cpu()).norm() / here.pooled.norm()) < 1e-5


def test_the_command_line_takes_a_device(sd1: Path, tmp_path: Path) -> None:
    before = tree(sd1)
    for device in ("cpu", GPU):
        done = run("erase", sd1, "cat", "--device", device, "--output", tmp_path / device, "--prior-words", "60")
        assert done.exit_code == 0, done.output
    assert gap(changes(tmp_path / GPU, sd1), changes(tmp_path / "cpu", sd1)) < CLOSE
    assert tree(sd1) == before
    assert run("erase", sd1, "cat", "--device", "cuda:77", "--output", tmp_path / "none").exit_code != 0
    assert not (tmp_path / "none").exists()


def test_the_model_that_ships_is_edited_and_evaluated_there(tmp_path: Path) -> None:
    """The whole way: erase, draw, judge. The concept goes, the others stay."""
    result = edit_model("emoji", ["cat face"], preserve=["dog face"], device=GPU)
    result.save(tmp_path / "no-cat")
    config = EvaluationConfig(seeds=(0,), steps=8)
    found = evaluate("emoji", tmp_path / "no-cat", ["cat face"], out=tmp_path / "report", config=config, device=GPU)
    assert found.data["settings"]["device"] == GPU
    (gone, before), (others, _) = found.rates["acc_e"], found.rates["acc_s"]
    assert before.value >= 0.8
    assert gone.value <= 0.25
    assert others.value >= 0.8


def test_the_denoiser_answers_there_as_on_the_cpu(model: Path) -> None:
    pipe, answers = DiffusionPipeline.from_pretrained(model), []
    for device in ("cpu", GPU):
        pipe.to(device)
        answers.append(Probe.of(pipe).answers(LoadedPipeline(pipe).encoder, ["cat", "dog", "a red house"]))
    here, there = answers
    assert there.device.type == "cpu"
    assert float((here * there).sum(1).min()) > 0.99
    assert float((here[0] * there[1]).sum()) < 0.99  # control: another word's
