"""The least-squares problem that both sides of `solve_speed` are given: states, weights, and every single term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layer_loop import Term
from benchmarks.shapes import SHAPES, meta_unet
from realera_edit.config import EditConfig
from realera_edit.neighbours import Clouds, Region
from realera_edit.projections import text_projections
from realera_edit.statistics import Keep, Pairs

# UCE's own lam, and as many kept prompts as its examples have.
LAM = 0.5
KEPT = 5
OPTIONS = EditConfig()


def projection_rows(shape: str) -> list[int]:
    """d_out of every cross-attention key and value projection of a shape, in the U-Net's order."""
    unet, width = meta_unet(shape), int(SHAPES[shape].unet["cross_attention_dim"])
    sizes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    found = text_projections(sizes, dict(unet.config), width, None, shape)
    return [sizes[projection.name][0] for projection in found]


def random_weights(shape: str, device: str, seed: int) -> tuple[Tensor, list[Tensor]]:
    """All projections stacked [n, d] in float32, and the single ones [d_out, d] as views of it."""
    rows, width = projection_rows(shape), int(SHAPES[shape].unet["cross_attention_dim"])
    generator = torch.Generator().manual_seed(seed)
    stack = torch.empty(sum(rows), width).normal_(0, (3 * width) ** -0.5, generator=generator).to(device)
    return stack, list(torch.split(stack, rows))


def clip_like(count: int, width: int, seed: int) -> Tensor:
    """Random states [count, width] with the gross statistics of CLIP's end-token states.

    Norm sqrt(width) as after a layer norm; half of the energy in a mean that they share, much of it in two outlying
    coordinates; the rest with a covariance whose eigenvalues fall as 1 / k, in a random basis.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    falling = torch.arange(1, width + 1, dtype=torch.float32).rsqrt()
    parts = (torch.randn(count, width, generator=generator) * falling) @ basis
    mean = torch.randn(width, generator=generator)
    mean[torch.randperm(width, generator=generator)[:2]] = width**0.5 / 2
    states: Tensor = mean / mean.norm() + parts / parts.norm(dim=1, keepdim=True)
    return states.mul_(width**0.5 / states.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class Problem:
    """One key x [n, d] for each concept with its target y, kept keys [k, d], and the neighbours of each concept.

    `neighbours`: samples for each concept (0: none); `moments`: their exact moments in their place.
    """

    x: Tensor
    y: Tensor
    kept: Tensor
    neighbours: int
    moments: bool
    seed: int

    @property
    def cloudy(self) -> bool:
        """Whether neighbours take part, sampled or as moments."""
        return self.moments or self.neighbours > 0

    @property
    def ridge(self) -> float:
        """`LAM` in the unit of `realera_edit.solve`: mean eigenvalues of the kept statistics."""
        return LAM * self.kept.shape[1] / float(self.kept.double().square().sum())

    def region(self) -> Region:
        """The default region of isotropic neighbours."""
        return Region(self.x.shape[1], OPTIONS.radius, OPTIONS.cos_min, OPTIONS.cos_max)

    def pairs(self) -> Pairs:
        """The erase side as `realera_edit.solve` takes it: every concept a group of one row."""
        count, device = len(self.x), self.x.device
        ones = torch.ones(count, dtype=torch.float64, device=device)
        extra = torch.zeros(count, dtype=torch.bool, device=device)
        return Pairs(self.x, self.y, ones, torch.arange(count, device=device), extra)

    def keep(self) -> Keep:
        """The keep side; no equality constraint, since the loop has none."""
        return Keep(None, self.kept.double(), self.kept[:0])

    def clouds(self, pairs: Pairs, region: Region | None = None) -> Clouds | None:
        """The neighbours as `realera_edit.solve` takes them."""
        samples = 0 if self.moments else self.neighbours
        if not self.cloudy:
            return None
        return Clouds(pairs, region or self.region(), OPTIONS.perturbation_weight, samples, self.seed)

    def terms(self) -> list[Term]:
        """The same problem term by term, as the loop takes it."""
        one = self.x.new_ones(1)
        kept = [Term(row[None], row[None], one, one) for row in self.kept]
        if self.moments:
            return [self._exact(x, y) for x, y in zip(self.x, self.y, strict=True)] + kept
        near: Sequence[Tensor] = drawn_neighbours(self) if self.neighbours else [self.x[:0]] * len(self.x)
        share = OPTIONS.perturbation_weight / max(self.neighbours, 1)
        weight = torch.cat([one, one.new_full((self.neighbours,), share)])
        return [
            Term(torch.cat([x[None], z]), y.expand(len(weight), -1), weight, weight)
            for x, y, z in zip(self.x, self.y, near, strict=True)
        ] + kept

    def _exact(self, x: Tensor, y: Tensor) -> Term:
        """A concept with the moments of its cloud: E[z] = m x and E[z z^T] = (c - s') x x^T + s' |x|^2 I."""
        mean, along, across = self.region().moments()
        rest, scale = across / (len(x) - 1), OPTIONS.perturbation_weight
        one = x.new_ones(1)
        spread = scale * rest * float(x.double().square().sum())
        return Term(x[None], y[None], one * (1 + scale * mean), one * (1 + scale * (along - rest)), spread)


def drawn_neighbours(problem: Problem) -> Sequence[Tensor]:
    """The very neighbours [neighbours, d] of each concept that `Clouds` draws for this problem."""
    log: list[tuple[Tensor, Tensor]] = []

    class Witness(Region):
        def around(self, states: Tensor, generator: torch.Generator) -> Tensor:
            drawn = super().around(states, generator)
            log.append((states, drawn))
            return drawn

    region = problem.region()
    pairs = problem.pairs()
    clouds = problem.clouds(pairs, Witness(region.d, region.radius, region.cos_min, region.cos_max))
    if clouds is not None:
        clouds(torch.ones(len(problem.x), dtype=torch.float64, device=problem.x.device))
    shape = (len(problem.x), problem.neighbours, region.d)
    states = torch.cat([states for states, _ in log]).view(shape)
    if not torch.equal(states, problem.x[:, None].expand(shape)):
        raise RuntimeError("the neighbours were not drawn concept by concept; adapt drawn_neighbours")
    return torch.cat([drawn for _, drawn in log]).view(shape).unbind()
