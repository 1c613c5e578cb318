"""RealEra (arXiv 2410.09140) in closed form: isotropic neighbours are erased, what lies beyond them is kept.

    minimise  sum_i |W' x_i - W y_i|^2 + u/n sum_k |W' z_ik - W y_i|^2 + b/n sum_k |W' r_ik - W r_ik|^2 + lam |W' - W|^2

z = x + eta with |eta| <= D1 |x| and cos(x, z) in [S1, S2]: the paper's neighbours. r: the same with a cosine below S1.
The paper trains; this is the weighted ridge of its terms, as plain isotropic noise has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import (
    ConceptLike,
    Options,
    Rows,
    divide,
    erase_rows,
    keep_moment,
    kept_rows,
    multiply,
    text_parameters,
)
from realera_edit.neighbours import Region
from realera_edit.pipeline import LoadedPipeline
from realera_edit.statistics import second_moment


@dataclass(frozen=True, kw_only=True)
class RealEra(Options):
    """Plain isotropic RealEra. All values are our choice: the paper's are not known to us.

    `radius` D1 in norms of the state, `cos_min` S1, `cos_max` S2; samples beyond have a cosine in [`beyond_min`,
    `cos_min`] and lie within `beyond_radius`. `samples` for each state, 0: their exact moments. Our reading: what lies
    beyond is drawn around the concept's own states, and the retained names are kept beside it.
    """

    radius: float = 0.5
    cos_min: float = 0.9
    cos_max: float = 1.0
    beyond_radius: float = 1.0
    beyond_min: float = 0.5
    neighbour_weight: float = 1.0
    beyond_weight: float = 1.0
    preserve_scale: float = 1.0
    lamb: float = 0.5
    samples: int = 0
    seed: int = 0

    def regions(self, d: int) -> tuple[Region, Region]:
        """Where neighbours, and what is beyond them, are drawn in dimension `d`."""
        return (
            Region(d, self.radius, self.cos_min, self.cos_max),
            Region(d, self.beyond_radius, self.beyond_min, self.cos_min),
        )


def cloud(rows: Rows, region: Region, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """sum_i a_i y_i E[z_i]^T and sum_i a_i E[z_i z_i^T], both [d, d], for z uniform in the region around x_i.

    Exact where `samples` is 0: E[z] = m x and E[z z^T] = (c - s') x x^T + s' |x|^2 I; else means of that many draws.
    """
    x, weight = rows.x, rows.weight
    if samples == 0:
        mean, along, across = region.moments()
        rest = across / (region.d - 1)
        second = (along - rest) * second_moment(x, weight)
        second.diagonal().add_(rest * float((weight * x.square().sum(1)).sum()))
        return mean * (rows.y.T @ (x * weight[:, None])), second
    drawn = region.around(x.repeat_interleave(samples, 0), generator)
    means = drawn.view(len(x), samples, -1).mean(1)
    return rows.y.T @ (means * weight[:, None]), second_moment(drawn, weight.repeat_interleave(samples) / samples)


def factor(rows: Rows, keep: Tensor, options: RealEra) -> Tensor:
    """The factor F [d, d] of W' = W F."""
    inner, outer = options.regions(rows.x.shape[1])
    generator = torch.Generator().manual_seed(options.seed)
    cross, near = cloud(rows, inner, options.samples, generator)
    _, beyond = cloud(rows, outer, options.samples, generator)
    own = second_moment(rows.x, rows.weight)
    mapped = rows.y.T @ (rows.x * rows.weight[:, None]) + options.neighbour_weight * cross
    erased = own + options.neighbour_weight * near
    eye = torch.eye(len(own), dtype=torch.float64)
    return eye + divide(mapped - erased, erased + keep + options.beyond_weight * beyond + options.lamb * eye)


def edit(pipe: Any, concepts: Sequence[ConceptLike], retain: Sequence[str], options: RealEra | None = None) -> None:
    """Erase `concepts` and their isotropic neighbours from a loaded pipeline in place."""
    options = options or RealEra()
    encoder = LoadedPipeline(pipe).encoder
    rows = erase_rows(encoder, concepts, options)
    kept, weight = kept_rows(encoder, retain, options)
    found = factor(rows, keep_moment(kept, weight * options.preserve_scale, options), options)
    multiply(list(text_parameters(pipe, options.roles).values()), found)
