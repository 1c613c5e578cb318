"""The keep side: prior, preserved concepts, the rim beyond each neighbourhood, and the states that never move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import EditConfig
from .contexts import CONTEXTS, fill, is_name
from .embeddings import PromptEncoder
from .statistics import Keep, second_moment
from .vocabulary import Prior, prior_moments

# A preserved entry is held in these contexts, at every position after the start token.
PRESERVE_CONTEXTS = 3
RIM_WEIGHT = 1.0


@dataclass(frozen=True)
class Anchors:
    """What is kept in each text space, and the states [n, d] of each preserved entry for the drift report."""

    cross: Keep
    pooled: Keep | None
    preserved: tuple[tuple[str, Tensor], ...]


def build_anchors(
    encoder: PromptEncoder,
    prior: Prior | None,
    preserve: Mapping[str, float],
    rim: Sequence[str],
    erased_words: Sequence[str],
    config: EditConfig,
) -> Anchors:
    """Statistics of everything that stays.

    `erased_words`: entries of the prior that go with a concept; their share is taken out of the prior, or it would
    pull back what is erased. `rim`: words just outside a neighbourhood (beyond-concept anchors, weight
    `RIM_WEIGHT`). `preserve`: names or prompts, and the weight of each. One weight unit is one word of the prior.
    """
    templates = CONTEXTS[config.kind][:PRESERVE_CONTEXTS]
    entries = [(_held_prompts(name, templates), weight) for name, weight in preserve.items()]
    # the prior holds each word of the rim in a context already; once more by itself is enough
    entries += [([word], RIM_WEIGHT) for word in rim]
    encoded = iter(encoder.encode([p for prompts, _ in entries for p in prompts], config.padding, label="preserved"))
    rows, tops, held = [], [], []
    for prompts, weight in entries:
        mine = [next(encoded) for _ in prompts]
        states = torch.cat([e.states[1:] for e in mine])
        rows.append(states * (weight / len(states)) ** 0.5)
        tops += [e.pooled * (weight / len(mine)) ** 0.5 for e in mine if e.pooled is not None]
        held.append(states)
    empty = encoder.encode([""], encoder.max_length)[0]
    taken = prior_moments(encoder, erased_words, config.padding) if prior is not None and erased_words else None
    cross = _keep(rows, empty.states, None if prior is None else prior.cross, None if taken is None else taken[0])
    pooled = None
    if empty.pooled is not None and config.pooled:
        second = None if prior is None else prior.pooled
        pooled = _keep([t[None] for t in tops], empty.pooled[None], second, None if taken is None else taken[1])
    return Anchors(cross, pooled, tuple(zip(preserve, held, strict=False)))


def _held_prompts(entry: str, templates: Sequence[str]) -> list[str]:
    """A name in each template; a whole prompt as it is."""
    return [fill(t, entry).prompt for t in templates] if is_name(entry) else [entry]


def _keep(rows: Sequence[Tensor], fixed: Tensor, second: Tensor | None, taken: Tensor | None) -> Keep:
    stacked = torch.cat(list(rows)) if rows else fixed[:0]
    if second is None:
        return Keep(None, stacked.to(torch.float64), fixed)
    second = second.to(fixed.device)
    total = second + second_moment(stacked) if len(stacked) else second.clone()
    return Keep(total if taken is None else total - taken.to(total), None, fixed)
