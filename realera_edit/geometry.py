"""What an edit did to the text space, without a picture: residuals, drift, worst cases. Imports torch only.

Everything is a norm of M x - y, in the text space (|v|), or weighted by what the layers read: |v|_Q^2 = v^T Q v with
Q = sum_l W_l^T W_l, so that |M x - y|_Q^2 = sum_l |W'_l x - W_l y|^2.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .compute import Edit
from .config import EditConfig
from .errors import CheckpointError, RealEraWarning
from .neighbours import Region
from .pairs import ErasePairs
from .quadratic import Quadratic, Spectrum
from .report import plain

# A state that moves by more than this share of its norm may be drawn as something else: measured, docs/method.md.
DAMAGING = 0.5
STANDS_OUT = 3.0
# Most words that the record and the text list.
SHOWN_WORDS = 30


@dataclass(frozen=True)
class Moved:
    """A word or preserved entry: `moved` = |M r - r| / |r| (an entry: the mean over its states, `worst` the most)."""

    name: str
    moved: float
    worst: float


@dataclass(frozen=True)
class NameGeometry:
    """One erased name.

    `residual`: |M x - y| / |x - y| over its rows, and `places`: the same at each token position. `leverage`: see
    `calibration.group_weights`; the greater, the dearer (NaN where it is not known). `moved`: |M x - x| / |x| at its
    end token x. Over all z of the neighbourhood of x: `regained` bounds 1 - |M z - x| / |M x - x|, the share of the
    way back to the unedited concept that a neighbour can make (0: none, 1: all of it), and `farthest` bounds
    |M z - y| / |x - y|. Both are exact bounds that are attained, not samples (`Quadratic.in_region`).
    """

    name: str
    role: str
    residual: float
    places: dict[str, float]
    leverage: float
    moved: float
    regained: float
    farthest: float


@dataclass(frozen=True)
class Geometry:
    """The geometry report of an edit.

    `names`: the erased names (aliases and words with them). `preserved` and `words`: most moved first; a word stands
    by its end token, and words that were erased with a name are left out. `typical`: the median over the words.
    `condition`: of the solve. `weighted`: norms are those of the layers (Q), not of the text space. `radius`,
    `cos_min`, `cos_max`: the neighbourhood that `regained` and `farthest` are about.
    """

    names: tuple[NameGeometry, ...]
    preserved: tuple[Moved, ...]
    words: tuple[Moved, ...]
    typical: float
    condition: float
    weighted: bool
    radius: float
    cos_min: float
    cos_max: float

    def worst(self) -> NameGeometry | None:
        """The name with the neighbour that comes furthest back."""
        return max(self.names, key=lambda name: name.regained, default=None)

    def damaged(self) -> tuple[Moved, ...]:
        """Preserved entries and words that moved more than `DAMAGING`, most moved first.

        A word must stand out as well, by `STANDS_OUT` medians of all words, and be no part of an erased name.
        """
        parts = {part for name in self.names for part in name.name.casefold().split()}
        least = max(DAMAGING, STANDS_OUT * self.typical)
        found = [entry for entry in self.preserved if entry.moved > DAMAGING]
        found += [word for word in self.words if word.moved > least and word.name.casefold() not in parts]
        return _sorted(found)

    def warn(self) -> None:
        """A `RealEraWarning` that names what is `damaged`, if anything is."""
        found = self.damaged()
        if found:
            shown = ", ".join(f"{entry.name} ({entry.moved:.2f})" for entry in found[:6])
            warnings.warn(
                f"{len(found)} preserved entries or frequent words moved by more than {DAMAGING:g} of their norm, and "
                f"may be drawn as something else: {shown}{' ...' if len(found) > 6 else ''}. Preserve what must stay, "
                "or lower strength",
                RealEraWarning,
                stacklevel=2,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, numbers to four digits; of the words the 30 most moved."""
        data = plain({**asdict(self), "words": [asdict(word) for word in self.words[:SHOWN_WORDS]]})
        return {**data, "words_measured": len(self.words)}

    def report(self) -> str:
        """A screen of text."""
        norms = "layers" if self.weighted else "text space"
        lines = [f"geometry   norms of the {norms}, condition {self.condition:.1e}"]
        for name in self.names[:12]:
            places = ", ".join(f"{place} {value:.2f}" for place, value in name.places.items())
            lines.append(f"left       {name.name} {name.residual:.2f} ({places}), leverage {name.leverage:.2g}")
        if self.preserved:
            shown = ", ".join(f"{p.name} {p.moved:.3f} (worst {p.worst:.3f})" for p in self.preserved[:8])
            lines.append(f"preserved  {shown}")
        return "\n".join([*lines, *self.summary()])

    def summary(self) -> list[str]:
        """The lines that `erase` prints."""
        lines = []
        if self.words:
            shown = ", ".join(f"{word.name} {word.moved:.3f}" for word in self.words[:6])
            lines.append(f"moved      of {len(self.words)} words most: {shown}; median {self.typical:.4f}")
        worst = self.worst()
        if worst is not None:
            lines.append(
                f"neighbour  within {self.radius:g} of its norm, a state comes at most {worst.regained:.0%} of the way "
                f"back to {worst.name}"
            )
        return lines


