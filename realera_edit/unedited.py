"""Weights in a folder that hold the same model unedited: copied or published along, they would keep the concept."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from .errors import CheckpointError, RealEraWarning
from .folder import PICKLES, UNDO_FILE, read_json, walk
from .tensorfile import open_tensors

_FOREIGN = (*PICKLES, ".msgpack", ".onnx", ".onnx_data", ".h5")  # weights in formats that are never opened
# The name of a weight that reads the text, in any layout; the EMA copies of a single file have no dots.
_READS_TEXT = re.compile(
    r"(?:.*\.)?(?:attn2\.to_(?:k|v|kv)|add_[kv]_proj)(?:\.base_layer)?\.weight|model_ema\..*attn2to_[kv]weight"
)
_READS_FRAMES = re.compile("motion_modules|temp_attentions|temporal")  # has an attn2, too
_DENOISER_FOLDER = re.compile("(?:unet|transformer|controlnet)(?:[_-].*)?", re.IGNORECASE)
_NO_DENOISER = re.compile("lora|adapter|embed|optimizer", re.IGNORECASE)  # additions to a model, which lie there too
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.[\w.-]+$)")


def unedited_copies(root: Path, edited: Collection[Path]) -> tuple[Path, ...]:
    """`unedited_weights` of a folder that is to be edited, with a warning: copied along they would keep the concept."""
    found = unedited_weights(root, edited)
    if found:
        warnings.warn(
            f"{root}: left out of the output, since they hold the model unedited: {name_some(found, root)}",
            RealEraWarning,
            stacklevel=3,
        )
    return found


def unedited_weights(root: Path, edited: Collection[Path]) -> tuple[Path, ...]:
    """Weight files below `root`, other than the `edited` ones, that may hold the same model unedited.

    At the root and beside `edited` each is one; elsewhere, what holds weights that read the text, with its other
    shards. A component that the edit passes over as it reads another width is none, nor is the undo file of the root.
    """
    folders = {path.parent for path in edited}
    widths = {None, *(_text_width(folder) for folder in folders)}
    known = {*edited, root / UNDO_FILE}
    others = [path for path, _ in walk(root) if path.suffix in (*_FOREIGN, ".safetensors") and path not in known]

    def is_copy(path: Path) -> bool:
        if path.parent in (root, *folders):
            return True
        other_text = path.parent.parent == root and _text_width(path.parent) not in widths
        return not other_text and _may_read_text(path, root)

    sets = {_SHARD.sub("", str(path)) for path in others if is_copy(path)}
    return tuple(path for path in others if _SHARD.sub("", str(path)) in sets)


def _text_width(folder: Path) -> str | None:
    """`cross_attention_dim` of a component as it is written in its config, None where there is none."""
    try:
        width = read_json(folder / "config.json").get("cross_attention_dim")
    except CheckpointError:
        return None
    return None if width is None else str(width)


def _may_read_text(path: Path, root: Path) -> bool:
    """Whether a safetensors file holds weights that read the text; of what is never opened, only its path tells."""
    if path.suffix != ".safetensors":
        folders = path.relative_to(root).parts[:-1]
        addition = _NO_DENOISER.search(f"{path.parent.name}/{path.name}")
        return not addition and any(map(_DENOISER_FOLDER.fullmatch, folders))
    if not os.path.isfile(path):
        return False
    try:
        names = open_tensors(path).entries
    except CheckpointError:  # damaged: nothing can draw with it
        return False
    return any(_READS_TEXT.fullmatch(name) and not _READS_FRAMES.search(name) for name in names)


def name_some(paths: Collection[Path], root: Path) -> str:
    """The first few of these files by their names below `root`, and how many there are if that is not all."""
    names = ", ".join(path.relative_to(root).as_posix() for path in list(paths)[:4])
    return f"{names} ... ({len(paths)} files)" if len(paths) > 4 else names
