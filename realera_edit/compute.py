"""From concepts to the factors of an edit: encode, mine, gather statistics, solve, and measure what was solved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .algebra import rounded
from .anchors import Anchors, build_anchors
from .class_words import class_words
from .concepts import Concept
from .config import EditConfig
from .embeddings import PromptEncoder
from .neighbours import Clouds, Region
from .pairs import ErasePairs, Group, build_pairs, list_groups
from .precision import full_precision
from .robust import RIDGE, harden
from .solve import Factor, Solution, drift, residuals, solve
from .statistics import Keep, Pairs
from .targets import AVERAGE
from .vocabulary import Neighbourhood, Prior, load_prior, mine_words, whole_words


@dataclass(frozen=True)
class Edit:
    """A solved edit, independent of any denoiser: the factor of each text space and its diagnostics.

    `residual` [groups]: share of each erased name left in text space; `missed` [groups]: by how much that is more than
    was asked of the solve. `drift`: the same for each preserved entry,
    as (entry, mean, worst) of |M r - r| / |r| over its states. `seconds`: time of each stage. `rows`, `prior` and
    `preserved` (entry, states): what the solve was given, for `geometry`; a stored edit has them no longer.
    """

    concepts: tuple[Concept, ...]
    groups: tuple[Group, ...]
    neighbourhoods: tuple[tuple[Neighbourhood, ...], ...]
    cross: Solution
    pooled: Solution | None
    residual: Tensor
    missed: Tensor
    drift: tuple[tuple[str, float, float], ...]
    fingerprint: str
    seconds: dict[str, float]
    rows: ErasePairs | None = None
    prior: Prior | None = None
    preserved: tuple[tuple[str, Tensor], ...] = ()

    def factor(self, role: str) -> Factor:
        """The factor that a projection of `role` is multiplied with."""
        if role != "pooled":
            return self.cross.factor
        if self.pooled is None:
            raise ValueError("this edit has no pooled text space")
        return self.pooled.factor


@full_precision()
def compute_edit(
    encoder: PromptEncoder,
    concepts: Sequence[Concept],
    config: EditConfig,
    preserve: Sequence[str] = (),
    prior_prompts: Sequence[str] = (),
    metric: Tensor | None = None,
) -> Edit:
    """Solve for `concepts` (with targets filled in). `prior_prompts` replace the vocabulary as the broad prior.

    `metric` Q [d, d]: of the layers, for the attacks of `config.robust` (None: they are of the text space).
    """
    clock = _Clock()
    if config.strength is None:  # it depends on the whole edit, so each concept's record says what it was
        common = config.strength_for(sum(len(concept.names) for concept in concepts))
        concepts = tuple(replace(c, strength=common) if c.strength is None else c for c in concepts)
    fingerprint = encoder.fingerprint()
    words = list(prior_prompts) or whole_words(encoder.pairs[0][0], config.prior_words)
    prior = load_prior(encoder, words, config.padding, fingerprint)
    clock.lap("prior")
    hoods = _mine(encoder, concepts, prior, preserve, config)
    groups = list_groups(concepts, hoods)
    pairs = build_pairs(encoder, concepts, groups, config, preserve)
    anchors = _anchors(encoder, prior, preserve, concepts, groups, hoods, config)
    clock.lap("encode")
    beyond = 0.0 if config.robust else config.overshoot
    strengths = torch.tensor([strength_of(concepts[g.concept], config) for g in groups], dtype=torch.float64)
    wanted, aimed = 1 - strengths / (1 + beyond), overshot(pairs.cross, beyond)
    cross = _solve(aimed, anchors.cross, wanted, config, metric)
    pooled = None
    if pairs.pooled is not None and anchors.pooled is not None:
        plain = replace(config, perturbation="none")
        pooled = _solve(overshot(pairs.pooled, beyond), anchors.pooled, wanted, plain)
    clock.lap("solve")
    moved = [(name, drift(cross.factor, states)) for name, states in anchors.preserved]
    return Edit(
        concepts=tuple(concepts),
        groups=pairs.groups,
        neighbourhoods=hoods,
        cross=cross,
        pooled=pooled,
        residual=residuals(cross.factor, pairs.cross),
        missed=residuals(cross.factor, aimed).cpu() - wanted,
        drift=tuple((name, float(d.mean()), float(d.max())) for name, d in moved),
        fingerprint=fingerprint,
        seconds=clock.laps,
        rows=pairs,
        prior=prior,
        preserved=anchors.preserved,
    )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def strength_of(concept: Concept, config: EditConfig) -> float:
    """The strength that a concept of an edit was erased with."""
    return config.strength_for(1) if concept.strength is None else concept.strength


def _mine(
    encoder: PromptEncoder,
    concepts: Sequence[Concept],
    prior: Prior | None,
    preserve: Sequence[str],
    config: EditConfig,
) -> tuple[tuple[Neighbourhood, ...], ...]:
    """The vocabulary neighbourhood of each name of each concept."""
    if prior is None or not (config.words or config.beyond):
        return tuple(() for _ in concepts)
    names = [name for concept in concepts for name in concept.names]
    targets = [text for text in dict.fromkeys(c.target or "" for c in concepts) if text != AVERAGE]
    encoded = encoder.encode([*names, *preserve, *targets], config.padding)
    ends = torch.stack([e.states[len(e.ids) - 1] for e in encoded]).cpu()
    skip = [{c.target or "", *(n.lower() for n in c.names)} for c in concepts for _ in c.names]
    found = mine_words(
        ends[: len(names)],
        ends[len(names) :],
        prior,
        inside=config.words,
        outside=config.beyond,
        threshold=config.word_similarity,
        skip=skip,
    )
    rows = iter(found)
    return tuple(tuple(next(rows) for _ in concept.names) for concept in concepts)


def _anchors(
    encoder: PromptEncoder,
    prior: Prior | None,
    preserve: Sequence[str],
    concepts: Sequence[Concept],
    groups: Sequence[Group],
    hoods: Sequence[Sequence[Neighbourhood]],
    config: EditConfig,
) -> Anchors:
    erased = {group.name.lower() for group in groups}
    held = dict.fromkeys(preserve, config.preserve_weight)
    if config.hold_class and prior is not None:
        words = class_words(concepts, config.kind, prior.words, erased.union(map(str.lower, preserve)))
        # the more goes, the less room is left to hold each class (docs/defaults.md)
        held |= dict.fromkeys(words, config.preserve_weight / len(concepts))
    rim = dict.fromkeys(word for row in hoods for hood in row for word, _ in hood.outside if word.lower() not in erased)
    taken = [] if prior is None else [word for word in prior.words if word.lower() in erased]
    return build_anchors(encoder, prior, held, list(rim), taken, config)


def overshot(pairs: Pairs, beyond: float) -> Pairs:
    """The pairs with targets `beyond` times the way further off: x + (1 + beyond) (y - x).

    The solve takes its directions in the order of their leverage, by the filter a g / (1 + a g). To go the whole way in
    those that are the concept's own, it must go far in those that it shares with the rest, too. Towards a target
    further off with a smaller weight, the first go as far and the others less.
    """
    return replace(pairs, y=pairs.x + (1 + beyond) * (pairs.y - pairs.x)) if beyond else pairs


def _solve(pairs: Pairs, keep: Keep, wanted: Tensor, config: EditConfig, metric: Tensor | None = None) -> Solution:
    clouds = None
    if config.perturbation == "isotropic":
        region = Region(pairs.x.shape[1], config.radius, config.cos_min, config.cos_max)
        clouds = Clouds(pairs, region, config.perturbation_weight, config.samples, config.seed)
    wanted = wanted.to(pairs.x.device)
    # of a small ridge, the erased direction is x whitened: long where the kept states are not, and cheap to walk back
    ridge = max(config.ridge, RIDGE) if config.robust else config.ridge

    def again(grown: Pairs, group_weight: Tensor) -> Solution:
        return solve(grown, keep, residual=wanted, ridge=ridge, clouds=clouds, group_weight=group_weight)

    solution = solve(pairs, keep, residual=wanted, ridge=ridge, clouds=clouds)
    if config.robust:
        solution = harden(solution, pairs, again, config.robust, metric)
    # what is measured, applied and stored in an edit file is one and the same factor
    return replace(solution, factor=rounded(solution.factor))


def space_report(solution: Solution) -> dict[str, Any]:
    """Diagnostics of one text space as plain numbers."""
    factor = solution.factor
    return {
        "width": factor.width,
        "rank": factor.rank,
        "form": "dense" if factor.right is None else "low-rank",
        "condition": solution.condition,
        "jitter": solution.jitter,
        "ridge": solution.ridge,
    }


__all__ = ["Edit", "ErasePairs", "compute_edit", "space_report"]
