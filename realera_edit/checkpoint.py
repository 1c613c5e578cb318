"""A diffusers folder: what is in it, its text encoders, and writing an edited copy without building the denoiser."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .embeddings import CACHE_LINE, PromptEncoder
from .errors import CheckpointError, RealEraWarning
from .projections import Projection, text_projections
from .tensorfile import TensorFile, open_tensors

ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
UNDO_FILE = "realera_edit_undo.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FOREIGN_WEIGHTS = (*PICKLES, ".msgpack", ".onnx", ".onnx_data", ".h5")
_CONVERT = (
    'python -c "from diffusers import DiffusionPipeline as P; '
    "P.from_pretrained('{path}', use_safetensors=False).save_pretrained('{path}-safetensors')\""
)
_WEIGHTS = re.compile(
    r"^(?P<stem>model|diffusion_pytorch_model)(\.(?P<variant>[\w-]+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors$"
)


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
    """A diffusers folder, opened: its place, its text encoders, its denoisers, and files that must not be copied."""

    root: Path
    encoder: PromptEncoder
    denoisers: tuple[Denoiser, ...]
    dropped: tuple[Path, ...]

    @property
    def where(self) -> str:
        return str(self.root)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for denoiser in self.denoisers for p in denoiser.projections)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or `CheckpointError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a diffusers folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def weight_sets(folder: Path) -> dict[str | None, tuple[Path, ...]]:
    """variant (None: the plain one) -> all its safetensors files, shards listed by their index."""
    sets: dict[str | None, tuple[Path, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = _WEIGHTS.match(path.name)
        if match and not match["shard"]:
            sets[match["variant"]] = (*sets.get(match["variant"], ()), path)
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        variant = path.name.partition(".safetensors.index")[2].removesuffix("json").strip(".") or None
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict):
            raise CheckpointError(f"{path}: has no weight_map; take a sound copy")
        shards = sorted(set(map(str, names.values())))
        for name in shards:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{path}: points to {name!r}, which is not a weight file in its own folder")
        # beside a whole file of the same variant, too: whichever of the two is loaded, it must be the edited one
        sets[variant] = (*sets.get(variant, ()), *(folder / name for name in shards))
    if not sets:
        pickles = [path.name for path in folder.glob("*") if path.suffix in PICKLES]
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickled weights ({pickles[0]}), which can run code when loaded and are never opened. "
                f"If you trust the file, convert it: {_CONVERT.format(path=folder.parent)}"
            )
        raise CheckpointError(f"{folder}: no .safetensors weights; is the download complete?")
    return sets


def chosen_weights(folder: Path, variant: str | None) -> tuple[str | None, tuple[Path, ...]]:
    """(variant, files) of the weights to read: those of `variant` if there are any, else the plain ones."""
    sets = weight_sets(folder)
    if variant is not None and variant not in sets and None not in sets:
        raise CheckpointError(f"{folder}: no variant {variant!r}; it has {', '.join(str(v) for v in sets)}")
    pick = variant if variant in sets else None if None in sets else next(iter(sets))
    return pick, sets[pick]


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
    return Checkpoint(root, encoder, tuple(denoisers), _unedited_copies(root, denoisers))


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
        files += opened
    return Denoiser(folder.name, config, tuple(files), projections[0])


def _unedited_copies(root: Path, denoisers: list[Denoiser]) -> tuple[Path, ...]:
    """Files that hold the same model unedited, in another format: copied along they would keep the concept."""
    found = [path for path in root.iterdir() if path.suffix in (*FOREIGN_WEIGHTS, ".safetensors") and path.is_file()]
    found = [path for path in found if path.name != UNDO_FILE]  # of an earlier edit, and never copied
    for denoiser in denoisers:
        folder = root / denoiser.name
        edited = {file.path for file in denoiser.files}
        found += [
            path
            for path in folder.iterdir()
            if path.suffix in (*FOREIGN_WEIGHTS, ".safetensors") and path not in edited
        ]
    if found:
        names = ", ".join(str(path.relative_to(root)) for path in found[:4])
        warnings.warn(
            f"{root}: left out of the output, since they hold the model unedited: {names}"
            + (" ..." if len(found) > 4 else ""),
            RealEraWarning,
            stacklevel=3,
        )
    return tuple(found)


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


def walk(root: Path) -> Iterator[tuple[Path, Path]]:
    """(absolute, relative) path of every file below `root`, in a fixed order; hidden hub caches are passed over.

    Linked folders are followed, unless they lead back to one that they are in.
    """
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        inside = (name for name in folders if name not in (".git", ".cache"))
        folders[:] = sorted(name for name in inside if (here / name).resolve() not in (here, *here.parents))
        for name in sorted(names):
            path = Path(folder) / name
            yield path, path.relative_to(root)
