"""Extremes of quadratic forms: never passed by a sample, attained, and equal to what independent solvers find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import NonlinearConstraint, minimize

from realera_edit.neighbours import Region
from realera_edit.quadratic import Quadratic, Spectrum, least_in_ball

D = 7


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(kind: str, d: int = D, seed: int = 0) -> torch.Tensor:
    root = normal(d, d, seed=seed)
    gram = root @ root.T
    if kind == "indefinite":
        return gram - 4 * torch.eye(d, dtype=torch.float64)
    if kind == "singular":
        return root[:, :3] @ root[:, :3].T
    return gram


def value(a: torch.Tensor, slope: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return (h * (h @ a)).sum(1) + 2 * h @ slope


@pytest.mark.parametrize("kind", ["definite", "indefinite", "singular"])
@pytest.mark.parametrize("sphere", [False, True])
def test_no_point_of_the_ball_is_below_the_least_value_and_the_least_point_attains_it(kind: str, sphere: bool) -> None:
    a = matrix(kind)
    for seed in range(6):
        slope = normal(D, seed=10 + seed) * (0.01 if seed == 0 else 1)
        for radius in (0.05, 1.0, 20.0):
            found = least_in_ball(
                Spectrum.of(a), slope[None], torch.tensor([radius], dtype=torch.float64), sphere=sphere
            )
            length = float(found.point.norm())
            assert length <= radius * (1 + 1e-12)
            if sphere:
                assert length == pytest.approx(radius, rel=1e-9)
            assert float(value(a, slope, found.point)) == pytest.approx(float(found.value), rel=1e-9, abs=1e-9)
            scale = float(found.value.abs()) + 1e-9
            assert float(found.bound) <= float(found.value)
            assert float(found.value - found.bound) < 1e-9 * max(scale, radius**2)
            step = normal(4000, D, seed=seed)
            step *= radius / step.norm(dim=1, keepdim=True)
            if not sphere:
                step *= torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            assert float(value(a, slope, step).min()) >= float(found.bound)
            # and from the found point no small step within the region leads lower
            near = found.point + 1e-3 * radius * step / step.norm(dim=1, keepdim=True)
            near *= (radius / near.norm(dim=1, keepdim=True)).clamp_max(np.inf if sphere else 1.0)
            assert float(value(a, slope, near).min()) >= float(found.bound)


@pytest.mark.parametrize("sphere", [False, True])
def test_the_hard_case(sphere: bool) -> None:
    """The slope has no part in the lowest eigenspace, so that no multiplier makes the step long enough."""
    a = torch.diag(torch.tensor([-1.0, -1.0, 2.0, 3.0], dtype=torch.float64))
    slope = torch.tensor([[0.0, 0.0, 0.6, 0.4]], dtype=torch.float64)
    found = least_in_ball(Spectrum.of(a), slope, torch.tensor([2.0], dtype=torch.float64), sphere=sphere)
    # by hand: h_3 = -0.6 / 3, h_4 = -0.4 / 4, the rest of the length in the first two
    rest = 4 - 0.2**2 - 0.1**2
    wanted = -rest + 2 * 0.04 + 3 * 0.01 - 2 * (0.6 * 0.2 + 0.4 * 0.1)
    assert float(found.value) == pytest.approx(wanted, abs=1e-12)
    assert float(found.bound) == pytest.approx(wanted, abs=1e-12)
    assert float(found.point.norm()) == pytest.approx(2.0)


def test_inside_of_the_ball_it_is_the_unconstrained_minimum() -> None:
    a, slope = matrix("definite"), normal(1, D, seed=3)
    free = -torch.linalg.solve(a, slope[0])
    inner = least_in_ball(Spectrum.of(a), slope, free.norm()[None] * 1.01)
    torch.testing.assert_close(inner.point[0], free)
    outer = least_in_ball(Spectrum.of(a), slope, free.norm()[None] * 0.5)
    assert float(outer.value) > float(inner.value) + 1e-6


def test_the_largest_over_a_ball_agrees_with_the_least_of_its_negative() -> None:
    a, b, e = matrix("definite"), normal(3, D, seed=1), normal(3, D, seed=2)
    q = Quadratic(Spectrum.of(a), b, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    top = q.in_ball(e, torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64), largest=True)
    torch.testing.assert_close(q.at(top.point), top.value)
    for row, radius in enumerate((0.1, 1.0, 3.0)):
        step = normal(5000, D, seed=4)
        drawn = e[row] + step * (radius / step.norm(dim=1, keepdim=True))
        values = (drawn * (drawn @ a)).sum(1) - 2 * drawn @ b[row] + row
        assert float(values.max()) <= float(top.bound[row])


REGIONS = [
    Region(D, 0.5, 0.0, 1.0),  # the ball alone
    Region(D, 0.5, 0.95, 1.0),
    Region(D, 0.9, 0.5, 0.9),
    Region(D, 1.5, -0.5, 0.7),
    Region(D, 3.0, -1.0, 1.0),
]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("number", range(len(REGIONS)))
def test_the_bound_over_a_cap_is_never_passed_and_is_attained(number: int, largest: bool) -> None:
    region, sign = REGIONS[number], -1.0 if largest else 1.0
    a = matrix("definite", seed=number)
    e = normal(1, D, seed=20 + number)
    for seed in range(5):
        # the last two pull along the axis, to the near and to the far side of the ball
        b = normal(1, D, seed=30 + seed) * 4 if seed < 3 else (e @ a) * (3.0 if seed == 3 else -3.0)
        q = Quadratic(Spectrum.of(a), b, torch.tensor([5.0]))
        found = q.in_region(e, region, largest=largest)
        size = float(found.value.abs()) + float(a.norm() * e.norm() ** 2)
        gap = float(found.value - found.bound) * sign
        assert -1e-12 * size <= gap < 2e-5 * size
        # the point is in the region and has the value
        cosine = float((found.point * e).sum() / (e.norm() * found.point.norm()))
        assert region.cos_min - 1e-9 <= cosine <= region.cos_max + 1e-9
        assert float((found.point - e).norm()) <= region.radius * float(e.norm()) * (1 + 1e-9)
        assert float(q.at(found.point)) == pytest.approx(float(found.value), abs=1e-9 * size)
        # neither samples nor SciPy's local solver from the best of them get past the bound
        drawn = region.around(e.expand(4000, D), torch.Generator().manual_seed(seed))
        values = (drawn * (drawn @ a)).sum(1) - 2 * drawn @ b[0] + 5.0
        assert float((sign * (values - found.bound)).min()) >= 0
        best = _polished(a, b[0], e[0], region, drawn[int((sign * values).argmin())], sign)
        assert sign * (best - float(found.bound)) >= -1e-6 * size
        assert sign * (float(found.value) - best) <= 1e-4 * size


def test_the_bound_over_a_cap_holds_for_few_slices_too() -> None:
    """What lies between the slices is bounded, not left out: the least value over the cap's sides."""
    passed = 0
    for number, region in enumerate(REGIONS[1:4]):
        a, e = matrix("definite", seed=number), normal(1, D, seed=20 + number)
        for seed in range(5):
            q = Quadratic(Spectrum.of(a), normal(1, D, seed=40 + seed) * 4, torch.tensor([5.0], dtype=torch.float64))
            exact, coarse = q.in_region(e, region), q.in_region(e, region, slices=14)
            assert float(coarse.bound) <= float(exact.value)
            passed += float(coarse.value - exact.value) > 1e-6 * float(exact.value.abs())
    assert passed  # the slices alone do miss the extreme: without the margin this would fail


