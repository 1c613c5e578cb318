"""Textual inversion: a learned word fits the pictures, is read as diffusers reads it, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from realera_edit.errors import CheckpointError, ConfigError, EncodingError
from realera_edit.inversion import invert, start_token, word

START = "cat"


@pytest.fixture
def pipe(sd1: Path) -> Any:
    made = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pictures(pipe: Any) -> torch.Tensor:
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return torch.randint(256, (2, size, size, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def states(pipe: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    return found


def test_a_word_is_learned_and_the_pipeline_stays(pipe: Any, pictures: torch.Tensor) -> None:
    pipe.unet.train()
    before = {
        name: value.clone() for part in (pipe.unet, pipe.text_encoder) for name, value in part.state_dict().items()
    }
    found = invert(pipe, pictures, start=START, steps=60, rate=0.05, batch=4)
    again = invert(pipe, pictures, start=START, steps=60, rate=0.05, batch=4)
    assert torch.equal(found.vector, again.vector)
    assert sum(found.losses[-15:]) < sum(found.losses[:15])
    old = pipe.text_encoder.get_input_embeddings().weight[start_token(pipe, START)]
    assert (found.vector - old).norm() > 0.1 * old.norm()
    after = {name: value for part in (pipe.unet, pipe.text_encoder) for name, value in part.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pipe.unet.training
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_an_inpainting_model_learns_a_word_too(pipe: Any, pictures: torch.Tensor) -> None:
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    found = invert(pipe, pictures, start=START, steps=2, rate=0.05, batch=2)
    assert all(map(math.isfinite, found.losses))
    old = pipe.text_encoder.get_input_embeddings().weight[start_token(pipe, START)]
    assert not torch.equal(found.vector, old)


def test_the_word_is_what_diffusers_loads(pipe: Any, pictures: torch.Tensor, tmp_path: Path) -> None:
    prompt = "a picture of a {} on a table"
    plain = states(pipe, prompt.format(START))
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    with word(pipe, START, table[start_token(pipe, START)]):
        assert torch.equal(states(pipe, prompt.format(START)), plain)
    found = invert(pipe, pictures, start=START, steps=3, rate=0.05, batch=2)
    with word(pipe, START, found.vector):
        learned = states(pipe, prompt.format(START))
    assert torch.equal(states(pipe, prompt.format(START)), plain)  # the hook is gone
    assert not torch.allclose(learned, plain, atol=1e-3)
    pipe.load_textual_inversion(str(found.save(tmp_path / "word.safetensors", "<erased>")))
    assert torch.allclose(states(pipe, prompt.format("<erased>")), learned, atol=1e-6)


def test_what_cannot_be_inverted_is_told(pipe: Any, pictures: torch.Tensor) -> None:
    with pytest.raises(EncodingError, match="start from a word that is one token"):
        invert(pipe, pictures, start="cat dog")
    with pytest.raises(ConfigError, match="expected uint8"):
        invert(pipe, pictures.float(), start=START)
    with pytest.raises(ConfigError, match="positive numbers"):
        invert(pipe, pictures, start=START, steps=0)
    pipe.text_encoder_2 = pipe.text_encoder
    with pytest.raises(CheckpointError, match="one text encoder"):
        invert(pipe, pictures, start=START)
