"""An edit's products do not depend on what the process allows others: TF32, bfloat16 in float32, autocast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import QUICK

from realera_edit import edit_model
from realera_edit.apply import apply_factor
from realera_edit.precision import full_precision
from realera_edit.solve import Factor


@pytest.fixture(params=["legacy", "new"])
def careless(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process that lets float32 products be quick, by the older switch or the newer ones."""
    if request.param == "legacy":
        torch.set_float32_matmul_precision("medium")
    elif not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older switch alone")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.set_float32_matmul_precision("highest")


def switches() -> list[object]:
    return [getattr(part.matmul, "fp32_precision", None) for part in (torch.backends.cuda, torch.backends.mkldnn)]


def test_the_switches_are_full_meanwhile_and_then_as_they_were(careless: None) -> None:
    before, meanwhile = switches(), []

    @full_precision()
    def fails() -> None:
        meanwhile.extend([*switches(), torch.is_autocast_enabled("cpu")])
        raise KeyError

    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(KeyError):
        fails()
    assert set(meanwhile) <= {"ieee", None, False}
    assert switches() == before
    assert before != ["ieee", "ieee"]


def test_the_older_switch_still_answers_afterwards() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            pass
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_are_multiplied_in_float32_within_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).double() for shape in ((64, 8), (8, 64)))
    weight = torch.randn(32, 64, generator=generator)
    [plain] = apply_factor(Factor(left, right), [weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [within] = apply_factor(Factor(left, right), [weight])
    assert torch.equal(plain, within)


def test_an_edit_within_autocast_is_the_same_edit(family: str, model: str) -> None:
    one, two = (DiffusionPipeline.from_pretrained(model) for _ in range(2))
    edit_model(one, ["cat"], config=QUICK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edit_model(two, ["cat"], config=QUICK)
    edited = two.unet.state_dict()
    assert all(torch.equal(weight, edited[name]) for name, weight in one.unet.state_dict().items())
