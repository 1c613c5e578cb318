"""The one way in: a diffusers folder, a hub id, a single file or a loaded pipeline, opened to be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, encoder_widths, open_checkpoint
from .errors import CheckpointError, ProjectionError
from .hub import resolve
from .layers import ANOTHER
from .pipeline import LoadedPipeline
from .singlefile import open_single

Source = Checkpoint | LoadedPipeline


def open_source(
    model: Any,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Source:
    """`model`, a path, hub id or loaded pipeline, with its text encoder; what is opened already is given back.

    The options are those of `edit_model`. Raises a `RealEraError`.
    """
    foreign = tokenizer is not None or text_encoder is not None
    if not isinstance(model, (str, Path)):
        if foreign:
            raise CheckpointError("a loaded pipeline has its own text encoder: leave tokenizer and text_encoder out")
        return model if isinstance(model, Source) else LoadedPipeline(model, progress=progress, dtype=dtype)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = resolve(model, revision)
    if os.path.isfile(path):  # unlike Path.is_file, never raises
        return open_single(
            path,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            variant=variant,
            device=place,
            dtype=dtype,
            progress=progress,
        )
    if foreign and os.path.isdir(path):
        raise CheckpointError(
            f"{path}: no single file; --tokenizer and --text-encoder are for those, leave them out for a folder"
        )
    return open_checkpoint(path, variant=variant, device=place, dtype=dtype, progress=progress)


def open_weights(model: Any, original: Source) -> Source:
    """`model` for its weights alone, to be compared with those of `original`: a path loads no text encoder.

    So a single file needs no tokenizer, and of the U-Net alone no text encoder. Raises a `RealEraError`.
    """
    if not isinstance(model, (str, Path)):
        return open_source(model)
    path = resolve(model)
    try:
        return open_checkpoint(path, widths=encoder_widths(original.encoder))
    except ProjectionError as error:
        raise ProjectionError(f"{path}: does not read the text of {original.where}; {ANOTHER} ({error})") from error
