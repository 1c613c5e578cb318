"""All layers at once: the sums over their text projections that every loss in the model's own metric needs.

sum_l |W'_l x - W_l y|^2 = x^T A x - 2 x^T B y + y^T Q y with A = sum W'^T W', B = sum W'^T W and Q = sum W^T W, each
[d, d]: read the weights once, and the number of layers is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Denoiser
from .errors import ProjectionError
from .folder import chosen_weights
from .projections import Projection, selected
from .tensorfile import TensorFile

if TYPE_CHECKING:
    from .pipeline import LoadedPipeline


ANOTHER = "another model? Compare an edit with the model that it was made of"


@dataclass(frozen=True)
class Layers:
    """Sums over the layers of the cross-attention's text space, float64 [d, d]; `count`: how many weights were summed.

    `edited` A = sum W'^T W', `mixed` B = sum W'^T W, `original` Q = sum W^T W.
    """

    edited: Tensor
    mixed: Tensor
    original: Tensor
    count: int

    @classmethod
    def of_factor(cls, factor: Tensor, metric: Tensor, count: int = 0) -> Layers:
        """Of W' = W M in all layers: A = M^T Q M, B = M^T Q. `factor` M, `metric` Q [d, d]."""
        mixed = factor.T @ metric
        return cls(mixed @ factor, mixed, metric, count)


def text_weights(
    source: Checkpoint | LoadedPipeline, variant: str | None = None
) -> Iterator[tuple[str, Projection, Tensor]]:
    """(component, projection, weight [n, d]) of every text projection, before any edit.

    Of a folder one weight at a time is read, among those of `variant` (default: what it was opened with) where there
    are any, else of the plain ones. Raises `CheckpointError` for a damaged one.
    """
    if not isinstance(source, Checkpoint):
        yield from source.original_weights()
        return
    for denoiser in source.denoisers:
        places = _places(source, denoiser, variant or source.variant)
        for projection in denoiser.projections:
            yield denoiser.name, projection, places[projection.name].read(projection.name)


def _places(source: Checkpoint, denoiser: Denoiser, variant: str | None) -> dict[str, TensorFile]:
    """Weight name -> the file that holds it, among those that a pipeline would load; a single file has but one."""
    files = denoiser.files
    if source.root.is_dir():
        _, paths = chosen_weights(source.root / denoiser.name, variant)
        files = tuple(file for file in files if file.path in paths)
    return {name: file for file in files for name in file.entries}


def metric(source: Checkpoint | LoadedPipeline, edit: str = "kv") -> Tensor:
    """Q = sum_l W_l^T W_l [d, d], float64, over the cross-attention projections that an edit of `edit` changes.

    Seconds for Stable Diffusion 1.x and 2.x on a few cores, about half a minute for XL (1.4 TFLOP).
    """
    chosen = set(selected(source.projections, edit, False))
    total = _Sum()
    for _, projection, weight in text_weights(source):
        if projection in chosen:
            wide = weight.to("cpu", torch.float64)
            total.add(wide.T @ wide)
    return total.found(source.where)


def compare(original: Checkpoint | LoadedPipeline, edited: Checkpoint | LoadedPipeline) -> Layers:
    """The sums over the cross-attention projections of a model before and after an edit, whoever made it.

    One may be a folder and the other a single file. Raises `ProjectionError` where the two have different projections.
    """
    variant = original.variant if isinstance(original, Checkpoint) else None
    after = dict(_drawn(edited, variant))
    sums = [_Sum() for _ in range(3)]
    count = 0
    for place, before in _drawn(original):
        new = after.pop(place, None)
        if new is None or new.shape != before.shape:
            raise ProjectionError(f"{edited.where}: has no {' '.join(place)} like {original.where}; {ANOTHER}")
        w, v = before.to("cpu", torch.float64), new.to("cpu", torch.float64)
        for total, product in zip(sums, (v.T @ v, v.T @ w, w.T @ w), strict=True):
            total.add(product)
        count += 1
    if after:
        raise ProjectionError(f"{original.where}: has no {' '.join(next(iter(after)))} like {edited.where}; {ANOTHER}")
    a, b, q = (total.found(original.where) for total in sums)
    return Layers(a, b, q, count)


def _drawn(source: Checkpoint | LoadedPipeline, variant: str | None = None) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Each cross-attention weight that draws, by its component and name in diffusers' layout, whatever its file's."""
    names = getattr(source, "diffusers_names", None)  # of a single file
    for component, p, weight in text_weights(source, variant):
        place = (component, p.name) if names is None else names.get((component, p.name))
        if p.role != "pooled" and place is not None:
            yield place, weight


class _Sum:
    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, product: Tensor) -> None:
        self._total = product if self._total is None else self._total.add_(product)

    def found(self, where: str) -> Tensor:
        if self._total is None:
            raise ProjectionError(f"{where}: no projection of the cross-attention was chosen")
        return self._total
