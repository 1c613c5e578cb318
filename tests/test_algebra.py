"""The algebra of factors against dense matrices and the theorems that it claims."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realera_edit import algebra
from realera_edit.errors import ConfigError, ProjectionError, SolveError
from realera_edit.solve import Factor

D = 24


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(rank: int, seed: int = 0, size: float = 0.3) -> Factor:
    return Factor(size * rand(D, rank, seed=seed), size * rand(rank, D, seed=seed + 100))


def dense(seed: int = 0) -> Factor:
    return Factor(0.1 * rand(D, D, seed=seed), None)


def matrix(factor: Factor) -> torch.Tensor:
    return torch.eye(factor.width, dtype=torch.float64) + factor.delta()


def close(one: torch.Tensor, two: torch.Tensor, relative: float = 1e-12) -> bool:
    return float((one - two).norm()) <= relative * float(two.norm())


PAIRS = [(low_rank(3), low_rank(4, 1)), (dense(), low_rank(3)), (low_rank(3), dense(1)), (dense(), dense(1))]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_composing_is_the_product_in_the_order_of_application(first: Factor, second: Factor) -> None:
    weight = rand(7, D, seed=5)
    both = algebra.compose(first, second)
    assert close(weight @ matrix(both), weight @ matrix(first) @ matrix(second))
    assert not close(weight @ matrix(both), weight @ matrix(second) @ matrix(first), 1e-3)  # the order matters


def test_low_rank_stays_low_rank_at_the_least_rank() -> None:
    first, second = low_rank(3), low_rank(4, 1)
    both = algebra.compose(first, second)
    assert both.right is not None
    assert both.rank == 7
    again = algebra.compose(first, first)  # (I + L R)^2 = I + L (2 + R L) R: no new direction
    assert again.rank == 3
    assert close(matrix(again), matrix(first) @ matrix(first))
    assert algebra.compose(low_rank(11), low_rank(12, 1)).rank == 23
    full = algebra.compose(low_rank(13), low_rank(12, 1))
    assert full.right is None
    assert close(matrix(full), matrix(low_rank(13)) @ matrix(low_rank(12, 1)))


@given(st.integers(0, 2**20), st.tuples(*[st.integers(1, 5)] * 3))
def test_composing_is_associative(seed: int, ranks: tuple[int, int, int]) -> None:
    a, b, c = (low_rank(rank, seed + i) for i, rank in enumerate(ranks))
    one = algebra.compose(algebra.compose(a, b), c)
    two = algebra.compose(a, algebra.compose(b, c))
    assert close(matrix(one), matrix(two), 1e-11)


def test_recompressing_drops_only_what_is_below_its_tolerance() -> None:
    u, v = (torch.linalg.qr(rand(D, 4, seed=seed))[0] for seed in (1, 2))
    values = torch.tensor([8.0, 1.0, 1e-3, 1e-9], dtype=torch.float64)
    left, right = u * values, v.T
    for tolerance, rank in ((algebra.ROUNDOFF, 3), (1e-3, 2), (0.2, 1), (1e-12, 4)):
        factor = algebra.recompress(left, right, tolerance)
        assert factor.rank == rank
        error = float(torch.linalg.matrix_norm(factor.delta() - left @ right, 2))
        assert error <= tolerance * 8 * (1 + 1e-9)
        assert factor.right is not None
        assert torch.allclose(factor.left.norm(dim=0), factor.right.norm(dim=1))  # balanced


@pytest.mark.parametrize("factor", [low_rank(3), dense(), low_rank(14)])
def test_scaling_is_a_line_through_the_identity(factor: Factor) -> None:
    eye = torch.eye(D, dtype=torch.float64)
    for by in (0.0, 0.25, 1.0, -1.0, 3.0):
        assert close(matrix(algebra.scale(factor, by)), (1 - by) * eye + by * matrix(factor), 1e-14)
    assert torch.equal(algebra.scale(factor, 1.0).left, factor.left)
    for by in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected a finite number"):
            algebra.scale(factor, by)


@pytest.mark.parametrize("factor", [low_rank(3), dense(), low_rank(14)])
def test_the_inverse_is_the_inverse_on_both_sides(factor: Factor) -> None:
    inverse = algebra.invert(factor)
    assert close(matrix(inverse), torch.linalg.inv(matrix(factor)), 1e-11)
    for pair in ((factor, inverse), (inverse, factor)):
        assert float(algebra.compose(*pair).delta().norm()) < 1e-12
    assert not close(matrix(inverse), 2 * torch.eye(D, dtype=torch.float64) - matrix(factor), 1e-3)  # not I - L R


def test_what_cannot_be_inverted_is_an_error() -> None:
    u = torch.linalg.qr(rand(D, 1))[0]
    for left in (1e-6, 0.0):  # M keeps this share of one direction
        lost = Factor(u * (left - 1), u.T.clone())
        for factor in (lost, Factor(lost.delta(), None)):
            with pytest.raises(
                SolveError, match=r"too ill-conditioned to invert \(condition number (1\.0e\+06|inf|\d\.\de\+[1-9]\d)"
            ):
                algebra.invert(factor)
    mild = Factor(u * (1e-3 - 1), u.T.clone())
    assert algebra.condition_number(mild) == pytest.approx(1e3)
    assert close(matrix(algebra.invert(mild)), torch.linalg.inv(matrix(mild)))


@pytest.mark.parametrize("factor", [low_rank(3), low_rank(11), low_rank(14), dense()])
def test_singular_values_of_the_whole_matrix(factor: Factor) -> None:
    values = algebra.singular_values(factor)
    assert len(values) == D
    assert torch.allclose(values, torch.linalg.svdvals(matrix(factor)), rtol=1e-12)
    assert algebra.condition_number(factor) == pytest.approx(float(torch.linalg.cond(matrix(factor))))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_distance_is_that_of_the_dense_matrices(first: Factor, second: Factor) -> None:
    found = algebra.difference(first, second)
    gap = matrix(first) - matrix(second)
    assert found.absolute == pytest.approx(float(gap.norm()))
    assert found.distance == pytest.approx(float(gap.norm() / max(first.delta().norm(), second.delta().norm())))
    shares = torch.linalg.svdvals(gap).square().cumsum(0) / gap.norm() ** 2
    assert found.directions == 1 + int((shares < 0.99).sum())
    assert asdict(algebra.difference(second, first)) == pytest.approx(asdict(found))


def test_equal_factors_are_not_apart_and_one_direction_is_one() -> None:
    factor = low_rank(3)
    other = Factor(torch.cat([factor.left, rand(D, 1)], 1), torch.cat([factor.right, rand(1, D, seed=1)]))  # type: ignore[list-item]
    assert algebra.difference(factor, factor).distance < 1e-15
    assert algebra.difference(dense(), dense()) == algebra.Difference(0.0, 0.0, 0)
    assert algebra.difference(factor, other).directions == 1
    assert algebra.difference(algebra.scale(factor, 0), factor).distance == pytest.approx(1)


def test_widths_must_agree() -> None:
    other = Factor(rand(8, 8), None)
    for call in (algebra.compose, algebra.difference):
        with pytest.raises(ProjectionError, match=r"different widths \(24, 8\)"):
            call(low_rank(3), other)


def approximate(
    weight: torch.Tensor, factor: Factor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W (M - I) as a LoRA stores it."""
    whole = algebra.orthonormal(factor)
    up, down = algebra.truncated(weight @ whole.left, rank, energy)
    return up, down if whole.right is None else down @ whole.right


