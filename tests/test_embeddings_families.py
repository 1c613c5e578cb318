"""The states that an edit sees are those that the pipeline feeds to its denoiser, for each family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import QUICK

from realera_edit import edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.embeddings import PromptEncoder
from realera_edit.errors import EncodingError

PROMPTS = ("", "cat", "a photo of a van gogh painting", "一只猫 🐱", "Zürich, naïve café")


def encoder_of(folder: Path) -> PromptEncoder:
    return open_checkpoint(folder).encoder


def pipeline_states(pipe: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the pipeline's own `encode_prompt` gives for one prompt: states [positions, d] and the pooled state."""
    with torch.no_grad():
        out = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return out[0][0], out[2][0] if len(out) == 4 else None


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Greatest distance between rows, relative to the norm of the row of `b`."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("padding", [0, 2, 1000])
def test_states_equal_the_pipelines(family: str, model: Path, padding: int) -> None:
    encoder = encoder_of(model)
    pipe = DiffusionPipeline.from_pretrained(model)
    for prompt, encoded in zip(PROMPTS, encoder.encode(PROMPTS, padding), strict=True):
        states, pooled = pipeline_states(pipe, prompt)
        length = min(len(encoded.ids) + padding, len(states))
        assert encoded.states.shape == (length, states.shape[1])
        assert relative(encoded.states, states[:length]) <= 1e-5
        assert (encoded.pooled is None) == (pooled is None) == (family != "sdxl")
        if pooled is not None:
            assert relative(encoded.pooled, pooled) <= 1e-5


def test_the_comparison_would_see_the_wrong_layer_or_padding(family: str, model: Path) -> None:
    """Control: the other hidden state, or another padding token, is far beyond the tolerance."""
    pipe = DiffusionPipeline.from_pretrained(model)
    encoder = encoder_of(model)
    states, _ = pipeline_states(pipe, "cat")
    flipped = PromptEncoder(encoder.pairs, penultimate=not encoder.penultimate).encode(["cat"])[0].states
    assert relative(flipped, states[: len(flipped)]) > 1e-2
    tokenizer = encoder.pairs[-1][0]
    tokenizer.pad_token = "cat</w>"
    assert relative(encoder.encode(["dog"], 2)[0].states, pipeline_states(pipe, "dog")[0][:5]) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_an_encoder_that_does_not_attend_to_its_padding(family: str, model: Path) -> None:
    """The pipelines of 1.x and 2.x heed `use_attention_mask`."""
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": True}))
    encoder = encoder_of(model)
    assert encoder.pairs[0][1].config.use_attention_mask is True
    pipe = DiffusionPipeline.from_pretrained(model)
    for prompt, encoded in zip(PROMPTS, encoder.encode(PROMPTS, 3), strict=True):
        states, _ = pipeline_states(pipe, prompt)
        assert relative(encoded.states, states[: len(encoded.states)]) <= 1e-5
    # control: the mask makes a difference
    masked = encoder.encode(["cat"], 3)[0].states
    encoder.pairs[0][1].config.use_attention_mask = False
    assert relative(PromptEncoder(encoder.pairs).encode(["cat"], 3)[0].states, masked) > 1e-2


def test_half_precision_weights_are_encoded_in_the_asked_precision(tiny: Any) -> None:
    folder = tiny("sd2", torch.bfloat16)
    wide = open_checkpoint(folder).encoder.encode(["cat"])[0].states
    narrow = open_checkpoint(folder, dtype=torch.bfloat16).encoder.encode(["cat"])[0].states
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert relative(wide, pipeline_states(pipe, "cat")[0][: len(wide)]) <= 1e-5
    assert 1e-5 < relative(narrow, wide) < 0.1


def test_states_of_the_real_model(emoji: Path) -> None:
    encoder = encoder_of(emoji)
    pipe = DiffusionPipeline.from_pretrained(emoji, torch_dtype=torch.float32)
    for prompt, encoded in zip(PROMPTS[:3], encoder.encode(PROMPTS[:3], 3), strict=True):
        assert relative(encoded.states, pipeline_states(pipe, prompt)[0][: len(encoded.states)]) <= 1e-5


def test_same_states_alone_in_a_batch_and_twice(model: Path) -> None:
    encoder, alone = encoder_of(model), encoder_of(model)
    together = encoder.encode([*PROMPTS, *PROMPTS], 2)
    for prompt, first, second in zip(PROMPTS, together, together[len(PROMPTS) :], strict=False):
        assert first is second
        assert relative(first.states, alone.encode([prompt], 2)[0].states) <= 1e-5


@pytest.mark.parametrize("name", ["猫", "🐱", "梵高 painting", "👩‍🚀", "ß", "Nguyễn"])
def test_names_beyond_ascii_are_erased(name: str, sd1: Path, tmp_path: Path) -> None:
    config = replace(QUICK, overshoot=0, contexts=("{}", "a photo of {}"))
    result = edit_model(sd1, [name], target="object", config=config)
    result.save(tmp_path / "out")
    assert result.to_dict()["concepts"][0]["name"] == name
    assert float(result.edit.residual[0]) == pytest.approx(0.2, abs=0.05)


def test_a_prompt_beyond_the_encoder_is_an_error(model: Path) -> None:
    encoder = encoder_of(model)
    room = encoder.max_length - 2
    assert len(encoder.tokenize(["cat " * room])[0]) == encoder.max_length
    with pytest.raises(EncodingError, match=rf"{room + 3} tokens long, the text encoder reads {room + 2}.*Shorten"):
        encoder.tokenize(["cat " * (room + 1)])


def test_a_name_of_500_words_is_an_error_of_one_line(model: Path) -> None:
    with pytest.raises(EncodingError, match="tokens long") as caught:
        edit_model(model, ["cat " * 500], target="object", config=QUICK)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_an_end_token_inside_a_name_is_an_error(sd1: Path) -> None:
    with pytest.raises(EncodingError, match="cannot represent"):
        edit_model(sd1, ["cat <|endoftext|> dog"], target="object", config=QUICK)


def test_tokenizers_that_disagree_are_an_error(sdxl: Path) -> None:
    vocabulary = sdxl / "tokenizer_2" / "merges.txt"
    text = vocabulary.read_text(encoding="utf-8")
    vocabulary.write_text(text.replace("ca t</w>\n", ""), encoding="utf-8")
    with pytest.raises(EncodingError, match="split the same text differently"):
        edit_model(sdxl, ["cat"], config=QUICK)


def test_an_encoder_that_masks_its_padding(sd1: Path) -> None:
    """`use_attention_mask`: padding is not attended to, here and in the pipeline."""
    pipe = DiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    plain, _ = pipeline_states(pipe, "a cat")
    pipe.text_encoder.config.use_attention_mask = True
    encoder = PromptEncoder(((pipe.tokenizer, pipe.text_encoder),))
    for prompt in ("a cat", "a photo of a lion on the table"):
        whole, _ = pipeline_states(pipe, prompt)
        found = encoder.encode([prompt], 3)[0].states
        assert relative(found, whole[: len(found)]) < 1e-5
    masked, _ = pipeline_states(pipe, "a cat")
    assert relative(masked, plain) > 1e-3
