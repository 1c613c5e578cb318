"""SPEED (arXiv 2503.07392): the edit in the null space of retained keys, layer by layer.

    minimise |(W + D P) C1 - W C*|^2 + |D P|^2   subject to   D P C2 = 0

C1, C* [d, n]: keys of the concepts and of their anchors; P: projection on the null space of the retained keys C0, which
are filtered by influence and augmented for each W; C2: keys of the start token and of the empty prompt. The paper
solves it with multipliers; here the constraint joins P, which is the same solution (tests/test_peers.py compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import (
    ConceptLike,
    Options,
    Rows,
    divide,
    erase_rows,
    kept_rows,
    text_parameters,
    write,
)
from realera_edit.pipeline import LoadedPipeline
from realera_edit.statistics import constraint_basis, project_out, project_out_both, second_moment


@dataclass(frozen=True, kw_only=True)
class SPEED(Options):
    """SPEED's published settings for few concepts: values only, 10 augmentations, threshold 1e-1, filter on.

    From its scripts; for 10 to 100 concepts they take threshold 1e-4 and no filter (`many`). Our reading: `threshold`
    is an absolute bound on the eigenvalues of C0 C0^T; augmented keys pass the same filter as retained ones; noise is
    added along the `rank` least right singular vectors of W; all states of the empty prompt are invariant; the keys
    are the last tokens, also of retained names when others are erased, since all positions of many names would leave no
    null space. `prior` joins the objective as a soft term within the null space, of which it would leave
    nothing as a constraint.
    """

    roles: str = "v"
    kept: str = "last"
    augment: int = 10
    rank: int = 1
    threshold: float = 1e-1
    filter: bool = True
    invariant: bool = True
    seed: int = 0

    @classmethod
    def many(cls) -> SPEED:
        """The settings of its scripts for ten concepts or more."""
        return cls(threshold=1e-4, filter=False)


def influence(weight: Tensor, rows: Rows, keys: Tensor) -> Tensor:
    """How far the unconstrained edit would move each key: |W K (C1 C1^T + I)^-1 k|^2 for `keys` [m, d]: [m]."""
    gap = (rows.y - rows.x).T @ (rows.x * rows.weight[:, None])
    total = second_moment(rows.x, rows.weight)
    total.diagonal().add_(1.0)
    return (keys @ divide(weight @ gap, total).T).square().sum(1)


def filtered(weight: Tensor, rows: Rows, keys: Tensor) -> Tensor:
    """The keys that the edit would move more than their mean (influence-based prior filter)."""
    if not len(keys):
        return keys
    moved = influence(weight, rows, keys)
    return keys[moved > moved.mean()]


def augmented(weight: Tensor, keys: Tensor, options: SPEED, generator: torch.Generator) -> Tensor:
    """`augment` noisy copies [m * augment, d] of each key, along directions that W [n, d] maps to (nearly) nothing."""
    vectors = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, : options.rank].T
    noise = torch.randn(len(keys) * options.augment, len(vectors[0]), generator=generator, dtype=keys.dtype)
    return keys.repeat_interleave(options.augment, 0) + (noise @ vectors.T) @ vectors


def refined(weight: Tensor, rows: Rows, keys: Tensor, options: SPEED, generator: torch.Generator) -> Tensor:
    """The retained keys C0 of one layer, as rows: filtered, then with augmented ones."""
    kept = filtered(weight, rows, keys) if options.filter else keys
    if not options.augment or not len(kept):
        return kept
    more = augmented(weight, kept, options, generator)
    return torch.cat([kept, filtered(weight, rows, more) if options.filter else more])


def taken(keys: Tensor, fixed: Tensor, threshold: float) -> Tensor:
    """Orthonormal rows that span what the edit must not touch: keys [m, d] above the threshold, and `fixed` [c, d]."""
    values, vectors = torch.linalg.eigh(second_moment(keys))
    basis = vectors.T[values > threshold]
    rest = project_out(constraint_basis(fixed), basis)
    # what the keys span already is left over as rounding: its rows must not become directions
    _, sizes, more = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([basis, more[sizes > 1e-6]])


def null_space_factor(rows: Rows, basis: Tensor, prior: Tensor | None = None) -> Tensor:
    """F = I + K P (P (C1 C1^T + prior) P + I)^-1, P the complement of the rows of `basis`; K = (C* - C1) C1^T."""
    eye = torch.eye(rows.x.shape[1], dtype=torch.float64)
    x = project_out(rows.x, basis)
    total = second_moment(x, rows.weight) + eye
    if prior is not None:
        total += project_out_both(prior, basis)
    right = project_out(divide(x * rows.weight[:, None], total), basis)
    return eye + (rows.y - rows.x).T @ right


def edit(pipe: Any, concepts: Sequence[ConceptLike], retain: Sequence[str], options: SPEED | None = None) -> None:
    """Erase `concepts` from a loaded pipeline in place, with the retained keys in the null space."""
    options = options or SPEED()
    encoder = LoadedPipeline(pipe).encoder
    rows = erase_rows(encoder, concepts, options)
    keys, _ = kept_rows(encoder, retain, options)
    empty = encoder.encode([""], encoder.max_length)[0].states.to("cpu", torch.float64)
    fixed = empty if options.invariant else empty[:0]
    prior = None if options.prior is None else options.prior_weight * options.prior.to(rows.x)
    generator = torch.Generator().manual_seed(options.seed)
    for parameter in text_parameters(pipe, options.roles).values():
        weight = parameter.data.to("cpu", torch.float64)
        basis = taken(refined(weight, rows, keys, options, generator), fixed, options.threshold)
        write(parameter, weight @ null_space_factor(rows, basis, prior))
