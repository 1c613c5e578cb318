"""Rates with their intervals, and means of them."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
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
        """Wilson's 95 % interval, as `scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")`.

        It treats pictures as independent; those of one concept are not quite.
        """
        if not self.count:
            return math.nan, math.nan
        z, n, p = 1.959964, self.count, self.value
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def harmonic(*values: float) -> float:
    """n / sum(1 / v): 0 where some v is 0, NaN where some v is NaN."""
    if any(math.isnan(v) for v in values):
        return math.nan
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean over concepts, by resampling concepts with a fixed seed."""
    if not len(values):
        return math.nan, math.nan
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
