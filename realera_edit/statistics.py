"""Second moments of the states to erase and to keep. Imports torch only; all accumulation is float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """States to erase: the mapping of row i of `x` [m, d] shall become that of row i of `y` [m, d].

    `weight` [m] sums to one within each group; `group` [m] (int64) numbers the name that a row belongs to.
    `extra` marks rows (True) that stand for the exact moments of a cloud of neighbours: they join the statistics
    with their weight but not the calibration of the strength.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    group: Tensor
    extra: Tensor

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1 if len(self.group) else 0


@dataclass(frozen=True)
class Keep:
    """What must stay: soft statistics and exact constraints.

    `second` [d, d] = sum_j b_j r_j r_j^T, or None where `rows` [n, d] = sqrt(b_j) r_j hold it in factored form (few
    vectors: the Woodbury branch). `fixed` [c, d]: states with W' f = W f exactly.
    """

    second: Tensor | None
    rows: Tensor | None
    fixed: Tensor


@dataclass
class Moments:
    """Running erase statistics of streamed neighbours, K = sum a (y - x) x^T and B = sum a x x^T, both [d, d]."""

    k: Tensor
    b: Tensor

    @classmethod
    def zeros(cls, d: int, device: torch.device | str = "cpu") -> Moments:
        return cls(
            torch.zeros(d, d, dtype=torch.float64, device=device), torch.zeros(d, d, dtype=torch.float64, device=device)
        )

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add neighbours `x` [n, d] with targets `y` [n, d] and weights [n]."""
        gram = second_moment(x, weight)
        self.k += (y * weight[:, None]).to(torch.float64).T @ x.to(torch.float64) - gram
        self.b += gram

    def add_shared(self, x: Tensor, y: Tensor, weight: float, repeats: int) -> None:
        """Add `x` [n * repeats, d], `repeats` consecutive rows to each row of `y` [n, d], all of one weight.

        The targets only meet the sum of their neighbours, so the cross moment costs n products, not n * repeats.
        """
        x64 = x.to(torch.float64)
        gram = (x64.T @ x64) * weight
        sums = x64.view(len(y), repeats, -1).sum(1)
        self.k += weight * (y.to(torch.float64).T @ sums) - gram
        self.b += gram

    def add_isotropic(self, beta: float | Tensor) -> None:
        """Add a cloud of second moment beta * I about zero, of target zero: exact moments of isotropic noise."""
        self.k.diagonal().sub_(beta)
        self.b.diagonal().add_(beta)


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums [groups] of `values` [m] by their `group` [m]: on the CPU, since a GPU adds in any order, to other bits."""
    total = torch.zeros(groups, dtype=values.dtype)
    return total.index_add_(0, group.cpu(), values.cpu()).to(values.device)


def second_moment(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_j w_j r_j r_j^T in float64 [d, d] for `rows` [n, d], `weight` [n] (None: ones)."""
    rows = rows.to(torch.float64)
    if weight is None:
        return rows.T @ rows
    return rows.T @ (rows * weight.to(torch.float64)[:, None])


def constraint_basis(fixed: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormal rows [c', d] that span `fixed` [c, d] (`scipy.linalg.orth`).

    Directions below `tolerance` times the largest singular value are left to the soft terms: encoder states carry
    float32 noise of about 1e-7 relative, and a constraint on noise would only take freedom from the edit.
    """
    if len(fixed) == 0:
        return fixed.to(torch.float64)
    _, values, basis = torch.linalg.svd(fixed.to(torch.float64), full_matrices=False)
    kept: Tensor = basis[values > tolerance * values[0]]
    return kept


def project_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows [n, d] in float64 without their part in the span of the orthonormal `basis` [c, d]."""
    rows = rows.to(torch.float64)
    return rows - (rows @ basis.T) @ basis


def project_out_both(second: Tensor, basis: Tensor) -> Tensor:
    """P S P for symmetric S [d, d] and P = I - basis^T basis."""
    half = second - (second @ basis.T) @ basis
    return half - basis.T @ (basis @ half)
