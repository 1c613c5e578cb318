"""The solve: one factor M for every layer of a text space, in float64. Imports torch only.

    minimise  sum_i a_i |W' x_i - W y_i|^2 + sum_j b_j |W' r_j - W r_j|^2 + lam |W' - W|^2   subject to  W' C = W C

has the solution W' = W M with M = I + K P (P B P + lam I)^-1, where K = sum a_i (y_i - x_i) x_i^T,
B = sum a_i x_i x_i^T + sum b_j r_j r_j^T and P projects onto the complement of C. Without C this is UCE's ridge
solution (arXiv 2308.14761, eq. 7) factored over the layers; with C it is the limit b -> inf (EMMET, AlphaEdit).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import common_shares, group_weights, joint_weights
from .errors import RealEraWarning, SolveError
from .statistics import Keep, Moments, Pairs, constraint_basis, group_sums, project_out, project_out_both, second_moment

# Beyond this condition number float64 leaves fewer than four correct digits.
MAX_CONDITION = 1e12


@dataclass(frozen=True)
class Factor:
    """M = I + left @ right, or M = I + left where `right` is None. `left` [d, r], `right` [r, d], float64."""

    left: Tensor
    right: Tensor | None

    @property
    def width(self) -> int:
        return int(self.left.shape[0])

    @property
    def rank(self) -> int:
        """Columns that the low-rank form carries; the full width for the dense form."""
        return self.width if self.right is None else int(self.right.shape[0])

    def cpu(self) -> Factor:
        """The same in the CPU's memory."""
        return Factor(self.left.cpu(), None if self.right is None else self.right.cpu())

    def delta(self) -> Tensor:
        """M - I as a dense [d, d] matrix."""
        return self.left if self.right is None else self.left @ self.right

    def map(self, states: Tensor) -> Tensor:
        """M x for each row x of `states` [n, d], in float64."""
        states = states.to(torch.float64)
        if self.right is None:
            return states + states @ self.left.T
        return states + (states @ self.right.T) @ self.left.T


@dataclass(frozen=True)
class Solution:
    """A factor with its diagnostics. `group_weight` and `leverage` [groups]; `condition` of P B P + lam I."""

    factor: Factor
    group_weight: Tensor
    leverage: Tensor
    condition: float
    jitter: float
    ridge: float


def factorise(matrix: Tensor, what: str = "the kept statistics") -> tuple[Tensor, float]:
    """Lower Cholesky factor of a symmetric matrix [d, d], and the jitter that it took (0 where none was needed).

    Like `scipy.linalg.cholesky`. A failed factorisation is repeated with 1e-10 to 1e-6 of the mean diagonal added,
    with a `RealEraWarning` that says how much; then it is a `SolveError`.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise SolveError(f"{what} contain NaN or inf: the text encoder's states are not finite; check its weights")
    scale = float(matrix.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return lower, 0.0
    for power in (1e-10, 1e-8, 1e-6):
        jitter = power * scale
        shifted = matrix + jitter * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            warnings.warn(
                f"{what} are ill-conditioned: {power:.0e} of their mean diagonal was added to solve; raise ridge",
                RealEraWarning,
                stacklevel=2,
            )
            return lower, jitter
    raise SolveError(f"{what} are not positive definite even with jitter; raise ridge, or preserve more concepts")


def condition_number(matrix: Tensor, lower: Tensor, steps: int = 8) -> float:
    """Estimate of the 2-norm condition number of a positive definite matrix from its Cholesky factor.

    Power iteration for the largest eigenvalue and, through the factor, the smallest; a lower bound, usually within
    a factor of two. `numpy.linalg.cond` is exact, and 20 times the work of the solve.
    """
    high = matrix.new_ones(len(matrix), 1)
    high = low = high / high.norm()
    top = bottom = matrix.new_ones(())
    for _ in range(steps):
        high = matrix @ high
        top = high.norm()
        high = high / top
        low = torch.cholesky_solve(low, lower)
        bottom = low.norm()
        low = low / bottom
    return float(top * bottom)


def _woodbury(keep_rows: Tensor, projected: Tensor, row_weight: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(P B P + lam I)^-1 applied to the erase rows [m, d], through the dimension of the vectors instead of d."""
    root = row_weight.sqrt()[:, None]
    stacked = torch.cat([projected * root, keep_rows])
    gram = stacked @ stacked.T
    gram.diagonal().add_(ridge)
    lower, _ = factorise(gram, "the statistics")
    condition = condition_number(gram, lower)
    inner = torch.cholesky_solve(stacked @ projected.T, lower)
    return (projected - inner.T @ stacked) / ridge, condition


