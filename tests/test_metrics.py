"""The figures of an evaluation against SciPy, against plain loops, and against cases worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import linalg, stats

from realera_edit.metrics import (
    Mean,
    Rate,
    bootstrap,
    feature_distance,
    floor_of,
    frechet,
    harmonic,
    harmonic_means,
    kernel_distance,
    mcnemar,
    pixel_distances,
    wilcoxon,
)


def features(count: int, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) * np.arange(1, width + 1) + seed


# Rates and means


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (3, 8), (10, 200), (1, 1)])
def test_wilson_is_scipys(hits: int, count: int) -> None:
    found = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert Rate(hits, count).interval == pytest.approx((found.low, found.high), abs=1e-6)
    assert Rate(hits, count).value == hits / count
    assert all(0 <= end <= 1 for end in Rate(hits, count).interval)


def test_wilson_by_the_table_of_the_docs() -> None:
    """p = 0.05: [2.7, 9.0] % at n = 200, [4.1, 6.0] % at n = 2,000."""
    assert Rate(10, 200).interval == pytest.approx((0.027, 0.090), abs=5e-4)
    assert Rate(100, 2000).interval == pytest.approx((0.041, 0.060), abs=6e-4)


def test_nothing_drawn_is_not_a_number() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert all(math.isnan(end) for end in Rate(0, 0).interval)
    assert Rate(1, 2).to_dict() == {"value": 0.5, "low": Rate(1, 2).interval[0], "high": Rate(1, 2).interval[1]} | {
        "hits": 1,
        "count": 2,
    }


def test_harmonic() -> None:
    assert harmonic(0.5, 0.9, 0.7) == pytest.approx(stats.hmean([0.5, 0.9, 0.7]))
    assert harmonic(1.0, 0.0) == 0.0
    assert math.isnan(harmonic(math.nan, 0.0))


def test_harmonic_means_by_hand() -> None:
    found = harmonic_means(e=0.2, g=0.4, s=0.8, n=0.5)
    assert found["H_4"] == pytest.approx(4 / (1 / 0.8 + 1 / 0.6 + 1 / 0.8 + 1 / 0.5))
    assert found["H_o"] == pytest.approx(3 / (1 / 0.8 + 1 / 0.8 + 1 / 0.6))
    assert found["H_c"] == pytest.approx(0.8)
    assert math.isnan(harmonic_means(0.2, math.nan, 0.8, 0.5)["H_4"])
    assert harmonic_means(0.2, math.nan, 0.8, 0.5)["H_c"] == pytest.approx(0.8)


def test_harmonic_means_are_averaged_and_not_taken_of_averages() -> None:
    """Two concepts, one of them all there: 0.5, where the mean of averages would be 2/3."""
    rows = [harmonic_means(0, 0, 1, 1)["H_c"], harmonic_means(1, 0, 1, 1)["H_c"]]
    assert Mean.of(rows).value == 0.5
    assert harmonic(1 - 0.5, 1.0) == pytest.approx(2 / 3)


def test_mean_leaves_out_what_was_not_measured() -> None:
    found = Mean.of([0.5, math.nan, 1.0])
    assert (found.value, found.concepts) == (0.75, 2)
    assert 0.5 <= found.low <= 0.75 <= found.high <= 1.0
    assert math.isnan(Mean.of([math.nan]).value)
    assert Mean.of([]).concepts == 0


def test_bootstrap_covers_the_mean_and_shrinks() -> None:
    values = np.random.default_rng(1).uniform(size=400)
    few, many = bootstrap(values[:25]), bootstrap(values)
    assert few[0] < values[:25].mean() < few[1]
    assert many[1] - many[0] < 0.4 * (few[1] - few[0])
    # the normal approximation at n = 400
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap(values) == many
    assert bootstrap(np.full(3, 0.5)) == (0.5, 0.5)


# Distances


def test_frechet_is_the_formula_with_a_matrix_root() -> None:
    a, b = features(40), features(60, seed=1)
    covariances = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = a.mean(0) - b.mean(0)
    wanted = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet(b, a) == pytest.approx(wanted, rel=1e-8)


def test_frechet_in_one_dimension_and_of_fewer_pictures_than_features() -> None:
    """(mu_a - mu_b)^2 + (sigma_a - sigma_b)^2; features that are always 0 change nothing."""
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [1.0], [7.0]])
    wanted = (1 - 3) ** 2 + (math.sqrt(2) - math.sqrt(12)) ** 2
    assert frechet(a, b) == pytest.approx(wanted)
    wide = [np.hstack([f, np.zeros((len(f), 50))]) for f in (a, b)]
    assert frechet(*wide) == pytest.approx(wanted)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert math.isnan(frechet(a[:1], b))


def test_kernel_distance_by_loops() -> None:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    def own(f: np.ndarray) -> float:
        n = len(f)
        return sum(kernel(f[i], f[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    a, b, c = features(7), features(9, seed=1), features(7, seed=2)
    mixed = sum(kernel(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(own(a) + own(b) - 2 * mixed)
    # paired: the sum over i != j of h(z_i, z_j)
    paired = sum(kernel(a[i], c[j]) + kernel(a[j], c[i]) for i in range(7) for j in range(7) if i != j) / 42
    assert kernel_distance(a, c) == pytest.approx(own(a) + own(c) - paired)
    assert kernel_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert math.isnan(kernel_distance(a[:1], b))


def test_kernel_distance_is_unbiased() -> None:
    """Near zero on average for one distribution, where the V-statistic is not; far from it for two."""
    draw = np.random.default_rng(0)
    found = [kernel_distance(*draw.normal(size=(2, 20, 3))) for _ in range(300)]
    error = np.std(found) / math.sqrt(300)
    assert abs(np.mean(found)) < 3 * error
    apart = [kernel_distance(draw.normal(size=(20, 3)), draw.normal(size=(20, 3)) + 1) for _ in range(50)]
    assert np.mean(apart) > 20 * error


def test_floor_is_of_halves_that_share_the_prompts() -> None:
    """Prompts far apart, seeds close: halves by seeds are near, halves of prompts would not be."""
    draw = np.random.default_rng(0)
    prompts = 100.0 * draw.normal(size=(10, 1, 4))
    found = prompts + draw.normal(size=(10, 4, 4))
    assert floor_of(found, frechet) < 10
    assert floor_of(found[:, :1], frechet) > 100  # one seed: the prompts are halved
    assert math.isnan(floor_of(found[:1, :1], frechet))
    assert floor_of(found, lambda a, b: 100 * len(a) + len(b)) == 2020


def test_same_seed_distances() -> None:
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert pixel_distances(black, white).tolist() == [1.0, 1.0]
    assert pixel_distances(white, white).tolist() == [0.0, 0.0]
    half = black.copy()
    half[0, :2] = 51
    assert pixel_distances(black, half).tolist() == pytest.approx([0.1, 0.0])
    assert feature_distance(np.array([[3.0, 4.0], [0.0, 5.0]]), np.array([[0.0, 0.0], [0.0, 10.0]])) == 1.0
    assert feature_distance(np.array([[2.0]]), np.array([[1.0]])) == 1.0
    assert feature_distance(np.array([[1.0]]), np.array([[2.0]])) == 0.5
    assert feature_distance(features(3), features(3)) == 0.0
    assert math.isnan(feature_distance(np.zeros((0, 3)), np.zeros((0, 3))))


# Paired tests


def test_wilcoxon_on_concepts() -> None:
    first, second = [0.9, 0.8, 0.7, 0.9, 0.6, 0.8], [0.5, 0.7, 0.71, 0.6, 0.4, 0.3]
    found = wilcoxon(first, second)
    assert found.p == pytest.approx(stats.wilcoxon(first, second).pvalue)
    assert found.p == pytest.approx(2 * 2 / 2**6)  # ranks below the one negative: two of the 64 signs, both sides
    assert found.advantage == pytest.approx(np.mean(first) - np.mean(second))
    assert wilcoxon([*first, math.nan], [*second, 0.1]) == found
    assert wilcoxon(first, first).p == 1.0
    with pytest.raises(ValueError, match="no pairs"):
        wilcoxon(first, second[:-1])


def test_mcnemar_on_pictures() -> None:
    first = np.array([True] * 8 + [False] * 1 + [True] * 5 + [False] * 3)
    second = np.array([False] * 8 + [True] * 1 + [True] * 5 + [False] * 3)
    found = mcnemar(first, second)
    assert (found.advantage, found.pairs) == (7.0, 9)
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(first, first).p == 1.0
    with pytest.raises(ValueError, match="no pairs"):
        mcnemar(first, second[1:])


def test_needs_no_torch() -> None:
    code = "import sys, realera_edit.metrics as m\nprint(m.__name__, 'torch' in sys.modules, 'scipy' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["realera_edit.metrics", "False", "False"]
