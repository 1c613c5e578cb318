"""The solve: stationarity, the independent reference, equality constraints, strength, Woodbury, failures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from realera_edit.apply import apply_factor
from realera_edit.errors import RealEraWarning, SolveError
from realera_edit.solve import Factor, drift, factorise, residuals, solve
from realera_edit.statistics import Keep, Moments, Pairs, constraint_basis, project_out, second_moment

D = 24


def make_pairs(rows: int = 6, groups: int = 3, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    group = torch.arange(rows) % groups
    weight = 1 / torch.bincount(group)[group].to(torch.float64)
    return Pairs(x, y, weight, group, torch.zeros(rows, dtype=torch.bool))


def make_keep(rows: int = 60, fixed: int = 2, seed: int = 1, dense: bool = True) -> Keep:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    constraints = torch.randn(fixed, D, generator=generator, dtype=torch.float64)
    return Keep(second_moment(kept), None, constraints) if dense else Keep(None, kept, constraints)


def objective(m: torch.Tensor, w: torch.Tensor, pairs: Pairs, kept: torch.Tensor, a: torch.Tensor, lam: float) -> float:
    """The loss of method.md for W' = W M, layer weights `w`."""
    new = w @ m
    row = a[pairs.group] * pairs.weight
    erase = (row * (new @ pairs.x.T - w @ pairs.y.T).square().sum(0)).sum()
    return float(erase + (new @ kept.T - w @ kept.T).square().sum() + lam * (new - w).square().sum())


