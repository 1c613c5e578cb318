"""The denoiser is asked what draws alike: the right words come back, and the U-Net that was asked is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from elsewhere import DEVICE, Elsewhere
from torch import Tensor

from realera_edit.checkpoint import open_checkpoint
from realera_edit.embeddings import PromptEncoder
from realera_edit.errors import CheckpointError
from realera_edit.pipeline import LoadedPipeline
from realera_edit.probe import VOCABULARY, Probe, WordFinder
from realera_edit.vocabulary import load_ends, whole_words


@pytest.fixture
def encoder(pristine: Callable[..., Path]) -> PromptEncoder:
    return open_checkpoint(pristine("sd1")).encoder


class Drawer(torch.nn.Module):
    """A U-Net whose output is `answer` of the text states [n, positions, d], and of nothing else; keeps its calls."""

    def __init__(self, answer: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=channels, out_channels=4, sample_size=(6, 8))
        self.answer = answer
        self.calls: list[tuple[Tensor, int]] = []

    def forward(self, latents: Tensor, step: int, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.calls.append((latents, step))
        return (self.answer(encoder_hidden_states).reshape(len(latents), -1, 6, 8),)


def alike(encoder: PromptEncoder, *pairs: tuple[str, str]) -> Probe:
    """A denoiser to which the two of each pair are the same; what it answers to others has nothing in common."""

    def whole(words: list[str]) -> Tensor:
        return torch.stack([e.states.flatten() for e in encoder.encode(words, encoder.max_length)])

    one = whole([a for a, _ in pairs])
    gaps = torch.linalg.qr((one - whole([b for _, b in pairs])).T.double()).Q.float()
    mixed = torch.randn(one.shape[1], 192, generator=torch.Generator().manual_seed(3))
    mixed -= gaps @ (gaps.T @ mixed)
    return Probe(Drawer(lambda given: (given.flatten(1) @ mixed.to(given.device)).sin()))


def by_text(encoder: PromptEncoder, name: str) -> list[str]:
    """The vocabulary, nearest to `name` by centred end state first."""
    words = whole_words(encoder.pairs[0][0], VOCABULARY)
    ends = load_ends(encoder, words, encoder.fingerprint())
    unit = torch.nn.functional.normalize(ends - ends.mean(0), dim=1)
    return [words[i] for i in (unit @ unit[words.index(name)]).argsort(descending=True).tolist()]


def test_the_word_that_is_drawn_alike_is_found_and_no_other(encoder: PromptEncoder) -> None:
    finder = WordFinder(alike(encoder, ("cat", "lamp"), ("horse", "tower")), encoder, 1000)
    assert [set(finder(name)) - {name} for name in ("cat", "horse", "dog")] == [{"lamp"}, {"tower"}, set()]
    # control: where no two of these words are alike, none is found
    finder = WordFinder(alike(encoder, ("king", "queen")), encoder, 1000)
    assert [set(finder(name)) - {name} for name in ("cat", "horse", "dog")] == [set(), set(), set()]


def test_only_the_nearest_are_asked_about_and_the_furthest_of_them_comes_first(encoder: PromptEncoder) -> None:
    probe = alike(encoder, ("cat", "lamp"), ("cat", "tower"))
    order = by_text(encoder, "cat")
    near, far = sorted(("lamp", "tower"), key=order.index)
    assert WordFinder(probe, encoder, 1000)("cat") == [far, near, "cat"]
    assert WordFinder(probe, encoder, order.index(far))("cat") == [near, "cat"]
    none = WordFinder(probe, encoder, 0)
    assert none("cat") == []
    assert "_vocabulary" not in vars(none)  # thousands of words were not encoded for nothing


def test_every_prompt_is_asked_on_one_noise_at_one_step(encoder: PromptEncoder) -> None:
    probe, done = alike(encoder, ("cat", "lamp")), []
    answers = probe.answers(encoder, ["cat", "dog", "lamp"], done.append)
    torch.testing.assert_close(answers.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(answers[0], answers[2], atol=1e-3, rtol=0)
    assert done == [3]
    assert {step for _, step in probe.unet.calls} == {850}
    assert all(torch.equal(row, probe.unet.calls[0][0][0]) for latents, _ in probe.unet.calls for row in latents)
    assert probe.answers(encoder, []).shape[0] == 0
    assert not probe.answers(encoder, [""]).any()  # nothing is added by nothing


def test_what_is_asked_elsewhere_is_answered_alike(encoder: PromptEncoder, pristine: Callable[..., Path]) -> None:
    probe = alike(encoder, ("cat", "lamp"))
    here = probe.answers(encoder, ["cat", "dog", "lamp"])
    with Elsewhere():
        probe.unet.to(DEVICE)
        there = probe.answers(open_checkpoint(pristine("sd1"), device=DEVICE).encoder, ["cat", "dog", "lamp"])
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, here, atol=1e-3, rtol=0)


def test_an_inpainting_model_is_asked_with_a_mask_of_ones(encoder: PromptEncoder) -> None:
    drawer = Drawer(lambda given: given.flatten(1)[:, :192], channels=9)
    Probe(drawer).answers(encoder, ["cat"])
    [latents] = drawer.calls[-1][0]
    assert latents.shape == (9, 6, 8)
    assert torch.equal(latents[4:5], torch.ones(1, 6, 8))
    assert not latents[5:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_asking_a_pipeline_leaves_no_trace(family: str, pristine: Any, dtype: torch.dtype) -> None:
    """And gives the same answers twice, to the bit."""
    pipe = DiffusionPipeline.from_pretrained(pristine(family, dtype), torch_dtype=dtype)
    pipe.unet.train()
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    source, probe = LoadedPipeline(pipe), Probe.of(pipe)
    found = probe.answers(source.encoder, ["cat", "dog", "a red house"])
    assert torch.equal(found, probe.answers(source.encoder, ["cat", "dog", "a red house"]))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert pipe.unet.training
    after = pipe.unet.state_dict()
    assert all(
        torch.equal(weight, after[name]) and weight.dtype == after[name].dtype for name, weight in before.items()
    )


def test_a_damaged_u_net_is_said(sd1: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1)
    with torch.no_grad():
        pipe.unet.conv_out.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="answers with NaN"):
        Probe.of(pipe).answers(LoadedPipeline(pipe).encoder, ["cat"])


def test_other_words_of_the_real_model_are_found(emoji: Path) -> None:
    """And few of the many that are as near in the text space, and draw something else."""
    pipe = DiffusionPipeline.from_pretrained(emoji)
    finder = WordFinder(Probe.of(pipe), LoadedPipeline(pipe).encoder, 64)
    assert "toad" in finder("frog")
    assert "gasoline" in finder("fuel pump")
    assert all(len(finder(name)) < 20 for name in ("frog", "fuel pump"))
