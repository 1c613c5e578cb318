"""Algebra of factors M = I + L R: compose, scale, invert, compare, truncate, in float64. Imports torch only.

An edit acts on weights from the right, W' = W M, so edits compose by the product of their matrices, in the order in
which they are applied. Low-rank factors stay low-rank: no routine here forms a d x d matrix for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, ProjectionError, SolveError
from .solve import Factor

# Unit roundoff of float32, in which factors are stored: a singular value of M - I below this share of the greatest
# is less than the rounding of the stored matrix.
ROUNDOFF = 2.0**-24
# The inverse of a matrix of this condition number, rounded to float32, is off by up to 6e-8 * 1e5 = 6e-3: about as much
# as rounding a weight to bfloat16 (4e-3). More would be no inverse.
MAX_INVERTED = 1e5
# Share of the squared Frobenius norm that the "principal directions" of a difference hold.
PRINCIPAL = 0.99


@dataclass(frozen=True)
class Difference:
    """How far two factors are apart.

    `distance`: |A - B|_F / max(|A - I|_F, |B - I|_F), 0 for equal factors and at most 2; `absolute`: |A - B|_F.
    `directions`: the fewest singular directions of A - B that hold 99 % of its squared Frobenius norm.
    """

    distance: float
    absolute: float
    directions: int


def rounded(factor: Factor) -> Factor:
    """The factor as it is stored: every number rounded to float32, the tensors still float64."""
    right = None if factor.right is None else factor.right.to(torch.float32).to(torch.float64)
    return Factor(factor.left.to(torch.float32).to(torch.float64), right)


def recompress(left: Tensor, right: Tensor, tolerance: float = ROUNDOFF) -> Factor:
    """The low-rank factor with M - I = left @ right at its least rank, both sides balanced.

    `left` [d, r], `right` [r, d]. QR of both sides, left = Q1 T1 and right^T = Q2 T2, then the SVD T1 T2^T = U S V^T:
    left' = Q1 U S^1/2, right' = S^1/2 V^T Q2^T, without singular values at or below `tolerance` times the greatest
    (at least one is kept). By Eckart-Young the error in the spectral norm is at most `tolerance` |M - I|_2. As
    `scipy.linalg.svd(left @ right)`, in O(d r^2). At full rank, r = d, it is the dense form that is returned.
    """
    q1, t1 = torch.linalg.qr(left.to(torch.float64))
    q2, t2 = torch.linalg.qr(right.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(t1 @ t2.T, full_matrices=False)
    rank = max(1, int((s > tolerance * s[0]).sum())) if len(s) else 0
    root = s[:rank].sqrt()
    new_left, new_right = q1 @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q2.T
    if rank >= len(left):
        return Factor(new_left @ new_right, None)
    return Factor(new_left, new_right)


def compose(first: Factor, second: Factor, tolerance: float = ROUNDOFF) -> Factor:
    """M = M_first M_second: the edit that gives (W M_first) M_second, `first` applied first.

    Of a state, M x = M_first (M_second x): the state passes through the later edit first. The two orders differ by
    the commutator [L1 R1, L2 R2], which is small where the edits touch different directions. Both low-rank:
    M - I = [L1, L2 + L1 (R1 L2)] [R1; R2] exactly, recompressed (`recompress`). Raises `ProjectionError` where the
    widths differ.
    """
    _check_widths(first, second)
    if first.right is None or second.right is None:
        one, two = first.delta().to(torch.float64), second.delta().to(torch.float64)
        return Factor(one + two + one @ two, None)
    left = torch.cat([first.left, second.left + first.left @ (first.right @ second.left)], dim=1)
    return recompress(left, torch.cat([first.right, second.right]), tolerance)


def scale(factor: Factor, by: float) -> Factor:
    """M_s = I + s (M - I): s = 0 is no edit, 1 the edit itself (to the bit), 0.5 half of the way.

    Raises `ConfigError` where `by` is not finite.
    """
    if not math.isfinite(by):
        raise ConfigError(f"scale = {by}: expected a finite number; 0 is no edit, 1 the edit as it is")
    return Factor(factor.left * by, factor.right)


def singular_values(factor: Factor) -> Tensor:
    """All d singular values of M, greatest first; for a low-rank factor in O(d r^2), since all but 2 r of them are 1.

    With an orthonormal basis Q of [L, R^T], M = Q (I + Q^T L R Q) Q^T + (I - Q Q^T).
    """
    if factor.right is None or 2 * factor.rank >= factor.width:
        eye = torch.eye(factor.width, dtype=torch.float64, device=factor.left.device)
        values: Tensor = torch.linalg.svdvals(eye + factor.delta().to(torch.float64))
        return values
    left, right = factor.left.to(torch.float64), factor.right.to(torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([left, right.T], dim=1))
    small = torch.eye(basis.shape[1], dtype=torch.float64, device=left.device) + (basis.T @ left) @ (right @ basis)
    ones = torch.ones(factor.width - basis.shape[1], dtype=torch.float64, device=left.device)
    return torch.cat([torch.linalg.svdvals(small), ones]).sort(descending=True).values


def condition_number(factor: Factor) -> float:
    """The 2-norm condition number of M (`numpy.linalg.cond`), inf where M is singular."""
    values = singular_values(factor)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


def invert(factor: Factor, max_condition: float = MAX_INVERTED) -> Factor:
    """M^-1, so that composing with it, on either side, is no edit.

    Low-rank by the Woodbury identity: M^-1 = I - L (I + R L)^-1 R; dense: M^-1 = I - (M - I) M^-1, by one solve (LU,
    never `inv`). Raises `SolveError` where the condition number exceeds `max_condition` (default 1e5: stored in
    float32, the inverse is then off by up to 6e-3, about as much as the rounding of bfloat16).
    """
    condition = condition_number(factor)
    if not condition <= max_condition:
        raise SolveError(
            f"the edit is too ill-conditioned to invert (condition number {condition:.1e}, limit {max_condition:.1e}): "
            "it maps whole directions to nearly nothing. Restore the model with `undo`, or scale the edit below 1 first"
        )
    if factor.right is None:
        delta = factor.left.to(torch.float64)
        matrix = torch.eye(factor.width, dtype=torch.float64, device=delta.device) + delta
        return Factor(-torch.linalg.solve(matrix, delta, left=False), None)
    left, right = factor.left.to(torch.float64), factor.right.to(torch.float64)
    small = torch.eye(factor.rank, dtype=torch.float64, device=left.device) + right @ left
    return recompress(-torch.linalg.solve(small, left, left=False), right)


def difference(first: Factor, second: Factor) -> Difference:
    """How far two factors of one width are apart. Raises `ProjectionError` where the widths differ."""
    _check_widths(first, second)
    values = _values_of_difference(first, second)
    absolute = float(values.norm())
    largest = max(_norm(first), _norm(second))
    directions = leading(values, PRINCIPAL) if absolute > 0 else 0
    return Difference(absolute / largest if largest > 0 else 0.0, absolute, directions)


def leading(values: Tensor, energy: float) -> int:
    """The fewest of the singular `values` (greatest first) that hold the share `energy` of their squared sum."""
    shares = torch.cumsum(values.to(torch.float64).square(), 0)
    if not len(values) or float(shares[-1]) == 0:
        return 0
    # a share of exactly 1 must not fall to the rounding of the sum
    enough = shares >= energy * shares[-1] * (1 - 1e-15)
    return int(enough.nonzero()[0]) + 1


def orthonormal(factor: Factor) -> Factor:
    """The same edit in float64 with orthonormal rows of R (R^T = Q T: L R = L T^T Q^T); a dense one as it is."""
    left = factor.left.to(torch.float64)
    if factor.right is None:
        return Factor(left, None)
    basis, triangle = torch.linalg.qr(factor.right.to(torch.float64).T)
    return Factor(left @ triangle.T, basis.T.contiguous())


def truncated(matrix: Tensor, rank: int | None = None, energy: float | None = None) -> tuple[Tensor, Tensor]:
    """(up [n, r], down [r, k]), float64: the best rank-r approximation of A [n, k] in the Frobenius norm.

    The singular values of A, and its vectors of one side, are those of its smaller Gram matrix
    (`numpy.linalg.eigh`), and up down is the projection of A on the r leading ones (the Eckart-Young theorem). Both
    sides carry the root of each singular value, so that half precision holds them. Singular values at or below 2^-24
    of the greatest are left out. `rank`: the most that is kept; `energy`: no more than holds this share of |A|_F^2.
    """
    matrix = matrix.to(torch.float64)
    tall = matrix.shape[0] > matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    values, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    kept = max(1, int((values > ROUNDOFF * values[0]).sum()))
    if rank is not None:
        kept = min(kept, rank)
    if energy is not None:
        kept = max(1, min(kept, leading(values, energy)))
    vectors, root = vectors[:, :kept], values[:kept].sqrt().clamp_min(1e-30)
    if tall:
        return (matrix @ vectors) / root, root[:, None] * vectors.T
    return vectors * root, (vectors.T @ matrix) / root[:, None]


def _values_of_difference(first: Factor, second: Factor) -> Tensor:
    if first.right is None or second.right is None:
        values: Tensor = torch.linalg.svdvals((first.delta() - second.delta()).to(torch.float64))
        return values
    _, t1 = torch.linalg.qr(torch.cat([first.left, -second.left], dim=1).to(torch.float64))
    _, t2 = torch.linalg.qr(torch.cat([first.right, second.right]).to(torch.float64).T)
    values = torch.linalg.svdvals(t1 @ t2.T)
    return values


def _norm(factor: Factor) -> float:
    """|M - I|_F, through r x r matrices for a low-rank factor: |L R|_F^2 = tr((L^T L) (R R^T))."""
    if factor.right is None:
        return float(factor.left.to(torch.float64).norm())
    _, t1 = torch.linalg.qr(factor.left.to(torch.float64))
    _, t2 = torch.linalg.qr(factor.right.to(torch.float64).T)
    return float((t1 @ t2.T).norm())


def _check_widths(*factors: Factor) -> None:
    widths: Sequence[int] = [factor.width for factor in factors]
    if len(set(widths)) > 1:
        raise ProjectionError(
            f"the edits belong to text spaces of different widths ({', '.join(map(str, widths))}): "
            "they were made for different kinds of model"
        )
