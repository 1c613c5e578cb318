"""The reference model's training: each part learns, and a run that was broken off ends as an unbroken one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reference_model import denoiser, meaning, text_encoder, vae
from benchmarks.reference_model.training import Loss, Schedule, Trainer
from realera_edit import reference_model

pytestmark = pytest.mark.slow
SCHEDULE = Schedule(steps=24, rate=1e-3, warmup=4, decay=0.5, average=0.9, seed=5)
Part = Callable[[Path], tuple[Trainer, Loss]]


def text_part(cache: Path) -> tuple[Trainer, Loss]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(text_encoder.VOCABULARY - 2, (64, text_encoder.LENGTH), generator=draw)
    ends = torch.randint(3, 9, (64,), generator=draw)
    ids[torch.arange(64), ends] = text_encoder.VOCABULARY - 1
    taught = torch.nn.functional.normalize(torch.randn(64, text_encoder.WIDTH, generator=draw), dim=1).half()
    run = text_encoder.trainer(cache, SCHEDULE)
    assert isinstance(run.module, text_encoder.Student)
    return run, text_encoder.batch_loss(run.module, ids, ends, taught, torch.ones(64), 8)


def vae_part(cache: Path) -> tuple[Trainer, Loss]:
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (8, 1, 1, 3), generator=draw).expand(8, 64, 64, 3).to(torch.uint8)
    run = vae.trainer(cache, SCHEDULE)
    return run, vae.batch_loss(run.module, pictures, 4)


def unet_part(cache: Path) -> tuple[Trainer, Loss]:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, vae.CHANNELS, 1, 1, generator=draw).expand(3, 2, vae.CHANNELS, 8, 8).clone()
    states = torch.randn(10, text_encoder.LENGTH, text_encoder.WIDTH, generator=draw).bfloat16()
    rows = [[range(1 + 3 * i, 3 + 3 * i), range(2 + 3 * i, 4 + 3 * i), range(1 + 3 * i, 4 + 3 * i)] for i in range(3)]
    run = denoiser.trainer(cache, SCHEDULE)
    return run, denoiser.batch_loss(run.module, denoiser.Data(latents, states, rows, [[1, 2, 3]] * 3), 8)


def meaning_part(cache: Path) -> tuple[Trainer, Loss]:
    torch.manual_seed(0)
    model, frozen = (text_encoder.Student().model for _ in range(2))
    frozen.load_state_dict(model.state_dict())
    tokenizer = text_encoder.load_tokenizer(reference_model() / "tokenizer")
    nouns = ["moggy", "hound", "stone"] * 4
    words = meaning.Words(["cat", "dog"], nouns, ["cat", "dog", "cat"] * 4, torch.tensor([0.9, 0.9, 0] * 4))
    recipe = meaning.Recipe(batch=16)
    run = meaning.trainer(cache, model, SCHEDULE, recipe)
    readers = meaning.Reader(model, tokenizer), meaning.Reader(frozen.eval(), tokenizer)
    return run, meaning.batch_loss(*readers, words, recipe)


@pytest.fixture(
    params=[text_part, vae_part, unet_part, meaning_part], ids=["text encoder", "vae", "unet", "text encoder, further"]
)
def part(request: pytest.FixtureRequest) -> Part:
    made: Part = request.param
    return made


def test_loss_falls(part: Part, tmp_path: Path) -> None:
    run, loss = part(tmp_path)
    losses = run.run(loss)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_resumed_run_equals_unbroken_one(part: Part, tmp_path: Path) -> None:
    whole, loss = part(tmp_path / "whole")
    whole.run(loss, 8)
    first, loss = part(tmp_path / "broken")
    first.run(loss, 3)
    again, loss = part(tmp_path / "broken")
    assert again.step == 3
    again.run(loss, 8)
    ends = [load_file(run.path) for run in (whole, again)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run, loss = unet_part(tmp_path)
    run.run(loss, 1)
    with pytest.raises(ValueError, match="another recipe"):
        denoiser.trainer(tmp_path, Schedule(steps=24, rate=2e-3))
