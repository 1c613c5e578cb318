"""From the share of each concept that shall go to the weights of the solve, in float64. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import Pairs, group_sums

# Greatest product of a group's weight and its leverage.
MAX_PULL = 1e6
# Rows that are held in whitened form at once.
CHUNK_ROWS = 4096
# Of the joint weights: rounds at most, the greatest change of log a in one, the greatest multiple of a group's weight
# alone (names that ask for what excludes one another would ask for ever more), and how far off a share may stay.
ROUNDS = 6
STRIDE = 1.5
MAX_GROWTH = 10.0
TOLERANCE = 0.01
# A weight this far below that of the group alone has no part in the edit any more.
NEGLIGIBLE = 0.01


def group_weights(pairs: Pairs, projected: Tensor, lower: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight a of each group that leaves the wanted residual, its leverage, and its share, all [groups].

    Within a group alone, with G = Xw B_keep^-1 Xw^T = Z diag(g) Z^T (rows weighted by the square roots), the
    residual is rho(a)^2 = sum_k |Dw^T z_k|^2 / (1 + a g_k)^2 / sum_k |Dw^T z_k|^2, D = Y - X; for one row that is
    rho = 1 / (1 + a l) with the leverage l. rho falls with a, so bisection over log a finds it. Where no weight
    reaches `residual` [groups], the largest tried is taken. The share is what `shares` measures after that solve.
    """
    own = (~pairs.extra).nonzero().flatten()
    order = own[torch.argsort(pairs.group[own], stable=True)]
    counts = torch.bincount(pairs.group[order], minlength=pairs.groups)
    first = torch.cumsum(counts, 0) - counts
    weight = residual.new_zeros(pairs.groups)
    leverage, gone = torch.zeros_like(weight), torch.zeros_like(weight)
    for count in torch.unique(counts[counts > 0]).tolist():  # groups of one size go together, without padding
        groups = (counts == count).nonzero().flatten()
        for part in groups.split(max(1, CHUNK_ROWS // count)):
            rows = order[(first[part][:, None] + torch.arange(count, device=order.device)).flatten()]
            root = pairs.weight[rows].to(torch.float64).sqrt()[:, None]
            white = torch.linalg.solve_triangular(lower, (projected[rows] * root).T, upper=False)
            white = white.T.reshape(len(part), count, -1)
            gap = ((pairs.y[rows] - pairs.x[rows]).to(torch.float64) * root).view(len(part), count, -1)
            values, vectors = torch.linalg.eigh(white @ white.transpose(1, 2))
            share = (vectors * ((gap @ gap.transpose(1, 2)) @ vectors)).sum(1)  # |D^T z_k|^2, [part, count]
            weight[part], leverage[part], gone[part] = _bisect(values.clamp_min(0), share, residual[part])
    return weight, leverage, gone


def _bisect(values: Tensor, share: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, leverage, share gone) of groups with eigenvalues and shares [groups, rows] and wanted `residual`."""
    tiny = torch.finfo(torch.float64).tiny
    share = share / share.sum(1, keepdim=True).clamp_min(tiny)
    leverage = values.amax(1)
    # a l = 1e6 is beyond any strength that one row can ask for; more would only ruin the conditioning
    high = (MAX_PULL / leverage.clamp_min(tiny)).clamp_max(MAX_PULL**2).log()
    low = high - 40
    for _ in range(60):
        middle = (low + high) / 2
        rho = (share / (1 + middle.exp()[:, None] * values).square()).sum(1).sqrt()
        low, high = torch.where(rho > residual, middle, low), torch.where(rho > residual, high, middle)
    weight = torch.where(residual >= 1, torch.zeros_like(high), high.exp())
    pull = weight[:, None] * values
    return weight, leverage, (share * pull / (1 + pull)).sum(1)


def shares(pairs: Pairs, moved: Tensor) -> Tensor:
    """How much of its way each group went [groups]: sum w (M x - x) . (y - x) / sum w |y - x|^2 over its own rows.

    `moved` [m, d]: M x - x of every row.
    """
    gap = (pairs.y - pairs.x).to(torch.float64)
    return _sums(pairs, moved, gap) / _sums(pairs, gap, gap).clamp_min(torch.finfo(torch.float64).tiny)


def _sums(pairs: Pairs, left: Tensor, right: Tensor) -> Tensor:
    """sum w l . r over the own rows of each group [groups], for `left`, `right` [m, d]."""
    weight = torch.where(pairs.extra, 0, pairs.weight).to(torch.float64)
    return group_sums(weight * torch.einsum("ij,ij->i", left, right), pairs.group, pairs.groups)


def joint_weights(pairs: Pairs, projected: Tensor, kept: Tensor, alone: Tensor, wanted: Tensor) -> Tensor:
    """Weights [groups] with which every group goes the `wanted` share of its way in the solve of all.

    `kept` [d, d]: the kept statistics with the ridge; `alone` [groups]: the weights of `group_weights`, to begin with.
    Groups that have directions in common push one another beyond what was asked, or aside; these weights are the
    multipliers of sum w (M x - x) . (y - x) = wanted sum w |y - x|^2. For one row the share is a l / (1 + a l), so
    log a changes by the difference of the log-odds, which is Newton's step there. A group that the others take as far
    by themselves ends with next to no weight, as the multiplier of a constraint that does not bind has.
    """
    tiny = 1e-9
    odds, weight = torch.logit(wanted.clamp(tiny, 1 - tiny)), alone
    gap = (pairs.y - pairs.x).to(torch.float64)
    way = _sums(pairs, gap, gap).clamp_min(torch.finfo(torch.float64).tiny)
    for _ in range(ROUNDS if pairs.groups > 1 else 0):
        scaled = projected * (weight[pairs.group] * pairs.weight.to(torch.float64))[:, None]
        lower = torch.linalg.cholesky(kept + projected.T @ scaled)
        half = torch.cholesky_solve((gap.T @ scaled).T, lower)
        found = _sums(pairs, torch.mm(projected, half, out=scaled), gap) / way
        binding = (weight > NEGLIGIBLE * alone) | (found < wanted)
        if bool(((found - wanted).abs()[binding] <= TOLERANCE).all()):
            break
        step = (odds - torch.logit(found.clamp(tiny, 1 - tiny))).clamp(-STRIDE, STRIDE)
        weight = torch.minimum(weight * step.exp(), MAX_GROWTH * alone)
    return weight


def common_shares(share: Tensor, residual: Tensor) -> Tensor:
    """The mean share of the groups of one wanted residual, for each of them [groups]."""
    kinds, place = torch.unique(residual, return_inverse=True)
    return (group_sums(share, place, len(kinds)) / torch.bincount(place, minlength=len(kinds)))[place]
