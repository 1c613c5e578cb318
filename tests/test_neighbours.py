"""Random neighbours: inside the region, uniform in it, and converging to their exact moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from realera_edit.errors import ConfigError
from realera_edit.neighbours import Clouds, Region, covariance_rows
from realera_edit.statistics import Moments, Pairs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(2, 1024),
    radius=st.floats(0.05, 3.0),
    cosines=st.tuples(st.floats(-1.0, 1.0), st.floats(-1.0, 1.0)).map(sorted),
)
def test_every_draw_is_inside_or_the_region_is_an_error(d: int, radius: float, cosines: list[float]) -> None:
    low, high = cosines
    try:
        region = Region(d, radius, low, high)
    except ConfigError:
        # empty: the ball's cone does not reach high, within rounding
        assert math.acos(min(high, 1)) > math.asin(min(radius, 1.0)) - 1e-9
        return
    states = torch.randn(50, d, generator=generator(), dtype=torch.float64)
    near = region.around(states, generator(1))
    norm = states.norm(dim=1)
    cosine = (near * states).sum(1) / near.norm(dim=1) / norm
    assert bool(((near - states).norm(dim=1) <= norm * radius * (1 + 1e-6)).all())
    assert bool((cosine >= low - 1e-6).all())
    assert bool((cosine <= high + 1e-6).all())


def test_draws_are_uniform_in_the_volume() -> None:
    """In the plane, against rejection sampling of the same region: one Kolmogorov-Smirnov test a coordinate."""
    region = Region(2, 0.6, 0.85, 0.99)
    box = torch.rand(400_000, 2, generator=generator(2), dtype=torch.float64) * 2.4 - torch.tensor([0.4, 1.2])
    cosine = box[:, 0] / box.norm(dim=1)
    inside = (box - torch.tensor([1.0, 0.0])).norm(dim=1).le(0.6) & cosine.ge(0.85) & cosine.le(0.99)
    reference = box[inside]
    along, across = region.sample(4000, generator(3))
    assert kstest(along.numpy(), reference[:, 0].numpy()).pvalue > 0.01
    assert kstest(across.numpy(), reference[:, 1].abs().numpy()).pvalue > 0.01
    # control: another region is told apart
    other = Region(2, 0.5, 0.85, 0.99).sample(4000, generator(3))[0]
    assert kstest(other.numpy(), reference[:, 0].numpy()).pvalue < 1e-6


@pytest.mark.parametrize(("radius", "cos_min", "cos_max"), [(0.5, 0.8, 1.0), (2.0, -1.0, 1.0), (0.9, 0.5, 0.7)])
def test_sampling_converges_to_the_exact_moments(radius: float, cos_min: float, cos_max: float) -> None:
    d = 12
    region = Region(d, radius, cos_min, cos_max)
    e = torch.randn(1, d, generator=generator(4), dtype=torch.float64)
    mean, along, across = region.moments()
    rest = across / (d - 1)
    exact = (along - rest) * e.T @ e + float(e.square().sum()) * rest * torch.eye(d)
    errors = []
    for count in (1000, 100_000):
        near = region.around(e.expand(count, d), generator(5))
        errors.append(float((near.T @ near / count - exact).norm() / exact.norm()))
        assert torch.allclose(near.mean(0), mean * e[0], atol=8 / count**0.5)
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 3


def cloud_pairs(d: int = 10) -> Pairs:
    x = torch.randn(5, d, generator=generator(6), dtype=torch.float64)
    y = torch.randn(5, d, generator=generator(7), dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 1])
    weight = torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    return Pairs(x, y, weight, group, torch.zeros(5, dtype=torch.bool))


def test_streamed_clouds_converge_to_their_moments_and_keep_the_weight() -> None:
    pairs, region = cloud_pairs(), Region(10, 0.7, 0.6)
    weights = torch.tensor([2.0, 5.0], dtype=torch.float64)
    exact = Clouds(pairs, region, 0.5, 0, 0)(weights)
    errors = []
    for samples in (60, 60_000):
        drawn = Clouds(pairs, region, 0.5, samples, 0)(weights)
        errors.append([float((a - b).norm() / b.norm()) for a, b in ((drawn.k, exact.k), (drawn.b, exact.b))])
    assert max(errors[1]) < 0.02
    assert max(errors[1]) < max(errors[0]) / 5


def test_clouds_depend_on_the_seed_alone() -> None:
    pairs, region = cloud_pairs(), Region(10, 0.7, 0.6)
    weights = torch.ones(2, dtype=torch.float64)
    first, again, other = (Clouds(pairs, region, 0.5, 20, seed)(weights).k for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_isotropic_moments_are_an_attenuator() -> None:
    """The trap that method.md names: with nothing to hold it, exact isotropic noise shrinks every direction."""
    moments = Moments.zeros(4)
    moments.add_isotropic(3.0)
    shrunk = torch.eye(4, dtype=torch.float64) + moments.k @ torch.linalg.inv(moments.b + 0.03 * torch.eye(4))
    assert float(shrunk.abs().max()) < 0.02


def test_covariance_rows_have_the_covariance_of_contexts_and_words() -> None:
    x = torch.randn(7, 6, generator=generator(8), dtype=torch.float64)
    y = torch.randn(7, 6, generator=generator(9), dtype=torch.float64)
    words = torch.randn(3, 6, generator=generator(10), dtype=torch.float64)
    dx, dy = covariance_rows(x, y, words, 0.5, 0, generator())
    deviations = torch.cat([x, words]) - x.mean(0)
    torch.testing.assert_close(dx.T @ dx, 0.25 * deviations.T @ deviations / 10)
    assert float(dy[7:].abs().max()) == 0
    drawn, _ = covariance_rows(x, y, words, 0.5, 200_000, generator())
    torch.testing.assert_close(drawn.T @ drawn, dx.T @ dx, rtol=0.05, atol=0.01)