def test_solution_is_the_least_squares_minimum_of_every_layer() -> None:
    """One factor serves each layer: SciPy's own least squares, one layer and output row at a time, agrees."""
    pairs, lam = make_pairs(), 0.3
    kept = torch.randn(40, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    keep = Keep(second_moment(kept), None, torch.empty(0, D))
    ridge = lam / float(keep.second.diagonal().mean())
    a = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    solution = solve(pairs, keep, residual=torch.zeros(3), ridge=ridge, group_weight=a)
    root = (a[pairs.group] * pairs.weight).sqrt()[:, None]
    design = torch.cat([pairs.x * root, kept, torch.eye(D, dtype=torch.float64) * lam**0.5])
    for seed in (0, 1):
        w = torch.randn(5, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        goal = torch.cat([pairs.y * root, kept, torch.eye(D, dtype=torch.float64) * lam**0.5]) @ w.T
        edited = apply_factor(solution.factor, [w])[0]
        for row in range(5):
            reference = lsq_linear(design.numpy(), goal[:, row].numpy(), tol=1e-14).x
            np.testing.assert_allclose(edited[row].numpy(), reference, rtol=1e-8, atol=1e-9)


def test_every_step_away_from_the_constrained_solution_costs_more() -> None:
    """Optimality within the constraint M C = C, and the control: an unconstrained step can be cheaper."""
    pairs, keep = make_pairs(), make_keep()
    kept = torch.randn(60, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = torch.full((3,), 50.0, dtype=torch.float64)
    solution = solve(pairs, keep, residual=torch.zeros(3), ridge=1e-2, group_weight=a)
    m = torch.eye(D, dtype=torch.float64) + solution.factor.delta()
    w = torch.randn(30, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    basis = constraint_basis(keep.fixed)
    best = objective(m, w, pairs, kept, a, solution.ridge)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        step = 1e-3 * torch.randn(D, D, generator=generator, dtype=torch.float64)
        assert objective(m + project_out(step, basis), w, pairs, kept, a, solution.ridge) > best
    free = solve(pairs, Keep(keep.second, None, keep.fixed[:0]), residual=torch.zeros(3), ridge=1e-2, group_weight=a)
    assert objective(torch.eye(D) + free.factor.delta(), w, pairs, kept, a, solution.ridge) < best


def test_fixed_states_do_not_move_and_others_do() -> None:
    pairs, keep = make_pairs(), make_keep()
    factor = solve(pairs, keep, residual=torch.full((3,), 0.1), ridge=1e-3).factor
    assert float(drift(factor, keep.fixed).max()) < 1e-13 * float(factor.left.norm() * factor.right.norm())
    assert float(drift(factor, pairs.x).min()) > 0.1


@pytest.mark.parametrize("wanted", [0.5, 0.1, 0.01])
def test_one_concept_keeps_exactly_the_wanted_residual(wanted: float) -> None:
    """The weight follows from the leverage: residual 1 / (1 + a l) for one row, the general formula for several."""
    for rows in (1, 4):
        pairs = make_pairs(rows=rows, groups=1)
        solution = solve(pairs, make_keep(), residual=torch.tensor([wanted]), ridge=1e-3)
        assert float(residuals(solution.factor, pairs)) == pytest.approx(wanted, rel=1e-6)
        if rows == 1:
            assert 1 / (1 + float(solution.group_weight * solution.leverage)) == pytest.approx(wanted, rel=1e-6)


def test_a_residual_of_one_leaves_the_model_alone() -> None:
    solution = solve(make_pairs(), make_keep(), residual=torch.ones(3), ridge=1e-3)
    assert float(solution.factor.delta().abs().max()) == 0


def test_woodbury_equals_the_dense_branch() -> None:
    pairs, few = make_pairs(), make_keep(rows=8, dense=False)
    dense = Keep(second_moment(few.rows), None, few.fixed)
    a = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)
    one = solve(pairs, few, residual=torch.zeros(3), ridge=1e-2, group_weight=a)
    other = solve(pairs, dense, residual=torch.zeros(3), ridge=1e-2, group_weight=a)
    assert one.factor.rank == 6
    torch.testing.assert_close(one.factor.delta(), other.factor.delta(), rtol=1e-9, atol=1e-11)


def test_low_rank_equals_dense_and_the_rank_is_that_of_the_keys() -> None:
    """Rows whose clouds are empty take the dense branch; the same rows without clouds the low-rank one."""
    pairs, keep = make_pairs(), make_keep()
    a = torch.ones(3, dtype=torch.float64)
    low = solve(pairs, keep, residual=torch.zeros(3), ridge=1e-2, group_weight=a).factor
    dense = solve(
        pairs, keep, residual=torch.zeros(3), ridge=1e-2, group_weight=a, clouds=lambda _: Moments.zeros(D)
    ).factor
    assert low.right is not None
    assert dense.right is None
    torch.testing.assert_close(low.delta(), dense.delta(), rtol=1e-9, atol=1e-11)
    assert torch.linalg.matrix_rank(low.delta()) == 6
    states = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(low.map(states), dense.map(states))


def test_streamed_moments_equal_pairs() -> None:
    """Neighbours that are streamed in chunks count exactly like rows of the same weight."""
    pairs, keep = make_pairs(rows=6, groups=1), make_keep()
    a = torch.tensor([2.0], dtype=torch.float64)
    whole = solve(pairs, keep, residual=torch.zeros(1), ridge=1e-2, group_weight=a).factor
    first = Pairs(pairs.x[:2], pairs.y[:2], pairs.weight[:2], pairs.group[:2], pairs.extra[:2])

    def stream(weight: torch.Tensor) -> Moments:
        moments = Moments.zeros(D)
        for part in (slice(2, 3), slice(3, 6)):
            moments.add(pairs.x[part], pairs.y[part], weight[0] * pairs.weight[part])
        return moments

    parts = solve(first, keep, residual=torch.zeros(1), ridge=1e-2, group_weight=a, clouds=stream).factor
    torch.testing.assert_close(parts.delta(), whole.delta(), rtol=1e-8, atol=1e-10)


def test_condition_number_is_close_to_the_exact_one() -> None:
    pairs, keep = make_pairs(), make_keep(fixed=0)
    a = torch.ones(3, dtype=torch.float64)
    solution = solve(pairs, keep, residual=torch.zeros(3), ridge=1e-2, group_weight=a)
    row = a[pairs.group] * pairs.weight
    matrix = keep.second + second_moment(pairs.x, row) + solution.ridge * torch.eye(D)
    assert solution.condition == pytest.approx(float(np.linalg.cond(matrix.numpy())), rel=0.5)


def test_a_singular_matrix_takes_jitter_with_a_warning_that_says_how_much() -> None:
    row = torch.randn(1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular = row.T @ row - 1e-13 * torch.eye(D, dtype=torch.float64)
    with pytest.warns(RealEraWarning, match="1e-10"):
        _, jitter = factorise(singular)
    assert jitter > 0


def test_a_matrix_that_no_jitter_saves_is_an_error_with_a_remedy() -> None:
    with pytest.raises(SolveError, match="raise ridge"):
        factorise(-torch.eye(D, dtype=torch.float64))
    with pytest.raises(SolveError, match="NaN or inf"):
        factorise(torch.full((D, D), float("nan"), dtype=torch.float64))


def test_an_ill_conditioned_solve_warns() -> None:
    keep = Keep(torch.diag(torch.logspace(0, -3, D, dtype=torch.float64)), None, torch.empty(0, D))
    with pytest.warns(RealEraWarning, match="ill-conditioned"):
        solve(make_pairs(), keep, residual=torch.zeros(3), ridge=1e-13, group_weight=torch.full((3,), 1e13))


def test_apply_leaves_columns_beyond_the_text_alone_and_keeps_dtypes() -> None:
    factor = Factor(0.1 * torch.randn(D, D, dtype=torch.float64), None)
    weights = [torch.randn(5, D + 3).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    edited = apply_factor(factor, weights, D)
    for old, new in zip(weights, edited, strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new[:, D:], old[:, D:])
        exact = old[:, :D].double() @ (torch.eye(D, dtype=torch.float64) + factor.delta())
        torch.testing.assert_close(new[:, :D].double(), exact, rtol=float(torch.finfo(old.dtype).eps), atol=2e-6)


def test_nothing_is_left_to_edit_when_the_fixed_states_span_the_space() -> None:
    with pytest.raises(SolveError, match="span the whole text space of width 24"):
        solve(make_pairs(), make_keep(fixed=D), residual=torch.zeros(3), ridge=1e-2)