def measure(edit: Edit, config: EditConfig, metric: Tensor | None = None, *, cap: bool = True) -> Geometry:
    """The geometry of a solved edit; `metric` Q [d, d] weighs by the layers (None: the text space itself).

    One eigendecomposition for all names (a second at d = 2048), then O(d^2) for each, more where the cap of the
    neighbourhood cuts its ball (`Quadratic.in_region`). Without `cap` the bounds are those of the whole ball: quick
    for any number of names, and not tight where the cosines limit the neighbourhood further. Raises
    `CheckpointError` for a stored edit, which does not hold the states that it was made from.
    """
    if edit.rows is None:
        raise CheckpointError("the geometry needs the states that the edit was solved from; compute the edit anew")
    matrix = torch.eye(edit.cross.factor.width, dtype=torch.float64) + edit.cross.factor.delta().cpu()
    norms = _Norms(metric)
    words, typical = _words(edit, matrix, norms)
    preserved = [(name, _moved(matrix, norms, states)) for name, states in edit.preserved]
    cosines = (config.cos_min, config.cos_max) if cap else (-1.0, 1.0)
    region = Region(len(matrix), max(config.radius, 1e-9), *cosines)  # a radius of 0 is the state itself
    return Geometry(
        names=_names(edit, edit.rows, matrix, norms, region),
        preserved=_sorted([Moved(name, float(m.mean()), float(m.amax())) for name, m in preserved]),
        words=words,
        typical=typical,
        condition=edit.cross.condition,
        weighted=metric is not None,
        radius=region.radius,
        cos_min=region.cos_min,
        cos_max=region.cos_max,
    )


class _Norms:
    """|v| or |v|_Q of rows."""

    def __init__(self, metric: Tensor | None) -> None:
        self.metric = metric

    def weigh(self, rows: Tensor) -> Tensor:
        """Q v for each row."""
        return rows if self.metric is None else rows @ self.metric

    def square(self, rows: Tensor) -> Tensor:
        return (rows * self.weigh(rows)).sum(1).clamp_min(0)


def _moved(matrix: Tensor, norms: _Norms, states: Tensor) -> Tensor:
    states = states.to("cpu", torch.float64)
    ratio = norms.square(states @ matrix.T - states) / norms.square(states).clamp_min(1e-300)
    return ratio.sqrt()


def _sorted(entries: Sequence[Moved]) -> tuple[Moved, ...]:
    return tuple(sorted(entries, key=lambda entry: -entry.moved))


def _words(edit: Edit, matrix: Tensor, norms: _Norms) -> tuple[tuple[Moved, ...], float]:
    """Words of the prior that are no erased name, most moved first, and the median of all."""
    if edit.prior is None:
        return (), 0.0
    moved = _moved(matrix, norms, edit.prior.last)
    erased = {group.name.casefold() for group in edit.groups}
    pairs = zip(edit.prior.words, moved.tolist(), strict=True)
    return _sorted([Moved(w, m, m) for w, m in pairs if w.casefold() not in erased]), float(moved.median())


def _names(edit: Edit, rows: ErasePairs, matrix: Tensor, norms: _Norms, region: Region) -> tuple[NameGeometry, ...]:
    pairs = rows.cross
    x, y, weight, group = (t[~pairs.extra].cpu() for t in (pairs.x, pairs.y, pairs.weight, pairs.group))
    x, y = x.to(torch.float64), y.to(torch.float64)
    left = weight * norms.square(x @ matrix.T - y)
    before = weight * norms.square(x - y)
    ends: list[int] = []
    by_place: list[dict[str, list[int]]] = [{} for _ in edit.groups]
    for row, (number, place) in enumerate(zip(group.tolist(), rows.places, strict=True)):
        if place == "end" and place not in by_place[number]:
            ends.append(row)
        by_place[number].setdefault(place, []).append(row)
    moved = _moved(matrix, norms, x[ends])
    regained, farthest = _worst(matrix, norms, x[ends], y[ends], region)
    leverage = edit.cross.leverage.tolist()

    def share(chosen: list[int]) -> float:
        return float((left[chosen].sum() / before[chosen].sum().clamp_min(1e-300)).sqrt())

    return tuple(
        NameGeometry(
            name=g.name,
            role=g.role,
            residual=share([row for some in by_place[n].values() for row in some]),
            places={place: share(some) for place, some in by_place[n].items()},
            leverage=leverage[n],
            moved=float(moved[n]),
            regained=float(regained[n]),
            farthest=float(farthest[n]),
        )
        for n, g in enumerate(edit.groups)
    )


def _worst(matrix: Tensor, norms: _Norms, x: Tensor, y: Tensor, region: Region) -> tuple[Tensor, Tensor]:
    """(`regained`, `farthest`) [n] of `NameGeometry` for end states `x` [n, d] with targets `y` [n, d]."""
    weighed = norms.weigh(matrix.T).T if norms.metric is not None else matrix  # Q M
    spectrum = Spectrum.of(matrix.T @ weighed)
    back = Quadratic(spectrum, x @ weighed, norms.square(x)).in_region(x, region)
    away = Quadratic(spectrum, y @ weighed, norms.square(y)).in_region(x, region, largest=True)
    start = norms.square(x @ matrix.T - x).sqrt()
    # where the concept itself did not move there is nothing to regain
    regained = 1 - back.bound.clamp_min(0).sqrt() / start.clamp_min(1e-300)
    regained = torch.where(start > 1e-9 * norms.square(x).sqrt(), regained.clamp(0, 1), torch.zeros_like(start))
    return regained, (away.bound / norms.square(x - y).clamp_min(1e-300)).clamp_min(0).sqrt()
