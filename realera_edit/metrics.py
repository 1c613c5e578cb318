"""The figures of an evaluation: rates, their harmonic means, distances between sets of pictures, paired tests.

NumPy and SciPy only. Every interval is of 95 %. Rates are counted over all pictures, none dropped; harmonic means are
taken per concept and then averaged, since the harmonic mean of averages is another, larger number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Rate:
    """Hits among pictures."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """Hits / count; NaN where nothing was drawn."""
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval (1927), as `scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")`.

        It treats pictures as independent; those of one concept are not quite.
        """
        if not self.count:
            return math.nan, math.nan
        z, n, p = 1.959964, self.count, self.value
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
        return max(low, 0.0), min(high, 1.0)  # rounding alone leaves [0, 1]

    def to_dict(self) -> dict[str, float]:
        """value, low, high, hits, count."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "count": self.count}


def harmonic(*values: float) -> float:
    """n / sum(1 / v), as `scipy.stats.hmean`: 0 where some v is 0, NaN where some v is NaN."""
    if any(math.isnan(v) for v in values):
        return math.nan
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Percentile interval of a mean over concepts, by resampling concepts with a fixed seed (Efron 1979)."""
    if not len(values):
        return math.nan, math.nan
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def bootstrap_groups(groups: Sequence[Sequence[float]], draws: int = 2000) -> tuple[float, float]:
    """As `bootstrap`, of the mean of all values, where those of a group (one concept in several sets) go together."""
    if not groups:
        return math.nan, math.nan
    sums, counts = np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])
    chosen = np.random.default_rng(0).integers(0, len(groups), (draws, len(groups)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def harmonic_means(e: float, g: float, s: float, n: float) -> dict[str, float]:
    """H_4 of one concept, with H_o and H_c of MACE (arXiv 2403.06135): high is good, 1 the most.

    `e` efficacy, `g` generality (both of the erased concept, low is good), `s` specificity, `n` neighbours.
    H_4 = 4 / (1/(1-e) + 1/(1-g) + 1/s + 1/n), H_o = 3 / (1/(1-e) + 1/s + 1/(1-g)), H_c = 2 / (1/(1-e) + 1/s).
    """
    return {
        "H_4": harmonic(1 - e, 1 - g, s, n),
        "H_o": harmonic(1 - e, s, 1 - g),
        "H_c": harmonic(1 - e, s),
    }


@dataclass(frozen=True)
class Mean:
    """A mean over concepts with its bootstrap interval; `concepts`: how many had every part."""

    value: float
    low: float
    high: float
    concepts: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Of one value for each concept; a NaN (a part was not measured) is left out and not counted."""
        known = np.array([v for v in values if not math.isnan(v)])
        low, high = bootstrap(known)
        return cls(float(known.mean()) if len(known) else math.nan, low, high, len(known))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to features a [n, k] and b [m, k] (Heusel et al., arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), which TTUR calls FID for Inception's features. With S = X^T X
    of centred rows X / sqrt(n - 1), the trace of the root is the nuclear norm of X_a X_b^T, so no matrix root is taken
    and singular covariances do no harm. Biased upwards for few pictures: read it beside its floor. NaN for n < 2.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = a.astype(np.float64), b.astype(np.float64)
    shift = a.mean(0) - b.mean(0)
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a, b))
    # of a tall matrix its triangle will do: X = Q R gives the same singular values of the product
    p, q = (np.asarray(np.linalg.qr(f, mode="r")) if len(f) > f.shape[1] else f for f in (x, y))
    root = np.linalg.svd(np.asarray(p @ q.T), compute_uv=False).sum()
    found = shift @ shift + np.square(x).sum() + np.square(y).sum() - 2 * root
    return float(max(found, 0.0))  # rounding may leave -1e-15 of equal sets


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of features a [n, k] and b [m, k] with k(x, y) = (x.y / k + 1)^3.

    The kernel Inception distance of Binkowski et al. (arXiv 1801.01401), over all pictures at once. Zero on average
    for two samples of one distribution, so single values may be negative. Sets of one size are taken as paired (row i
    of both: one prompt and seed), and the pairs are left out of the mixed sum as each row is of its own: Lemma 6 of
    Gretton et al. (JMLR 13, 2012), by which equal sets are at 0. NaN for n < 2.
    """
    n, m, width = len(a), len(b), a.shape[1]
    if min(n, m) < 2:
        return math.nan
    a, b = a.astype(np.float64), b.astype(np.float64)
    aa, bb, ab = ((x @ y.T / width + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    own = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    mixed = (ab.sum() - np.trace(ab)) / (n * (n - 1)) if n == m else ab.mean()
    return float(own - 2 * mixed)


def floor_of(features: np.ndarray, distance: Distance, splits: int = 8) -> float:
    """What `distance` is between two halves of the same model's features [prompts, seeds, k]: mean over random halves.

    Each half holds every prompt with half of its seeds, where there are two seeds or more; else half of the prompts. A
    half has half as many pictures as the sets that are compared, so a biased distance has a somewhat high floor.
    """
    prompts, seeds, width = features.shape
    draw = np.random.default_rng(0)
    found = []
    for _ in range(splits):
        if seeds >= 2:
            order = draw.permutation(seeds)
            half = seeds // 2
            parts = features[:, order[:half]], features[:, order[half : 2 * half]]
        else:
            order = draw.permutation(prompts)
            half = prompts // 2
            parts = features[order[:half]], features[order[half : 2 * half]]
        found.append(distance(parts[0].reshape(-1, width), parts[1].reshape(-1, width)))
    return float(np.mean(found))


def pixel_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean |a - b| / 255 of each picture [n], for uint8 pictures [n, H, W, 3] of the same prompts and seeds."""
    change = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return np.asarray(change.reshape(len(a), -1).mean(1) / 255)


def feature_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |a_i - b_i| / mean |b_i| over features [n, k] of the same prompts and seeds; `b` of the original model."""
    if not len(b):
        return math.nan
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b, axis=1).mean() / max(np.linalg.norm(b, axis=1).mean(), 1e-300))


@dataclass(frozen=True)
class Paired:
    """A paired comparison of two editors: the mean or summed advantage of the first, and the two-sided p-value."""

    advantage: float
    p: float
    pairs: int


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Wilcoxon's signed-rank test (1945) on one figure per concept, say H_4; `scipy.stats.wilcoxon`.

    Pairs with a NaN are left out, pairs without a difference count for neither side; p = 1 if all are such.
    `advantage`: mean of first - second.
    """
    from scipy import stats

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} figures are no pairs")
    change = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    change = change[~np.isnan(change)]
    mean = float(change.mean()) if len(change) else math.nan
    p = float(stats.wilcoxon(change).pvalue) if change.any() else 1.0
    return Paired(mean, p, len(change))


def mcnemar(first: np.ndarray, second: np.ndarray) -> Paired:
    """McNemar's exact test (1947) on booleans [n] of the same pictures; `scipy.stats.binomtest` of the discordant.

    `advantage`: pictures where only the first is right, less those where only the second is; `pairs`: both together.
    """
    from scipy import stats

    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape} are no pairs")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    pairs = only_first + only_second
    p = float(stats.binomtest(only_first, pairs).pvalue) if pairs else 1.0
    return Paired(float(only_first - only_second), p, pairs)
