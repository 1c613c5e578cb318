"""The erase side: concept, aliases and neighbours in their contexts, aligned with their targets, as weighted rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .concepts import Concept
from .config import EditConfig
from .contexts import CONTEXTS, Filled, Span, align, fill
from .embeddings import Encoded, PromptEncoder
from .errors import ConceptError
from .neighbours import covariance_rows
from .statistics import Pairs, group_sums
from .targets import AVERAGE, average_targets, average_words
from .vocabulary import Neighbourhood

# A vocabulary word is erased in fewer contexts than a name: there are many of them, and encoding is the cost.
WORD_CONTEXTS = 2


@dataclass(frozen=True)
class Group:
    """One name that is erased: its concept's place in the request, and its role (name, alias or word)."""

    name: str
    concept: int
    role: str


@dataclass(frozen=True)
class ErasePairs:
    """Rows to erase in each text space, and what their groups are. `pooled` is None without a pooled path.

    `places`: for each own row of `cross`, the position that it stands at: "token 1", ... of the name, "after" it, "end"
    or "padding". The rows of one prompt follow one another.
    """

    cross: Pairs
    pooled: Pairs | None
    groups: tuple[Group, ...]
    places: tuple[str, ...] = ()


def concept_contexts(concept: Concept, config: EditConfig) -> tuple[str, ...]:
    """The templates that a concept is erased in: the user's own, else those of its kind."""
    return config.contexts or CONTEXTS[concept.kind or config.kind]


def list_groups(concepts: Sequence[Concept], neighbourhoods: Sequence[Sequence[Neighbourhood]]) -> list[Group]:
    """One group for each name, alias and mined word; a word mined for several names belongs to the first."""
    groups, seen = [], {name.casefold() for concept in concepts for name in concept.names}
    for index, concept in enumerate(concepts):
        groups += [Group(name, index, "alias" if place else "name") for place, name in enumerate(concept.names)]
        for hood in neighbourhoods[index]:
            for word, _ in hood.inside:
                if word.casefold() not in seen:
                    seen.add(word.casefold())
                    groups.append(Group(word, index, "word"))
    return groups


def build_pairs(
    encoder: PromptEncoder,
    concepts: Sequence[Concept],
    groups: Sequence[Group],
    config: EditConfig,
    preserve: Sequence[str] = (),
) -> ErasePairs:
    """Encode every group in its contexts beside its target, and pair the states position by position.

    Raises `ConceptError` for a concept whose states equal those of its target: erasing it would change nothing.
    """
    filled: list[tuple[Filled, Filled]] = []
    owner: list[int] = []
    averaged: dict[int, str] = {}  # place among the filled -> its template
    styles = all((concept.kind or config.kind) == "style" for concept in concepts)
    words = average_words(encoder, {group.name.lower() for group in groups}, preserve, styles)
    for number, group in enumerate(groups):
        concept = concepts[group.concept]
        templates = concept_contexts(concept, config)
        for template in templates[:WORD_CONTEXTS] if group.role == "word" else templates:
            if concept.target == AVERAGE:
                averaged[2 * len(filled) + 1] = template
            target = words[0] if concept.target == AVERAGE else concept.target or ""
            filled.append((fill(template, group.name), fill(template, target)))
            owner.append(number)
    flat = [f for pair in filled for f in pair]
    spans = encoder.spans(flat)
    encoded = encoder.encode([f.prompt for f in flat], config.padding, label="concepts")
    averages = average_targets(encoder, averaged.values(), words, config.padding)
    for where, template in averaged.items():
        encoded[where] = averages[template]
    x, y, group_of = [], [], []
    places: list[str] = []
    for number, here, there, a, b in zip(owner, spans[::2], spans[1::2], encoded[::2], encoded[1::2], strict=True):
        rows = _aligned(here, there, a, b, config.padding)
        x.append(a.states[[i for i, _ in rows]])
        y.append(b.states[[j for _, j in rows]])
        group_of += [number] * len(rows)
        places += [_place(here, i) for i, _ in rows]
    cross = _pairs(torch.cat(x), torch.cat(y), torch.tensor(group_of))
    _check_moved(cross, groups, concepts)
    if config.perturbation == "covariance":
        ends = [
            (a.states[len(a.ids) - 1], b.states[len(b.ids) - 1])
            for a, b in zip(encoded[::2], encoded[1::2], strict=True)
        ]
        cross = _with_covariance(cross, ends, owner, groups, config)
    pooled = None
    if encoded[0].pooled is not None and config.pooled:
        tops = torch.stack([e.pooled for e in encoded if e.pooled is not None])
        pooled = _pairs(tops[::2], tops[1::2], torch.tensor(owner))
    return ErasePairs(cross, pooled, tuple(groups), tuple(places))


def _aligned(here: Span, there: Span, a: Encoded, b: Encoded, padding: int) -> list[tuple[int, int]]:
    return [(i, j) for i, j in align(here, there, padding) if i < len(a.states) and j < len(b.states)]


def _place(span: Span, position: int) -> str:
    if position >= span.end:
        return "end" if position == span.end else "padding"
    return f"token {position - span.start + 1}" if position < span.stop else "after"


def _pairs(x: Tensor, y: Tensor, group: Tensor) -> Pairs:
    group = group.to(x.device)
    weight = 1 / torch.bincount(group)[group].to(torch.float64)
    return Pairs(x, y, weight, group, torch.zeros(len(x), dtype=torch.bool, device=x.device))


def _check_moved(pairs: Pairs, groups: Sequence[Group], concepts: Sequence[Concept]) -> None:
    gap = group_sums((pairs.y - pairs.x).norm(dim=1) / pairs.x.norm(dim=1), pairs.group, len(groups))
    for number in (gap < 1e-4).nonzero().flatten().tolist():
        group = groups[number]
        raise ConceptError(
            f"{group.name!r} and its target {concepts[group.concept].target!r} have the same text states: the edit "
            "would change nothing. Choose another target"
        )


def _with_covariance(
    pairs: Pairs,
    ends: Sequence[tuple[Tensor, Tensor]],
    owner: Sequence[int],
    groups: Sequence[Group],
    config: EditConfig,
) -> Pairs:
    """The pairs with rows for covariance-shaped neighbours of each name, in total weight `perturbation_weight`."""
    generator = torch.Generator().manual_seed(config.seed)
    parts = [pairs]
    first = {number: owner.index(number) for number in range(len(groups))}
    for number, group in enumerate(groups):
        if group.role == "word":
            continue
        mine = [pair for pair, o in zip(ends, owner, strict=True) if o == number]
        words = [ends[first[k]][0] for k, g in enumerate(groups) if g.role == "word" and g.concept == group.concept]
        x, y = (torch.stack(side).cpu() for side in zip(*mine, strict=True))
        near = torch.stack(words).cpu() if words else x[:0]
        dx, dy = covariance_rows(x, y, near, config.radius, config.samples, generator)
        size = len(dx)
        parts.append(
            Pairs(
                dx.to(pairs.x),
                dy.to(pairs.x),
                torch.full((size,), config.perturbation_weight, dtype=torch.float64, device=pairs.x.device),
                torch.full((size,), number, device=pairs.x.device),
                torch.ones(size, dtype=torch.bool, device=pairs.x.device),
            )
        )
    columns = ([getattr(p, name) for p in parts] for name in ("x", "y", "weight", "group", "extra"))
    return Pairs(*(torch.cat(column) for column in columns))
