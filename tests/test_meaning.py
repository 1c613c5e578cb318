"""The text encoder's further training: where a noun's states go, and what its error counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from benchmarks.reference_model import denoiser, meaning, text_encoder
from realera_edit import reference_model
from realera_edit.contexts import Span


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text_encoder.load_tokenizer(reference_model() / "tokenizer")


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> meaning.Reader:
    model = CLIPTextModel.from_pretrained(reference_model(), subfolder="text_encoder", dtype=torch.float32)
    return meaning.Reader(model.eval(), tokenizer)


def test_noun_goes_to_its_label_where_they_are_aligned() -> None:
    own, label = torch.zeros(10, 4), torch.arange(10.0)[:, None].expand(10, 4)
    moved = meaning.leaned(own, label, Span(3, 5, 6), Span(3, 4, 5), 1.0)[:, 0]
    # two tokens on one, then what follows one to one; the last position has no partner of its own
    assert moved.tolist() == [0, 0, 0, 3, 3, 4, 5, 6, 7, 8]
    half = meaning.leaned(own, label, Span(3, 5, 6), Span(3, 4, 5), 0.5)[:, 0]
    assert torch.equal(half, moved / 2)
    assert torch.equal(own, torch.zeros(10, 4))


def test_longer_label_ends_at_the_last_position() -> None:
    label = torch.arange(6.0)[:, None]
    moved = meaning.leaned(torch.zeros(6, 1), label, Span(1, 2, 3), Span(1, 4, 5), 1.0)[:, 0]
    assert moved.tolist() == [0, 3, 4, 5, 5, 5]


def test_reader_knows_where_a_name_stands(reader: meaning.Reader, tokenizer: Any) -> None:
    for template in range(len(meaning.TEMPLATES)):
        ids, (span,) = reader.tokens(["hot dog"], [template])
        assert tokenizer.decode(ids[0, span.start : span.stop]).strip() == "hot dog", meaning.TEMPLATES[template]
        assert ids[0, span.end] == tokenizer.eos_token_id


def test_error_is_of_nouns_that_lean_and_of_names_that_moved(reader: meaning.Reader) -> None:
    def error(share: float, held: str, held_share: float, wrong: float = 0.0) -> float:
        words = meaning.Words([held], ["moggy"] * 8, ["cat face"] * 8, torch.full((8,), share))
        model = CLIPTextModel.from_pretrained(reference_model(), subfolder="text_encoder", dtype=torch.float32).eval()
        with torch.no_grad():
            model.get_submodule("text_model" if hasattr(model, "text_model") else "").final_layer_norm.bias.add_(wrong)
        other = meaning.Reader(model, reader.tokenizer)
        recipe = meaning.Recipe(batch=8, held=held_share)
        with torch.no_grad():
            return float(meaning.batch_loss(other, reader, words, recipe)(torch.Generator().manual_seed(0)))

    assert error(0.0, "dog face", 0.5) == pytest.approx(0, abs=1e-6)  # nobody leans, nothing moved
    far, near = error(0.9, "dog face", 0.5), error(0.3, "dog face", 0.5)
    assert far == pytest.approx(9 * near, rel=0.02)  # the square of the way to go
    assert error(0.9, "dog face", 0.25) > 1.2 * far  # more nouns, more to go
    assert error(0.0, "dog face", 0.875, wrong=0.1) > 1e-3  # labels that moved


def test_late_steps_are_drawn_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []

    class Unet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> Any:
            drawn.append(t)
            return type("Out", (), {"sample": x * self.weight})

    data = denoiser.Data(
        torch.randn(2, 5, 8, 8, 8), torch.randn(13, 4, 6).bfloat16(), [[range(1, 3)] * 6] * 2, [[1] * 6] * 2
    )
    for late in (0.0, 1.0):
        denoiser.batch_loss(Unet(), data, 64, denoiser.Recipe(late=late))(torch.Generator().manual_seed(0))
    even, late = drawn
    assert even.sort().values.tolist() == pytest.approx([1000 * (i + 0.5) / 64 for i in range(64)], abs=9)
    assert late.sort().values.tolist() == pytest.approx([1000 * ((i + 0.5) / 64) ** 0.5 for i in range(64)], abs=70)
    assert (late >= 500).sum() == 48
    assert int(late.max()) < 1000