def _dense(
    total: Tensor, gap: Tensor, projected: Tensor, basis: Tensor, extra: Moments | None, low_rank: bool
) -> tuple[Factor, float, float]:
    """The factor from P B P + lam I = `total` [d, d], with its condition number and the jitter that it took.

    `gap`, `projected` [m, d]: a (y - x) and P x of the erase rows; `extra`: streamed neighbours, not in `total` yet.
    """
    if extra is not None:
        total = total + project_out_both(extra.b, basis)
    lower, jitter = factorise(total, "the statistics")
    # the right side is in the complement of C already; projecting again removes what the solve's rounding left
    if low_rank:
        factor = Factor(gap.T, project_out(torch.cholesky_solve(projected.T, lower).T, basis))
    else:
        cross = gap.T @ projected
        if extra is not None:
            cross += project_out(extra.k, basis)
        factor = Factor(project_out(torch.cholesky_solve(cross.T, lower).T, basis), None)
    return factor, condition_number(total, lower), jitter


def solve(
    pairs: Pairs,
    keep: Keep,
    *,
    residual: Tensor,
    ridge: float,
    clouds: Callable[[Tensor], Moments] | None = None,
    group_weight: Tensor | None = None,
) -> Solution:
    """The factor M for `pairs` against `keep`.

    `residual` [groups]: the share |M x - y| / |x - y| that may be left of each group (1: do not erase). `ridge`:
    lam, as a multiple of the mean eigenvalue of the kept statistics. `clouds`, if given, is called with the group
    weights and returns `Moments` of streamed neighbours to add. `group_weight` [groups] fixes the weights a in
    place of the calibration. Raises `SolveError`.
    """
    d = pairs.x.shape[1]
    basis = constraint_basis(keep.fixed)
    projected = project_out(pairs.x, basis)
    keep_rows = None if keep.rows is None else project_out(keep.rows, basis)
    if len(basis) >= d:
        raise SolveError(
            f"the states that are kept exactly (start token, empty prompt: {len(basis)} directions) span the whole "
            f"text space of width {d}: nothing can be edited. Models this narrow are not supported"
        )
    low_rank = clouds is None and 2 * len(projected) < d  # the cheaper form to apply
    few = low_rank and keep_rows is not None and len(projected) + len(keep_rows) < d
    if keep.second is not None:
        kept = project_out_both(keep.second, basis)
    else:
        kept = second_moment(keep_rows) if keep_rows is not None else projected.new_zeros(d, d)
    scale = float(kept.diagonal().mean()) or float(second_moment(projected).diagonal().mean()) or 1.0
    lam = ridge * scale
    leverage = torch.full((pairs.groups,), float("nan"), dtype=torch.float64)
    jitter = 0.0
    if group_weight is None:
        kept.diagonal().add_(lam)
        lower, jitter = factorise(kept)
        residual = residual.to(projected)
        alone, leverage, gone = group_weights(pairs, projected, lower, residual)
        kept.diagonal().add_(jitter)
        group_weight = joint_weights(pairs, projected, kept, alone, common_shares(gone, residual))
        kept.diagonal().sub_(lam + jitter)
    row_weight = group_weight[pairs.group] * pairs.weight.to(torch.float64)
    gap = (pairs.y - pairs.x).to(torch.float64) * row_weight[:, None]
    more = 0.0
    if few and keep_rows is not None:
        right, condition = _woodbury(keep_rows, projected, row_weight, lam)
        factor = Factor(gap.T, project_out(right, basis))
    else:
        extra = None if clouds is None else clouds(group_weight)
        kept += second_moment(projected, row_weight)
        kept.diagonal().add_(lam)
        factor, condition, more = _dense(kept, gap, projected, basis, extra, low_rank)
    if condition > MAX_CONDITION:
        warnings.warn(
            f"the solve is ill-conditioned (condition number {condition:.1e}); raise ridge or lower strength",
            RealEraWarning,
            stacklevel=2,
        )
    if not bool(torch.isfinite(factor.left).all()):
        raise SolveError("the solution contains NaN or inf; raise ridge or lower strength")
    return Solution(factor, group_weight, leverage, condition, max(jitter, more), lam)


def residuals(factor: Factor, pairs: Pairs) -> Tensor:
    """What is left of each group [groups]: sqrt(sum w |M x - y|^2 / sum w |x - y|^2) over its own rows."""
    own = ~pairs.extra
    x, y, w = (t[own].to(torch.float64) for t in (pairs.x, pairs.y, pairs.weight))
    left, before = (
        group_sums(w * (states - y).square().sum(1), pairs.group[own], pairs.groups) for states in (factor.map(x), x)
    )
    return (left / before.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def drift(factor: Factor, states: Tensor) -> Tensor:
    """|M r - r| / |r| of each row of `states` [n, d]: how far the mapping of a kept state moved."""
    states = states.to(torch.float64)
    moved: Tensor = (factor.map(states) - states).norm(dim=1) / states.norm(dim=1).clamp_min(1e-300)
    return moved
