"""A model in one `.safetensors` file, as A1111 and ComfyUI use it: opened by its keys, never built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from .checkpoint import Checkpoint, Denoiser, encoder_widths, load_encoder
from .clip_tokenizer import find_tokenizer
from .embeddings import PromptEncoder
from .errors import CheckpointError
from .file_encoders import find_encoders, load_encoders
from .fingerprint import EncoderSource, file_encoders, stored_encoders
from .folder import PICKLES
from .layouts import EMA, MAIN, ema_projections, file_projections, unet_prefixes
from .lora_layout import single_layout
from .tensorfile import TensorFile, open_tensors

# Nothing of the pickle is run: weights_only. Each tensor is cloned, since the format stores no views.
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "d = torch.load('{old}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
    "s.save_file({{k: v.clone() for k, v in d.items() if hasattr(v, 'clone')}}, '{new}')\""
)

_COMPONENTS = {"control_model": "controlnet"}  # network in a file -> component of a folder
_NO_ENCODER = (
    "holds no text encoder of Stable Diffusion 1.x, 2.x or XL (cond_stage_model.*, conditioner.*). Give a diffusers "
    "folder of the same family, whose text encoder it was trained with: --text-encoder DIR (text_encoder=)"
)


@dataclass(frozen=True)
class SingleFile(Checkpoint):
    """A single file, opened; `root` is the file. Its projections are named by their keys in it.

    `denoisers`: the U-Net, further networks that read the text (a ControlNet), and their EMA copies.
    """

    @property
    def file(self) -> TensorFile:
        return self.denoisers[0].files[0]

    @cached_property
    def diffusers_names(self) -> dict[tuple[str, str], tuple[str, str]]:
        """(network, weight) -> (component, weight) in a diffusers folder; no EMA copies, which draw nothing."""
        found: dict[tuple[str, str], tuple[str, str]] = {}
        for place, one in enumerate(self.denoisers):
            if one.name != EMA:
                component = _COMPONENTS.get(one.name, one.name) if place else "unet"
                paths = single_layout(self.file, one).paths
                found |= {(one.name, name): (component, f"{path}.weight") for name, path in paths.items()}
        return found


def open_single(
    path: Path,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = False,
    widths: tuple[int, int | None] | None = None,
) -> SingleFile:
    """Open a single file of Stable Diffusion 1.x, 2.x or XL. Raises `CheckpointError` or `ProjectionError`.

    `tokenizer`: a folder with vocab.json and merges.txt (default: CLIP's from the local hub cache). `text_encoder`: a
    diffusers folder, whose text encoders (of `variant`) and tokenizers are used in place of the file's: a file of the
    U-Net alone needs one. Only the text encoders are loaded, in `dtype` (float32 unless told); where the `widths` of
    the states and of the pooled state are given, not even those.
    """
    file, prefixes = _open_unet(path, text_encoder, variant)
    if widths is not None:
        encoder = PromptEncoder((), penultimate=widths[1] is not None, progress=progress)
    elif text_encoder is not None:
        encoder = _foreign_encoder(Path(text_encoder).expanduser(), tokenizer, variant, device, dtype, progress)
    else:
        stored = find_encoders(file.entries, str(path))
        if not stored:
            raise CheckpointError(f"{path}: {_NO_ENCODER}")
        folder = find_tokenizer(tokenizer, str(path))
        encoder = load_encoders(file, stored, folder, device, dtype, progress)
    widths = widths or encoder_widths(encoder)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    denoisers = []
    for prefix in prefixes:
        name = prefix.rstrip(".") or "unet"
        denoisers.append(Denoiser(name, {}, (file,), file_projections(shapes, prefix, *widths, str(path))))
        copies = ema_projections(shapes, denoisers[-1].projections, str(path)) if prefix == MAIN else ()
        if copies:
            denoisers.append(Denoiser(EMA, {}, (file,), copies))
    return SingleFile(path, encoder, tuple(denoisers), ())


def single_encoders(
    path: Path, text_encoder: str | Path | None = None, variant: str | None = None
) -> tuple[EncoderSource, ...]:
    """The text encoders that `open_single` would load, to be hashed: none is loaded. Raises `CheckpointError`."""
    file, _ = _open_unet(path, text_encoder, variant)
    if text_encoder is not None:
        return stored_encoders(Path(text_encoder).expanduser(), variant)
    found = file_encoders(file)
    if not found:
        raise CheckpointError(f"{path}: {_NO_ENCODER}")
    return found


def _open_unet(path: Path, text_encoder: str | Path | None, variant: str | None) -> tuple[TensorFile, list[str]]:
    """The file, and what stands before the blocks of its networks."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: a pickled checkpoint can run code when loaded and is never opened. Convert it: "
            + _CONVERT.format(old=path, new=path.with_suffix(".safetensors"))
        )
    if variant is not None and text_encoder is None:
        raise CheckpointError(f"{path}: a single file has no variants; leave --variant out")
    file = open_tensors(path)
    prefixes = unet_prefixes(file.entries)
    if not prefixes:
        raise CheckpointError(f"{path}: {_no_unet(file)}")
    return file, prefixes


def _foreign_encoder(
    folder: Path,
    tokenizer: str | Path | None,
    variant: str | None,
    device: str,
    dtype: torch.dtype | None,
    progress: bool,
) -> PromptEncoder:
    if tokenizer is not None:
        raise CheckpointError(f"{folder}: brings its own tokenizer; give --text-encoder alone, without --tokenizer")
    return load_encoder(folder, variant, device, dtype, progress)


def _no_unet(file: TensorFile) -> str:
    names = list(file.entries)
    if any("lora_" in name for name in names):
        return "a LoRA, not a checkpoint; erase from the model that it is used with"
    if any(part in name for name in names[:2000] for part in ("joint_blocks.", "double_blocks.", "double_stream")):
        return "a transformer (SD3, FLUX, ...), which has no cross-attention; Stable Diffusion 1.x, 2.x and XL are read"
    shown = ", ".join(names[:3]) or "nothing"
    return (
        f"no U-Net of Stable Diffusion 1.x, 2.x or XL (no attn2.to_k among its {len(names)} tensors: {shown} ...); "
        "give the whole checkpoint"
    )
