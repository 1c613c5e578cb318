"""Tiny models as one file each, beside the diffusers folder that they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import QUICK, UNET
from safetensors.torch import load_file, save_file

from benchmarks.shapes import pipeline
from benchmarks.single_file import UNET as PREFIX
from benchmarks.single_file import single_state, unet_name
from realera_edit import edit_model

SHAPES = ("tiny-sd15", "tiny-sd21", "tiny-sdxl")
METADATA = {"format": "pt", "modelspec.title": "作品"}


def build(shape: str, dtype: torch.dtype, base: Path) -> Path:
    """`folder` and `model.safetensors` in `base`; the file has metadata of its own, and tensors of other dtypes."""
    pipe = pipeline(shape, dtype)
    torch.manual_seed(0)
    for model in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        for parameter in () if model is None else model.parameters():
            if parameter.ndim == 1:  # gains of one and biases of zero would hide that two norms are mixed up
                parameter.data += 0.1 * torch.randn_like(parameter)
    pipe.save_pretrained(base / "folder")
    extra = {"steps": torch.arange(3), "odd": torch.ones(3).to(torch.float8_e4m3fn)}
    save_file(single_state(pipe) | extra, base / "model.safetensors", METADATA)
    return base


def change(path: Path, by: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a file with its tensors changed in place, or replaced by what `by` returns."""
    tensors = load_file(path)
    result = by(tensors)
    save_file(result if isinstance(result, dict) else tensors, path, METADATA)


def erase(model: Path, out: Path | None = None, concept: str = "cat", **options: Any) -> Any:
    """One quick edit, saved where `out` is given; the tokenizer is that of `folder` beside the file."""
    saving = {key: options.pop(key) for key in ("force", "link", "undo") if key in options}
    if model.is_file() and "text_encoder" not in options:
        options.setdefault("tokenizer", model.parent / "folder")
    result = edit_model(model, [concept], config=options.pop("config", QUICK), **options)
    if out is not None:
        result.save(out, **saving)
    return result


def as_single(folder: Path) -> dict[str, torch.Tensor]:
    """The U-Net of a folder under the keys of a single file."""
    from diffusers import UNet2DConditionModel

    config: Mapping[str, Any] = UNet2DConditionModel.load_config(folder / "unet")
    return {PREFIX + unet_name(name, config): weight for name, weight in load_file(folder / UNET).items()}