def test_an_orthonormal_factor_is_the_same_edit() -> None:
    factor = low_rank(6)
    found = algebra.orthonormal(factor)
    assert found.right is not None
    assert close(found.right @ found.right.T, torch.eye(6, dtype=torch.float64), 1e-12)
    assert close(found.delta(), factor.delta(), 1e-12)
    assert torch.equal(algebra.orthonormal(dense()).left, dense().left)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("factor", [low_rank(6), dense()])
def test_a_truncation_is_the_best_of_its_rank(factor: Factor, rows: int) -> None:
    """Eckart-Young: the error is that of the dropped singular values, and no perturbation of the sides lowers it."""
    weight = rand(rows, D, seed=3)
    change = weight @ factor.delta()
    values = torch.linalg.svdvals(change)
    for rank in (1, 3, 5):
        up, down = approximate(weight, factor, rank=rank)
        assert (up.shape, down.shape) == ((rows, rank), (rank, D))
        assert float((change - up @ down).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-9)
        for seed in range(5):
            worse = (up + 1e-3 * rand(rows, rank, seed=seed)) @ (down + 1e-3 * rand(rank, D, seed=seed + 9))
            assert float((change - worse).norm()) > float(values[rank:].norm())
    up, down = approximate(weight, factor)
    assert close(up @ down, change, 1e-7)
    assert up.shape[1] == int((values > algebra.ROUNDOFF * values[0]).sum())


def test_energy_is_reached_by_the_least_rank() -> None:
    weight, factor = rand(20, D, seed=3), dense()
    change = weight @ factor.delta()
    shares = torch.linalg.svdvals(change).square().cumsum(0) / change.norm() ** 2
    for energy in (0.3, 0.9, 0.99):
        rank = approximate(weight, factor, energy=energy)[0].shape[1]
        assert float(shares[rank - 1]) >= energy > float(shares[rank - 2] if rank > 1 else 0)
    assert approximate(weight, factor, energy=1.0)[0].shape[1] == 20


def test_the_sides_fit_half_precision_though_the_factor_s_own_do_not() -> None:
    factor = Factor(1e6 * rand(D, 2), 1e-6 * rand(2, D, seed=1))
    up, down = approximate(1e3 * rand(9, D, seed=2), factor)
    assert float(up.abs().max()) < 1e4
    assert float(down.abs().max()) < 1e4