def test_the_largest_value_inside_of_the_near_arc() -> None:
    """One steep direction, 50 degrees off the axis: of its two peaks the higher, far one is outside of the cap."""
    e = torch.eye(D, dtype=torch.float64)[:1]
    steep = torch.zeros(D, dtype=torch.float64)
    steep[0], steep[1] = np.cos(np.radians(50)), np.sin(np.radians(50))
    q = Quadratic(
        Spectrum.of(torch.outer(steep, steep) * 10),
        torch.zeros(1, D, dtype=torch.float64) + 6.42 * steep,
        torch.zeros(1),
    )
    region = Region(D, 0.5, 0.85, 0.94)
    exact = q.in_region(e, region, largest=True)
    assert float((exact.point - (e - 0.5 * steep)).norm()) < 1e-2
    for slices in (8, 14, 20, 50):
        coarse = q.in_region(e, region, largest=True, slices=slices)
        assert float(coarse.value) <= float(exact.value) <= float(coarse.bound)
    few = q.in_region(e, region, largest=True, slices=8)
    assert float(few.value) < float(exact.value) - 1e-4  # the slices alone miss it


def _polished(
    a: torch.Tensor, b: torch.Tensor, e: torch.Tensor, region: Region, start: torch.Tensor, sign: float
) -> float:
    """SciPy's constrained local optimum from `start`."""
    centre, matrix_, linear = e.numpy(), a.numpy(), b.numpy()
    size = np.linalg.norm(centre)

    def objective(z: np.ndarray) -> float:
        return float(sign * (z @ matrix_ @ z - 2 * linear @ z + 5.0))

    def place(z: np.ndarray) -> np.ndarray:
        return np.array([np.linalg.norm(z - centre) / size, z @ centre / (size * np.linalg.norm(z))])

    limits = NonlinearConstraint(place, [0.0, region.cos_min], [region.radius, region.cos_max])
    result = minimize(objective, start.numpy(), method="SLSQP", constraints=[limits], options={"maxiter": 300})
    near = place(result.x)
    ok = near[0] <= region.radius + 1e-6 and region.cos_min - 1e-6 <= near[1] <= region.cos_max + 1e-6
    return float(sign * (result.fun if ok else objective(start.numpy())))
