"""Random neighbours of a state: RealEra's region, drawn exactly; covariance-shaped clouds; their exact moments.

RealEra (arXiv 2410.09140) mines related concepts as e + eta with d(e, e + eta) <= D1 and cos(e, e + eta) in [S1, S2].
Imports torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .statistics import Moments, Pairs

_CELLS = 8192
CHUNK_ROWS = 16384


@dataclass(frozen=True)
class Region:
    """The set of z with |z - e| <= `radius` |e| and cos(e, z) in [`cos_min`, `cos_max`], in dimension `d`.

    By symmetry z = |e| rho (cos(theta) e' + sin(theta) u) with e' = e / |e| and u uniform on the unit sphere across
    e; a point is uniform in volume when theta has density sin^(d-2) (hi^d - lo^d) and rho^d is uniform on
    [lo^d, hi^d], where rho in [lo, hi] is the chord of the ball at theta. So each draw takes two inverse
    distribution functions, one of them tabulated, and none is ever rejected. In high dimension nearly all of the
    volume lies at the rim: cos_min decides, cos_max hardly matters.

    Raises `ConfigError` where the region is empty.
    """

    d: int
    radius: float
    cos_min: float
    cos_max: float = 1.0

    def __post_init__(self) -> None:
        low, high = self._angles()
        if not self.radius > 0 or low > high:
            raise ConfigError(
                f"no neighbour has cosine in [{self.cos_min:g}, {self.cos_max:g}] within radius {self.radius:g}: "
                f"the radius reaches cosines from {math.cos(math.asin(min(self.radius, 1.0))):.3g}; widen one of them"
            )

    def _angles(self) -> tuple[float, float]:
        low = math.acos(min(self.cos_max, 1.0))
        high = math.acos(max(self.cos_min, -1.0))
        return low, min(high, math.asin(self.radius)) if self.radius < 1 else high

    def _chord(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        half = (self.radius**2 - theta.sin().square()).clamp_min(0).sqrt()
        return (theta.cos() - half).clamp_min(0), (theta.cos() + half).clamp_min(torch.finfo(torch.float64).tiny)

    def rim(self, points: int) -> tuple[Tensor, Tensor, float]:
        """Points (s, t) [n] on the ball's surface within the cap, in units of |e|, and the angle between two of them.

        z = |e| (s e' + t u); the angle is the one at e. Each arc of the rim is covered end to end; with a radius of one
        or more the origin is added, where the sides of the cap meet.
        """
        low, high = self._angles()
        if self.radius < 1:
            lean = [math.asin(min(math.sin(theta) / self.radius, 1.0)) for theta in (low, high)]
            arcs = [(low + lean[0], high + lean[1]), (high + math.pi - lean[1], low + math.pi - lean[0])]
        else:
            start, stop = (theta + math.asin(math.sin(theta) / self.radius) for theta in (low, high))
            arcs = [(start, stop)]
        count = points // len(arcs)
        width = max(stop - start for start, stop in arcs) / (count - 1)
        phi = torch.cat([torch.linspace(start, stop, count, dtype=torch.float64) for start, stop in arcs])
        s, t = 1 + self.radius * phi.cos(), self.radius * phi.sin().clamp_min(0)
        if self.radius >= 1:
            s, t = torch.cat([s, s.new_zeros(1)]), torch.cat([t, t.new_zeros(1)])
        return s, t, width

    def edges(self, points: int) -> tuple[Tensor, Tensor, float]:
        """Points (s, t) [n] along the cap's sides within the ball, in units of |e|, and the distance between two."""
        low, high = self._angles()
        theta = torch.tensor([high] if low in (0.0, high) else [low, high], dtype=torch.float64)
        near, far = self._chord(theta)
        count = points // len(theta)
        length = near[:, None] + (far - near)[:, None] * torch.linspace(0, 1, count, dtype=torch.float64)
        s, t = (length * theta.cos()[:, None]).flatten(), (length * theta.sin()[:, None]).flatten()
        return s, t, float((far - near).amax()) / (count - 1)

    def _table(self) -> tuple[Tensor, Tensor, float]:
        """Cell middles [cells], their probabilities [cells], and the cells' width."""
        low, high = self._angles()
        width = (high - low) / _CELLS
        theta = low + width * (torch.arange(_CELLS, dtype=torch.float64) + 0.5)
        near, far = self._chord(theta)
        log_density = (self.d - 2) * theta.sin().clamp_min(1e-300).log() + self.d * far.log()
        log_density += torch.log1p(-(near / far).pow(self.d).clamp_max(1 - 1e-16))
        return theta, torch.softmax(log_density, 0), width

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Polar coordinates of `count` points: (rho cos theta, rho sin theta), each [count], in units of |e|."""
        theta, probability, width = self._table()
        draw = torch.rand(2, count, generator=generator, dtype=torch.float64)
        cumulative = probability.cumsum(0)
        cell = torch.searchsorted(cumulative, draw[0] * cumulative[-1]).clamp_max(_CELLS - 1)
        inside = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * width
        angle = theta[cell] + inside
        near, far = self._chord(angle)
        base = (near / far).pow(self.d)
        rho = far * (base + draw[1] * (1 - base)).pow(1 / self.d)
        return rho * angle.cos(), rho * angle.sin()

    def around(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """One neighbour of each row of `states` [n, d], in the dtype of `states`."""
        along, across = (t.to(states) for t in self.sample(len(states), generator))
        norm = states.norm(dim=1, keepdim=True)
        unit = states / norm
        noise = torch.randn(states.shape, generator=generator, dtype=states.dtype, device=generator.device).to(states)
        noise = noise - (noise * unit).sum(1, keepdim=True) * unit
        noise = noise / noise.norm(dim=1, keepdim=True)
        result: Tensor = norm * (along[:, None] * unit + across[:, None] * noise)
        return result

    def moments(self) -> tuple[float, float, float]:
        """E[rho cos], E[rho^2 cos^2] and E[rho^2 sin^2], in units of |e| and |e|^2, by quadrature over theta.

        So a neighbour z of e has E[z] = m e and E[z z^T] = (c - s / (d-1)) e e^T + |e|^2 s / (d-1) I.
        """
        theta, probability, _ = self._table()
        near, far = self._chord(theta)
        ratio = near / far

        def power(p: int) -> Tensor:
            """E[rho^p | theta] for rho^d uniform on [near^d, far^d]."""
            top = 1 - ratio.pow(self.d + p)
            bottom = (1 - ratio.pow(self.d)).clamp_min(1e-300)
            return far.pow(p) * self.d / (self.d + p) * top / bottom

        first, second = power(1), power(2)
        return (
            float((probability * first * theta.cos()).sum()),
            float((probability * second * theta.cos().square()).sum()),
            float((probability * second * theta.sin().square()).sum()),
        )


@dataclass(frozen=True)
class Clouds:
    """Isotropic neighbours of every erase row, to be added to the statistics once the group weights are known.

    `weight`: total weight of a group's neighbours beside its own rows. `samples`: neighbours per group, spread over
    its rows; 0 adds the exact moments. Called with the group weights [groups]; see `solve.solve`.
    """

    pairs: Pairs
    region: Region
    weight: float
    samples: int
    seed: int

    def __call__(self, group_weight: Tensor) -> Moments:
        own = ~self.pairs.extra
        x, y = self.pairs.x[own], self.pairs.y[own]
        weight = self.weight * group_weight[self.pairs.group[own]] * self.pairs.weight[own].to(torch.float64)
        result = Moments.zeros(x.shape[1], x.device)
        if self.samples == 0:
            self._exact(result, x.to(torch.float64), y.to(torch.float64), weight)
        else:
            self._sampled(result, x, y, weight, torch.bincount(self.pairs.group[own])[self.pairs.group[own]])
        return result

    def _exact(self, result: Moments, x: Tensor, y: Tensor, weight: Tensor) -> None:
        mean, along, across = self.region.moments()
        rest = across / (self.region.d - 1)
        gram = (x.T @ (x * weight[:, None])) * (along - rest)
        result.k += mean * ((y * weight[:, None]).T @ x) - gram
        result.b += gram
        result.add_isotropic((weight * x.square().sum(1)).sum() * rest)

    def _sampled(self, result: Moments, x: Tensor, y: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Stream neighbours: each row of a group of n rows gets ceil(samples / n) of the group's draws."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        repeats = torch.ceil(self.samples / rows.to(torch.float64)).long()
        for row in torch.unique(repeats).tolist():
            index = (repeats == row).nonzero().flatten()
            for part in index.split(max(1, CHUNK_ROWS // row)):
                spread = part.repeat_interleave(row)
                # weights enter as sqrt(w) on both factors, so that one product serves rows of different weight
                root = (weight[part] / row).sqrt().to(x)[:, None]
                near = self.region.around(x[spread], generator) * root.repeat_interleave(row, dim=0)
                result.add_shared(near, y[part] * root, 1.0, row)


def covariance_rows(
    x: Tensor, y: Tensor, words: Tensor, scale: float, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Neighbours of a concept shaped by how its states vary: rows (dx, dy) that join the erase statistics.

    `x`, `y` [contexts, d]: one aligned state of the concept and of its target in each context; `words` [k, d]: the
    same state of the nearest words. The cloud about x is x + sum_k e_k dx_k with target y + sum_k e_k dy_k, where dx
    are the deviations of the contexts (dy: the target's own, so that what a context says survives) and of the words
    (dy = 0), scaled to total variance `scale`^2, and e is standard normal. Its moments about the mean are exactly
    the rows (dx_k -> dy_k); with `samples` > 0, that many draws stand in their place.
    """
    mean = x.mean(0, keepdim=True)
    dx = torch.cat([x - mean, words - mean])
    dy = torch.cat([y - y.mean(0, keepdim=True), torch.zeros_like(words)])
    factor = scale / math.sqrt(max(len(dx), 1))
    if samples == 0:
        return dx * factor, dy * factor
    draw = torch.randn(samples, len(dx), generator=generator, dtype=x.dtype) * (factor / math.sqrt(samples))
    return draw @ dx, draw @ dy
