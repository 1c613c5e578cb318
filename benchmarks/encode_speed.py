"""Text encoding: `PromptEncoder` beside one prompt at a time at full length, with the same model and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.clip_tokenizer import invented_names
from benchmarks.common import largest, median, timed
from benchmarks.layer_loop import encode_one_by_one
from benchmarks.shapes import text_encoders
from realera_edit.config import EditConfig
from realera_edit.contexts import CONTEXTS, fill
from realera_edit.embeddings import Encoded, PromptEncoder

KIND = "general"
PADDING = EditConfig().padding
# Seconds that one side may take in all, before rounds or prompts are left out.
LIMIT = 60.0
WARM_UP = ("warm up", "warm up the encoder once more")


def prompts_of(concepts: int) -> list[str]:
    """Every distinct prompt that an edit of so many concepts encodes: each name, and the target, in all contexts."""
    names = [*invented_names(concepts), "object"]
    return list(dict.fromkeys(fill(template, name).prompt for name in names for template in CONTEXTS[KIND]))


def load_encoders(shape: str, device: str, seed: int) -> list[tuple[Any, Any]]:
    """(tokenizer, text model) with random weights in float32 on the device."""
    return [(tokenizer, model.to(device)) for tokenizer, model in text_encoders(shape, seed=seed)]


def fresh(pairs: Sequence[tuple[Any, Any]]) -> PromptEncoder:
    """A `PromptEncoder` that has encoded nothing yet."""
    return PromptEncoder(tuple(pairs), penultimate=len(pairs) > 1)


def end_states(pairs: Sequence[tuple[Any, Any]], prompts: Sequence[str]) -> Tensor:
    """The end token's state [prompts, d] of each prompt."""
    return torch.stack([e.states[len(e.ids) - 1] for e in fresh(pairs).encode(prompts)])


def compare(pairs: Sequence[tuple[Any, Any]], concepts: int, device: str, repeat: int) -> dict[str, Any]:
    """Time both ways in alternation, and compare their states.

    Where one by one would take longer than `LIMIT`, an evenly spread part of the prompts is timed and scaled; the
    record says how many.
    """
    prompts, full = prompts_of(concepts), len(pairs) > 1
    fresh(pairs).encode(WARM_UP, PADDING)
    encode_one_by_one(pairs, WARM_UP, full)
    each, _ = timed(lambda: encode_one_by_one(pairs, WARM_UP, full), device)
    count = max(8, min(len(prompts), int(LIMIT / (each / len(WARM_UP)))))
    chosen = prompts[:: max(1, -(-len(prompts) // count))]
    ours: list[float] = []
    slow: list[float] = []
    differences: list[float] = []
    encoded: dict[str, Encoded] = {}
    rounds = repeat
    while len(ours) < rounds:
        seconds, found = timed(lambda: fresh(pairs).encode(prompts, PADDING), device)
        ours.append(seconds)
        rounds = max(1, min(repeat, int(LIMIT / seconds)))
        encoded = encoded or dict(zip(prompts, found, strict=True))
        part = chosen[len(ours) - 1 :: rounds]
        seconds, states = timed(lambda part=part: encode_one_by_one(pairs, part, full), device)  # type: ignore[misc]
        slow.append(seconds / len(part))
        differences += [_difference(encoded[p], s) for p, s in zip(part, states, strict=True)]
    seconds, plain = median(ours), median(slow) * len(prompts)
    return {
        "seconds": {"encode_ours": seconds, "encode_loop": plain},
        "ratio_encoding": plain / seconds,
        # a loop that encodes every concept beside its target, as UCE's program does, meets each target that often
        "encode_loop_target_each_time": plain / len(prompts) * 2 * concepts * len(CONTEXTS[KIND]),
        "encoding_difference": largest(differences),
        "prompts": len(prompts),
        "prompts_loop_timed": len(chosen),
        "tokens_per_prompt": sum(len(e.ids) for e in encoded.values()) / len(prompts),
        "encoding_rounds": len(ours),
    }


def _difference(ours: Encoded, full: Tensor) -> float:
    """The largest |a - b| / |b| over the positions that both have."""
    other = full[: len(ours.states)]
    return float(((ours.states - other).norm(dim=1) / other.norm(dim=1)).max())
