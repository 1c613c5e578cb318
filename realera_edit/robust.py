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

# Norm budget of the attacks that are erased, |e' - c| <= b |c|; our own value, measured in docs/method.md.
BUDGET = 0.5


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
    target and the weight of x, beside those of the rounds before. `solve_again(pairs, group_weight)` solves with the
    group weights of `first`: the strength of a name is calibrated once, on its own rows. Costs one eigendecomposition
    and one solve a round.
    """
    own = ~pairs.extra
    x, y, weight, group = pairs.x[own], pairs.y[own], pairs.weight[own], pairs.group[own]
    width = first.factor.width
    q = torch.eye(width, dtype=torch.float64) if metric is None else metric
    solution, grown = first, pairs
    for _ in range(rounds):
        matrix = torch.eye(width, dtype=torch.float64) + solution.factor.delta().cpu()
        found = embedding_attack(Layers.of_factor(matrix, q), x, (BUDGET,))[0].to(x)
        more = Pairs(found, y, weight, group, torch.ones(len(x), dtype=torch.bool, device=x.device))
        columns = (
            torch.cat([getattr(grown, name), getattr(more, name)]) for name in ("x", "y", "weight", "group", "extra")
        )
        grown = Pairs(*columns)
        solution = solve_again(grown, first.group_weight)
    return replace(solution, leverage=first.leverage)
