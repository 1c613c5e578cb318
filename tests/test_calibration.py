"""The weights of names that are erased together: each goes the share that was asked, whatever goes beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from realera_edit import calibration
from realera_edit.calibration import TOLERANCE, shares
from realera_edit.solve import Solution, solve
from realera_edit.statistics import Keep, Pairs, second_moment

D = 24
RIDGE = 1e-2


def crowded(groups: int = 10, rows: int = 3, seed: int = 0) -> Pairs:
    """Names that share half of their directions: each row is one of a few common ones and a part of its own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(4, D, generator=generator, dtype=torch.float64)
    group = torch.arange(groups).repeat_interleave(rows)
    own = torch.randn(groups, D, generator=generator, dtype=torch.float64)[group]
    spread = torch.linspace(0.1, 1.5, groups, dtype=torch.float64)[group, None]
    noise = torch.randn(len(group), D, generator=generator, dtype=torch.float64)
    x = common[group % 4] + own + spread * noise
    y = torch.randn(groups, D, generator=generator, dtype=torch.float64)[group]
    weight = torch.full((len(group),), 1 / rows, dtype=torch.float64)
    return Pairs(x, y, weight, group, torch.zeros(len(group), dtype=torch.bool))


def keep() -> Keep:
    generator = torch.Generator().manual_seed(1)
    return Keep(
        second_moment(torch.randn(60, D, generator=generator, dtype=torch.float64)),
        None,
        torch.randn(1, D, generator=generator, dtype=torch.float64),
    )


def part(pairs: Pairs, chosen: Tensor) -> Pairs:
    """Some groups alone, numbered anew in the order of `chosen`."""
    rows = torch.cat([(pairs.group == g).nonzero().flatten() for g in chosen])
    place = {int(g): i for i, g in enumerate(chosen)}
    group = torch.tensor([place[int(g)] for g in pairs.group[rows]])
    return Pairs(pairs.x[rows], pairs.y[rows], pairs.weight[rows], group, pairs.extra[rows])


def gone(solution: Solution, pairs: Pairs) -> Tensor:
    return shares(pairs, solution.factor.map(pairs.x) - pairs.x)


def solved(pairs: Pairs, residual: Tensor) -> Solution:
    return solve(pairs, keep(), residual=residual, ridge=RIDGE)


def alone(pairs: Pairs, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, share) of each group in a solve of its own."""
    parts = [part(pairs, torch.tensor([g])) for g in range(pairs.groups)]
    found = [solved(one, residual[g : g + 1]) for g, one in enumerate(parts)]
    return (
        torch.cat([s.group_weight for s in found]),
        torch.cat([gone(s, one) for s, one in zip(found, parts, strict=True)]),
    )


def test_every_name_goes_the_share_that_it_goes_alone() -> None:
    """Where each has a strength of its own. The control: with the weights of names alone, they push one another on."""
    pairs, residual = crowded(), torch.linspace(0.3, 0.7, 10, dtype=torch.float64)
    weight, wanted = alone(pairs, residual)
    joint = gone(solved(pairs, residual), pairs)
    assert float((joint - wanted).abs().max()) <= 2 * TOLERANCE
    apart = solve(pairs, keep(), residual=residual, ridge=RIDGE, group_weight=weight)
    assert float((gone(apart, pairs) - wanted).abs().max()) > 5 * TOLERANCE


def test_names_of_one_strength_go_the_same_share() -> None:
    """The mean of what they would go alone; those of another strength keep their own."""
    pairs, residual = crowded(), torch.tensor([0.3] * 6 + [0.6] * 4, dtype=torch.float64)
    _, single = alone(pairs, residual)
    assert float(single[:6].max() - single[:6].min()) > 2 * TOLERANCE
    wanted = torch.cat([single[:6].mean().expand(6), single[6:].mean().expand(4)])
    assert float((gone(solved(pairs, residual), pairs) - wanted).abs().max()) <= TOLERANCE


def test_the_order_of_the_names_does_not_matter() -> None:
    pairs, residual = crowded(), torch.linspace(0.3, 0.7, 10, dtype=torch.float64)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    one, other = solved(pairs, residual), solved(part(pairs, order), residual[order])
    torch.testing.assert_close(one.group_weight[order], other.group_weight, rtol=1e-8, atol=0)
    torch.testing.assert_close(one.factor.delta(), other.factor.delta(), rtol=1e-8, atol=1e-10)


def test_one_name_has_the_weight_of_its_own_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, residual = crowded(groups=1), torch.tensor([0.3], dtype=torch.float64)
    found = solved(pairs, residual)
    monkeypatch.setattr(calibration, "ROUNDS", 0)
    assert torch.equal(found.group_weight, solved(pairs, residual).group_weight)


def test_a_name_that_others_take_along_fades_out() -> None:
    """A second name for the same states that asks for less: the first takes it as far, so it needs no weight."""
    pairs = crowded(groups=2)
    x, y = pairs.x[:3].repeat(2, 1), pairs.y[:3].repeat(2, 1)
    twice, residual = replace(pairs, x=x, y=y), torch.tensor([0.3, 0.8], dtype=torch.float64)
    weight, wanted = alone(twice, residual)
    found = solved(twice, residual)
    assert float(found.group_weight[1] / weight[1]) < 0.01
    share = gone(found, twice)
    assert abs(float(share[0] - wanted[0])) <= TOLERANCE
    assert float(share[1]) > float(wanted[1]) + 0.1


def test_names_that_exclude_one_another_stay_bounded() -> None:
    """The same states cannot go two opposite ways: no weight runs off, and the edit is finite."""
    pairs = crowded(groups=2)
    x = pairs.x[:3].repeat(2, 1)
    opposed = replace(pairs, x=x, y=torch.cat([x[:3] + 1, x[:3] - 1]))
    residual = torch.tensor([0.2, 0.2], dtype=torch.float64)
    weight, wanted = alone(opposed, residual)
    found = solved(opposed, residual)
    assert bool((found.group_weight <= 10.001 * weight).all())
    assert bool((gone(found, opposed) < wanted - 0.3).all())
    assert bool(torch.isfinite(found.factor.delta()).all())


def test_a_name_of_strength_nought_stays_out() -> None:
    pairs, residual = crowded(), torch.full((10,), 0.4, dtype=torch.float64)
    residual[3] = 1.0
    found = solved(pairs, residual)
    assert float(found.group_weight[3]) == 0
    assert bool((found.group_weight[torch.arange(10) != 3] > 0).all())
