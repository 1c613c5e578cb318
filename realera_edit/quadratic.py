"""Extremes of a quadratic form over a ball or a spherical cap, exactly: the trust-region problem. Imports torch only.

    extreme of q(z) = z^T A z - 2 b^T z + c   subject to   |z - e| <= r   (and cos(e, z) in [S1, S2])

A is symmetric, of any signature: the problem is not convex, and still one eigendecomposition and the root of a secular
equation solve it (More and Sorensen 1983; Conn, Gould and Toint, "Trust-Region Methods", 2000, section 7.3).
SciPy has the local method only (`scipy.optimize.minimize(method="trust-exact")`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .neighbours import Region

_STEPS = 60


@dataclass(frozen=True)
class Extreme:
    """`point` [n, d] of the region, `value` [n] = q(point), and `bound` [n], which no point of the region passes.

    Over a ball the two agree to rounding (about 1e-12 of |A|); over a cap to the width of its slices.
    """

    value: Tensor
    bound: Tensor
    point: Tensor


@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix A = V diag(values) V^T: `values` [d] rising, `vectors` V [d, d], float64."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """Of a symmetric [d, d] matrix (`numpy.linalg.eigh`), O(d^3): 0.06 s at d = 768."""
        matrix = matrix.to(torch.float64)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return cls(values, vectors)

    def negated(self) -> Spectrum:
        return Spectrum(-self.values.flip(0), self.vectors.flip(1))

    def apply(self, rows: Tensor) -> Tensor:
        """A x for each row of `rows` [n, d]."""
        return ((rows @ self.vectors) * self.values) @ self.vectors.T


def least_in_ball(spectrum: Spectrum, slope: Tensor, radius: Tensor, *, sphere: bool = False) -> Extreme:
    """Minimise h^T A h + 2 slope^T h over |h| <= `radius`, or over |h| = `radius` (`sphere`), for each row.

    `slope` [n, d], `radius` [n]; one A for all rows, O(n d^2) after its eigendecomposition. In A's own basis the
    minimum is h_i = -s_i / (l_i + mu) with mu >= max(0, -l_min) (sphere: mu >= -l_min) and |h| = r unless mu = 0. With
    sigma = mu + l_min, 1 / |h(sigma)| is concave and rises, so Newton's method on it from |s_min| / r, where h is too
    long, converges from the left without a safeguard. Where s has no part in the lowest eigenspace and h(0) is too
    short (the "hard case"), an eigenvector fills it up. `bound` is the Lagrangian dual at mu, -sum s_i^2 / (l_i + mu)
    - mu r^2: below the minimum whatever the iteration reached, and equal to it at its root.
    """
    slope, radius = slope.to(torch.float64), radius.to(torch.float64)
    values = spectrum.values
    turned = slope @ spectrum.vectors
    gaps = values - values[0]
    # sigma = 0 is a pole of the lowest eigenspace; parts of s there that are only rounding count as none
    lowest = gaps <= 1e-13 * values.abs().amax()
    gaps = torch.where(lowest, torch.zeros_like(gaps), gaps)
    turned = torch.where(lowest & (turned.abs() <= 1e-14 * turned.norm(dim=1, keepdim=True)), 0.0, turned)
    sigma = turned[:, lowest].norm(dim=1) / radius.clamp_min(1e-300)
    for _ in range(_STEPS):
        step = _divide(turned, gaps + sigma[:, None])
        length = step.norm(dim=1)
        # Newton on 1/|h| - 1/r: its derivative is sum_i h_i^2 / (gap_i + sigma) / |h|^3
        bend = _divide(step.square(), gaps + sigma[:, None]).sum(1)
        move = (length / radius.clamp_min(1e-300) - 1) * length.square() / bend.clamp_min(1e-300)
        move = torch.where(length > radius, move, torch.zeros_like(move))
        sigma = sigma + move
        if bool((move <= 1e-15 * sigma).all()):
            break
    if not sphere:
        sigma = sigma.clamp_min(float(values[0]))  # mu = 0, the free minimum, where that is inside of the ball
    step = -_divide(turned, gaps + sigma[:, None])
    length = step.norm(dim=1)
    hard = (length < radius) & (sigma <= 1e-13 * values.abs().amax())
    fill = torch.where(hard, (radius.square() - length.square()).clamp_min(0).sqrt(), torch.zeros_like(radius))
    step[:, 0] += torch.where(step[:, 0] < 0, -fill, fill)
    long = step.norm(dim=1)  # rounding must not leave the ball
    step = step * torch.where(long > radius, radius / long.clamp_min(1e-300), torch.ones_like(long))[:, None]
    value = (values * step.square() + 2 * turned * step).sum(1)
    mu = sigma - values[0]
    bound = -_divide(turned.square(), gaps + sigma[:, None]).sum(1) - mu * radius.square()
    return Extreme(value, torch.minimum(bound, value), step @ spectrum.vectors.T)


def _divide(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, with 0 / 0 = 0."""
    return torch.where(top == 0, torch.zeros_like(top), top / bottom.clamp_min(1e-300))


