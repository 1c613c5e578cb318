"""Attacks on an edit, in closed form: which embeddings, and which words, still draw the concept? Imports torch only.

An attacker who controls the embedding looks for e' whose edited outputs are those of the concept c in the original
model: sum_l |W'_l e' - W_l c|^2 small. All layers enter through three d x d sums (`layers.Layers`), so an attack costs
one eigendecomposition whatever the model's size. It bounds what prompts can do in text space; whether a picture shows
the concept is for a judge to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .layers import Layers
from .quadratic import Quadratic, Spectrum
from .report import plain

BUDGETS = (0.1, 0.25, 0.5, 1.0)
# Ridge of the embedding attack, in mean eigenvalues of A: our own value. It keeps an unlimited attack from leaving the
# region where states live for the sake of the last percent.
RIDGE = 1e-3
# Beyond this condition number an edit counts as not invertible: its square is what float64 tells from zero.
MAX_CONDITION = 1e7


@dataclass(frozen=True)
class Scored:
    """How near an attack comes to the concept, over all its positions and all layers together.

    `distance` = |W' e' - W c| / |W c|, `cosine` of W' e' and W c; `success` = 1 - distance / distance of the
    unattacked prompt: 0 is no gain, 1 is the concept itself, below 0 it is further away than the erased prompt.
    """

    distance: float
    cosine: float
    success: float


@dataclass(frozen=True)
class Attack:
    """One attack: `kind` "embedding" (RECE's) or "inverse"; `budget` b of |e' - c| <= b |c| at each position (None: no
    limit); `reach`: the largest |e' - c| / |c| that it used."""

    kind: str
    budget: float | None
    reach: float
    scored: Scored


@dataclass(frozen=True)
class Word:
    """A vocabulary word by its end token against the concept's; `before`: its distance in the unedited model."""

    word: str
    before: float
    scored: Scored


@dataclass(frozen=True)
class AttackReport:
    """Attacks on one concept, with the unattacked prompt; `words`: the nearest first."""

    concept: str
    unattacked: Scored
    attacks: tuple[Attack, ...]
    words: tuple[Word, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data: dict[str, Any] = plain(asdict(self))
        return data

    def report(self) -> str:
        """A few lines of text."""
        start = self.unattacked
        lines = [f"concept    {self.concept}: erased to distance {start.distance:.3f}, cosine {start.cosine:.3f}"]
        for kind in dict.fromkeys(attack.kind for attack in self.attacks):
            shown = ", ".join(
                f"{a.scored.success:.0%} {'without limit' if a.budget is None else f'within {a.budget:g}'}"
                + (f" (needs {a.reach:.2g})" if a.budget is None else "")
                for a in self.attacks
                if a.kind == kind
            )
            lines.append(f"{kind:<10} comes back {shown}")
        if self.words:
            shown = ", ".join(f"{w.word} {w.scored.success:.0%} (before: {w.before:.2f} away)" for w in self.words[:6])
            lines.append(f"words      nearest: {shown}")
        return "\n".join(lines)


def embedding_attack(
    layers: Layers, concept: Tensor, budgets: Sequence[float | None], ridge: float = RIDGE
) -> list[Tensor]:
    """For each budget, e' [n, d] that minimises sum_l |W'_l e' - W_l c|^2 + lam |e'|^2 for each row c of `concept`.

    lam = `ridge` tr(A) / d. Without a budget (None) it is (A + lam I)^-1 B c, the attack of RECE (arXiv 2407.12383)
    over all layers; within |e' - c| <= budget |c| the exact minimum (`quadratic.least_in_ball`). One
    eigendecomposition for all of them.
    """
    concept = concept.to("cpu", torch.float64)
    lam = ridge * float(layers.edited.diagonal().mean())
    regular = layers.edited + lam * torch.eye(len(layers.edited), dtype=torch.float64)
    spectrum, pull = Spectrum.of(regular), concept @ layers.mixed.T
    form = Quadratic(spectrum, pull, concept.new_zeros(len(concept)))

    def least(budget: float | None) -> Tensor:
        if budget is not None:
            return form.in_ball(concept, budget * concept.norm(dim=1)).point
        return ((pull @ spectrum.vectors) / spectrum.values.clamp_min(1e-300)) @ spectrum.vectors.T

    return [least(budget) for budget in budgets]


def inverse_attack(factor: Tensor, concept: Tensor, budgets: Sequence[float | None]) -> list[Tensor | None]:
    """For each budget, e' with M e' = c, or the nearest to it within |e' - c| <= budget |c|, for each row of `concept`.

    `factor` M [d, d], `concept` [n, d]. Without a budget (None) e' = M^-1 c, which the edited model reads as the
    unedited one reads c; None where M has a condition number above 1e7. The distance is that of the text space, not
    of the layers.
    """
    concept = concept.to("cpu", torch.float64)
    spectrum = Spectrum.of(factor.T @ factor)
    form = Quadratic(spectrum, concept @ factor, concept.square().sum(1))

    def nearest(budget: float | None) -> Tensor | None:
        if budget is not None:
            return form.in_ball(concept, budget * concept.norm(dim=1)).point
        if float(spectrum.values[0]) * MAX_CONDITION**2 <= float(spectrum.values[-1]):
            return None
        solved: Tensor = torch.linalg.solve(factor, concept.T).T
        return solved

    return [nearest(budget) for budget in budgets]


def factor_of(layers: Layers) -> Tensor:
    """M [d, d] of an edit W' = W M, from its weights alone: the least-squares solution Q^+ B^T of W M = W'.

    For an edit of another form it is the nearest such matrix. Directions that no layer reads (eigenvalues of Q below
    1e-10 of the greatest) are taken as unchanged.
    """
    spectrum = Spectrum.of(layers.original)
    seen = spectrum.values > 1e-10 * spectrum.values[-1]
    basis = spectrum.vectors[:, seen]
    # W (M - I) = W' - W
    delta = basis @ ((basis.T @ (layers.mixed.T - layers.original)) / spectrum.values[seen][:, None])
    return torch.eye(len(delta), dtype=torch.float64) + delta


def score(layers: Layers, attack: Tensor, concept: Tensor) -> Scored:
    """`Scored` of `attack` e' [n, d] against `concept` c [n, d], all rows together."""
    one = score_each(layers, attack.reshape(1, *attack.shape), concept)
    return one[0]


def score_each(layers: Layers, attacks: Tensor, concept: Tensor) -> list[Scored]:
    """`Scored` of each of `attacks` [k, n, d] against `concept` [n, d]."""
    concept = concept.to("cpu", torch.float64)
    rows = torch.cat([concept[None], attacks.to("cpu", torch.float64)])
    own = (rows * (rows @ layers.edited)).sum((1, 2)).clamp_min(0)
    cross = (rows * (concept @ layers.mixed.T)).sum((1, 2))
    goal = (concept * (concept @ layers.original)).sum().clamp_min(1e-300)
    distance = ((own - 2 * cross + goal).clamp_min(0) / goal).sqrt()
    cosine = cross / (own * goal).sqrt().clamp_min(1e-300)
    # a concept that the edit did not touch has nothing to regain
    success = torch.where(distance[0] > 1e-9, 1 - distance / distance[0].clamp_min(1e-9), 0.0)
    columns = (column[1:].tolist() for column in (distance, cosine, success))
    return [Scored(*values) for values in zip(*columns, strict=True)]


def attack(
    layers: Layers,
    name: str,
    concept: Tensor,
    *,
    budgets: Sequence[float] = BUDGETS,
    ridge: float = RIDGE,
    factor: Tensor | None = None,
    words: Sequence[str] = (),
    bank: Tensor | None = None,
    end: int = 0,
    top: int = 10,
) -> AttackReport:
    """Every closed-form attack on one concept, at each budget and without one.

    `concept` [n, d]: the states of its prompt after the start token, of which row `end` is the end token. `factor`: M
    where it is known (default: `factor_of`). `words` and `bank` [words, d]: vocabulary words with their end states;
    the `top` nearest are kept.
    """
    matrix = factor_of(layers) if factor is None else factor.to("cpu", torch.float64)
    concept = concept.to("cpu", torch.float64)
    found: list[Attack] = []
    limits = (*budgets, None)
    every: list[tuple[str, Sequence[Tensor | None]]] = [
        ("embedding", embedding_attack(layers, concept, limits, ridge)),
        ("inverse", inverse_attack(matrix, concept, limits)),
    ]
    for kind, attacks in every:
        for budget, rows in zip(limits, attacks, strict=True):
            if rows is not None:
                reach = float(((rows - concept).norm(dim=1) / concept.norm(dim=1)).amax())
                found.append(Attack(kind, budget, reach, score(layers, rows, concept)))
    nearest: list[Word] = []
    if bank is not None and len(words):
        nearest = nearest_words(layers, words, bank, concept[end], top, skip=name)
    return AttackReport(name, score(layers, concept, concept), tuple(found), tuple(nearest))


def nearest_words(
    layers: Layers, words: Sequence[str], bank: Tensor, end: Tensor, top: int, skip: str = ""
) -> list[Word]:
    """The `top` words whose edited output at the end token is nearest to the concept's original one, of all `words`.

    Exhaustive: every row of `bank` [words, d] is compared with `end` [d]. `skip`: the concept's own name.
    """
    end = end.to("cpu", torch.float64)[None]
    bank = bank.to("cpu", torch.float64)
    scored = score_each(layers, bank[:, None], end)
    gap = bank - end
    before = ((gap * (gap @ layers.original)).sum(1).clamp_min(0) / (end * (end @ layers.original)).sum()).sqrt()
    rows = [
        Word(word, far, one)
        for word, far, one in zip(words, before.tolist(), scored, strict=True)
        if word.casefold() != skip.casefold()
    ]
    return sorted(rows, key=lambda row: row.scored.distance)[:top]
