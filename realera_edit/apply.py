"""W' = W M for many layers at once: stacked products in float32, one cast at the end. Imports torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .solve import Factor

STACK_ELEMENTS = 64 * 2**20


def apply_factor(factor: Factor, weights: Sequence[Tensor], columns: int | None = None) -> list[Tensor]:
    """New weights W M, in the dtype of each W [n_i, d], for the first `columns` columns (None: all of them).

    Computed as W + (W U) V (4 n d r flops) or W + W (M - I) (2 n d^2) in float32, on stacks of layers of at most
    `STACK_ELEMENTS` elements; a float64 weight is computed in float64.
    """
    dtype = torch.promote_types(torch.float32, weights[0].dtype) if weights else torch.float32
    device = weights[0].device if weights else torch.device("cpu")
    left = factor.left.to(device, dtype)
    right = None if factor.right is None else factor.right.to(device, dtype)
    width = factor.width if columns is None else columns
    result: list[Tensor] = []
    start = 0
    while start < len(weights):
        stop, size = start, 0
        while stop < len(weights) and (stop == start or size + weights[stop].shape[0] * width <= STACK_ELEMENTS):
            size += weights[stop].shape[0] * width
            stop += 1
        parts = [weight[:, :width].to(dtype) for weight in weights[start:stop]]
        stack = torch.cat(parts) if len(parts) > 1 else parts[0]
        edited = torch.addmm(stack, stack, left) if right is None else torch.addmm(stack, stack @ left, right)
        blocks = torch.split(edited, [len(part) for part in parts])
        for weight, new in zip(weights[start:stop], blocks, strict=True):
            whole = new.to(weight.dtype)
            result.append(torch.cat([whole, weight[:, width:]], dim=1) if width < weight.shape[1] else whole)
        start = stop
    return result