@dataclass(frozen=True)
class Quadratic:
    """q(z) = z^T A z - 2 b^T z + c for n right sides: `linear` b [n, d], `constant` c [n]."""

    spectrum: Spectrum
    linear: Tensor
    constant: Tensor

    def at(self, z: Tensor) -> Tensor:
        """q_i(z_i) [n]."""
        return (z * self.spectrum.apply(z)).sum(1) - 2 * (self.linear * z).sum(1) + self.constant

    def negated(self) -> Quadratic:
        return Quadratic(self.spectrum.negated(), -self.linear, -self.constant)

    def in_ball(self, centre: Tensor, radius: Tensor, *, largest: bool = False) -> Extreme:
        """The least (or `largest`) q_i(z) over |z - e_i| <= r_i; `centre` e [n, d], `radius` r [n]."""
        if largest:
            found = self.negated().in_ball(centre, radius)
            return Extreme(-found.value, -found.bound, found.point)
        found = least_in_ball(self.spectrum, self.spectrum.apply(centre) - self.linear, radius)
        base = self.at(centre)
        return Extreme(base + found.value, base + found.bound, centre + found.point)

    def in_region(self, centre: Tensor, region: Region, *, largest: bool = False, slices: int = 2048) -> Extreme:
        """The least or largest q_i(z) over |z - e_i| <= D1 |e_i| and cos(e_i, z) in [S1, S2].

        Where the extreme over the ball lies in the cap, it is the answer. Elsewhere, z = |e| (s e' + t u) with u a
        unit vector across e' = e / |e|: for fixed (s, t) the extreme over u is a problem on a sphere in d - 1
        dimensions, exact, and only a curve of (s, t) is left. For the largest value q is convex in (s, t) when A is
        positive semidefinite, so that curve is the rim of the ball within the cap; for the least, the segments
        along the cap's edges, where a path towards the ball's own minimum leaves the region. Along the curve F is an
        extreme of functions whose second derivative is at least -K (at most K), so between slices h apart
        it passes no further than K h^2 / 8 beyond its ends: `bound` includes that. A must be semidefinite. O(d^3)
        for each row whose ball leaves the cap.
        """
        norm = centre.norm(dim=1)
        found = self.in_ball(centre, region.radius * norm, largest=largest)
        cosine = (found.point * centre).sum(1) / (norm * found.point.norm(dim=1)).clamp_min(1e-300)
        inside = (cosine >= region.cos_min - 1e-12) & (cosine <= region.cos_max + 1e-12)
        value, bound, point = found.value.clone(), found.bound.clone(), found.point.clone()
        for row in (~inside).nonzero().flatten().tolist():
            one = replace(self, linear=self.linear[row], constant=self.constant[row])
            value[row], bound[row], point[row] = _in_cap(one, centre[row], region, largest, slices)
        return Extreme(value, bound, point)


def _in_cap(q: Quadratic, centre: Tensor, region: Region, largest: bool, slices: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `Quadratic.in_region` for one row, through slices across `centre` [d]."""
    norm = centre.norm()
    axis = centre / norm
    frame = _complement(axis)
    turned = frame.T @ q.spectrum.vectors
    across = Spectrum.of((turned * q.spectrum.values) @ turned.T)
    pulled = q.spectrum.apply(axis[None])[0]
    along_a, along_b = float(axis @ pulled), float(axis @ q.linear)
    s, t, width = region.rim(slices) if largest else region.edges(slices)
    s, t = s.to(centre) * norm, t.to(centre) * norm
    slopes = s[:, None] * (frame.T @ pulled) - frame.T @ q.linear
    if largest:
        best = least_in_ball(across.negated(), -slopes, t, sphere=True)
        top, limit = -best.value, -best.bound
    else:
        best = least_in_ball(across, slopes, t, sphere=True)
        top, limit = best.value, best.bound
    base = along_a * s.square() - 2 * along_b * s + q.constant
    reach = q.spectrum.values.abs().amax()
    if largest:  # |q''| along a circle of radius r about e
        r = region.radius * norm
        curve = 2 * r * ((q.spectrum.apply(centre[None])[0] - q.linear).norm() + r * reach)
    else:  # along a ray
        curve = 2 * reach * norm.square()
    slack = curve * width**2 / 8
    place = int((base + top).argmax() if largest else (base + top).argmin())
    point = s[place] * axis + frame @ best.point[place]
    values = base + limit
    return (base + top)[place], (values.amax() + slack if largest else values.amin() - slack), point


def _complement(axis: Tensor) -> Tensor:
    """Orthonormal columns [d, d - 1] across the unit vector `axis` [d]: a Householder reflection without its first."""
    mirror = axis.clone()
    mirror[0] += 1.0 if float(axis[0]) >= 0 else -1.0
    mirror = mirror / mirror.norm()
    frame = -2 * torch.outer(mirror, mirror[1:])
    frame[1:].diagonal().add_(1)
    return frame
