"""A diffusers folder: what is in it, its text encoders, and writing an edited copy without building the denoiser."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .embeddings import CACHE_LINE, PromptEncoder
from .errors import CheckpointError
from .folder import PICKLES, chosen_weights, read_json, weight_sets
from .projections import Projection, text_projections
from .tensorfile import TensorFile, open_tensors
from .unedited import unedited_copies

ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True)
class Denoiser:
    """One component that reads the text (U-Net, ControlNet), with every set of weights that it has on disk.

    `files` are the weight files of all variants: an edit changes each, so that none keeps the concept.
    """

    name: str
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]
    projections: tuple[Projection, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder, opened: its place, its text encoders, its denoisers, and files that must not be copied.

    `variant`: of the weights that were asked for, None for the plain ones.
    """

    root: Path
    encoder: PromptEncoder
    denoisers: tuple[Denoiser, ...]
    dropped: tuple[Path, ...]
    variant: str | None = None

    @property
    def where(self) -> str:
        return str(self.root)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for denoiser in self.denoisers for p in denoiser.projections)


def open_checkpoint(
    root: Path,
    *,
    variant: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = False,
    widths: tuple[int, int | None] | None = None,
) -> Checkpoint:
    """Open a diffusers folder (or a single file: `open_single`) of Stable Diffusion 1.x, 2.x or XL.

    The text encoders are loaded in `dtype` (float32 unless told); of the denoisers only the headers are read. Where
    the `widths` of the states and of the pooled state are given, no text encoder is loaded. Raises
    `CheckpointError` or `ProjectionError`.
    """
    if not os.path.exists(root):  # unlike Path.exists, never raises
        kind = "file" if root.suffix in (*PICKLES, ".safetensors") else "folder"
        raise CheckpointError(
            f"{root}: no such {kind}; give a diffusers folder, a .safetensors file or a hub id such as owner/name"
        )
    if root.is_file():
        from .singlefile import open_single

        return open_single(root, variant=variant, device=device, dtype=dtype, progress=progress, widths=widths)
    index = read_json(root / "model_index.json")
    if widths is None:
        encoder = load_encoder(root, variant, device, dtype, progress)
        widths = encoder_widths(encoder)
    else:
        encoder = PromptEncoder((), penultimate="text_encoder_2" in index, progress=progress)
    denoisers = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if not (folder / "config.json").is_file() or folder.name.startswith(("text_encoder", "vae", "safety")):
            continue
        config = read_json(folder / "config.json")
        if "cross_attention_dim" in config and (folder.name == "unet" or config["cross_attention_dim"] == widths[0]):
            denoisers.append(_open_denoiser(folder, config, widths))
    if not any(denoiser.name == "unet" for denoiser in denoisers):
        others = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise CheckpointError(
            f"{root}: no U-Net (unet/config.json with cross_attention_dim) among {', '.join(others)}; Stable Diffusion "
            "1.x, 2.x and XL are supported"
        )
    edited = {file.path for denoiser in denoisers for file in denoiser.files}
    return Checkpoint(root, encoder, tuple(denoisers), unedited_copies(root, edited), variant)


def encoder_widths(encoder: PromptEncoder) -> tuple[int, int | None]:
    """(width of the states, width of the pooled state or None)."""
    width = sum(int(model.config.hidden_size) for _, model in encoder.pairs)
    return width, int(encoder.pairs[-1][1].config.projection_dim) if encoder.penultimate else None


def _open_denoiser(folder: Path, config: Mapping[str, Any], widths: tuple[int, int | None]) -> Denoiser:
    files, projections = [], []
    for variant, paths in weight_sets(folder).items():
        opened = [open_tensors(path) for path in paths]
        shapes = {name: entry.shape for file in opened for name, entry in file.entries.items()}
        where = f"{folder}" if variant is None else f"{folder} ({variant})"
        projections.append(text_projections(shapes, config, *widths, where))
        if other := set(projections[0]) ^ set(projections[-1]):
            name = min(projection.name for projection in other)
            raise CheckpointError(f"{folder}: its variants have different layers ({name}); take a sound copy of each")
        files += opened
    return Denoiser(folder.name, config, tuple(files), projections[0])


def encoder_parts(root: Path, index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(folder, class) of each text encoder that a model_index names, in the order in which their states are joined."""
    parts = []
    for suffix in ("", "_2", "_3"):
        name = f"text_encoder{suffix}"
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if entry[1] not in ENCODER_CLASSES:
            raise CheckpointError(
                f"{root / name}: {entry[1]} is not supported; only {' and '.join(ENCODER_CLASSES)} are"
            )
        parts.append((name, str(entry[1])))
    if not parts:
        raise CheckpointError(f"{root}: model_index.json names no text encoder; the edit needs one")
    return parts


def load_encoder(
    root: Path, variant: str | None, device: str, dtype: torch.dtype | None, progress: bool
) -> PromptEncoder:
    """The text encoders and tokenizers of a diffusers folder."""
    index, pairs = read_json(root / "model_index.json"), []
    for name, kind in encoder_parts(root, index):
        tokenizer = load_tokenizer(root / name.replace("text_encoder", "tokenizer"))
        pairs.append((tokenizer, _text_model(root / name, kind, variant, device, dtype)))
    return PromptEncoder(tuple(pairs), penultimate="text_encoder_2" in index, progress=progress)


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder, or `CheckpointError`."""
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the tokenizer is needed to read the concepts")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged tokenizer
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, (int, float)) or not 2 <= length < math.inf:
        raise CheckpointError(f"{folder}: its model_max_length is {length!r}, expected a number; take a sound copy")
    known = tokenizer.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = getattr(tokenizer, name)
        if token is not None and str(token) not in known:  # transformers looks for it without end
            raise CheckpointError(f"{folder}: its {name}, {token!r}, is not among its tokens; take a sound copy")
    return tokenizer


def _text_model(folder: Path, kind: str, variant: str | None, device: str, dtype: torch.dtype | None) -> Any:
    import transformers

    pick, paths = chosen_weights(folder, variant)
    for path in paths:
        file = open_tensors(path)
        for name in file.entries:
            if not name.endswith("position_ids"):
                file.read(name)  # NaN, truncation and quantised weights are found here, by name
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            str(folder),
            dtype=dtype or torch.float32,
            variant=pick,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a wrong shape, a missing field of the config, ...: all are a damaged folder here
        raise CheckpointError(f"{folder}: the text encoder cannot be loaded: {_first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(level)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}; take a sound copy")
    return place_model(model, device)


def place_model(model: Any, device: str) -> Any:
    """A model that is only run, on `device`; `CheckpointError` where there is no such device."""
    try:
        placed = model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no error of its own for this
        raise CheckpointError(f"device {device!r} cannot be used: {_first_line(error)}; leave --device out") from error
    for weight in placed.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % CACHE_LINE:
            weight.data = weight.data.clone()  # once, in place of the copy that `PromptEncoder` would keep
    return placed


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
