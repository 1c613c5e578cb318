"""W' = W M for every layer: products in float32, one cast at the end. Imports torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import full_precision
from .solve import Factor


@full_precision()
def apply_factor(factor: Factor, weights: Sequence[Tensor], columns: int | None = None) -> list[Tensor]:
    """New weights W M, in the dtype of each W [n_i, d], for the first `columns` columns (None: all of them).

    Computed as W + (W U) V (4 n d r flops) or W + W (M - I) (2 n d^2) in float32; a float64 weight in float64. One
    product a layer: each is large enough, and stacking them first would only copy every weight once more.
    """
    width = factor.width if columns is None else columns
    cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}
    result: list[Tensor] = []
    for weight in weights:
        dtype = torch.promote_types(torch.float32, weight.dtype)
        key = (weight.device, dtype)
        if key not in cast:
            # in one memory layout: another one may round otherwise, and a stored factor would give other bits
            right = None if factor.right is None else factor.right.to(weight.device, dtype).contiguous()
            cast[key] = (factor.left.to(weight.device, dtype).contiguous(), right)
        left, right = cast[key]
        text = weight[:, :width].to(dtype).contiguous()
        new = torch.addmm(text, text, left) if right is None else torch.addmm(text, text @ left, right)
        whole = new.to(weight.dtype)
        result.append(torch.cat([whole, weight[:, width:]], dim=1) if width < weight.shape[1] else whole)
    return result
