"""The defence: attack the edit, erase what the attack found, solve again. Imports torch only.

RECE (arXiv 2407.12383) alternates its closed-form attack and a closed-form edit; here both are d x d algebra on the
statistics that the first solve has gathered, and no prompt is encoded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .attack import embedding_attack
from .layers import Layers
from .solve import Solution
from .statistics import Pairs

# Norm budget of the attacks that are erased, |e' - c| <= b |c|, and the least ridge of a robust solve; our own values,
# measured in docs/evaluation.md.
BUDGET = 0.5
RIDGE = 3.0


def harden(
    first: Solution,
    pairs: Pairs,
    solve_again: Callable[[Pairs, Tensor], Solution],
    rounds: int,
    metric: Tensor | None = None,
) -> Solution:
    """`rounds` of attack and solve after the solution `first` of `pairs`.

    In each round every own row x of `pairs` is replaced by the embedding within |e' - x| <= 0.5 |x| that the current
    edit maps nearest to x (in the metric Q [d, d] of the layers; None: the text space), which joins the pairs with the
    target of x, beside those of the rounds before. `solve_again(pairs, group_weight)` solves with the group weights of
    `first`, which its attacks share: in the n-th round 1 / (n + 2) of the weight of x goes to each of its n attacks
    and the rest stays with x, so that a name pulls no harder on the rest than it did. Costs one eigendecomposition and
    one solve a round.
    """
    own = ~pairs.extra
    x, y, weight, group = pairs.x[own], pairs.y[own], pairs.weight[own], pairs.group[own]
    width = first.factor.width
    q = torch.eye(width, dtype=torch.float64) if metric is None else metric
    extra = torch.ones(len(x), dtype=torch.bool, device=x.device)
    solution, found = first, list[Tensor]()
    for done in range(1, rounds + 1):
        matrix = torch.eye(width, dtype=torch.float64) + solution.factor.delta().cpu()
        found.append(embedding_attack(Layers.of_factor(matrix, q), x, (BUDGET,))[0].to(x))
        share = 1 / (done + 2)
        shared = torch.where(own, pairs.weight * (1 - done * share), pairs.weight)
        grown = Pairs(
            torch.cat([pairs.x, *found]),
            torch.cat([pairs.y, *[y] * done]),
            torch.cat([shared, *[weight * share] * done]),
            torch.cat([pairs.group, *[group] * done]),
            torch.cat([pairs.extra, *[extra] * done]),
        )
        solution = solve_again(grown, first.group_weight)
    return replace(solution, leverage=first.leverage)
