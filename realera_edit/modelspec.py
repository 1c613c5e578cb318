"""Header metadata that programs read: the ModelSpec (`modelspec.*`, version 1.0.1) and kohya's keys (`ss_*`).

Only what is known to be true is written. The architecture is told by the U-Net's shapes, and by its scheduler where
shapes do not tell. No date is written unless the caller gives one: the same edit gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError
from .history import METADATA_KEY
from .tensorfile import TensorFile

VERSION = "1.0.1"
_SPEC = "modelspec."
_TITLE, _DATE, HASH = f"{_SPEC}title", f"{_SPEC}date", f"{_SPEC}hash_sha256"
_NO_HASH = "0x" + "0" * 64
_SGM, _DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"
_KEY = re.compile(r".*\.attn2\.to_k\.weight")
_INPUT = ("input_blocks.0.0.weight", "conv_in.weight")
# of the first convolution; others are inpainting models, or of no family here
_CHANNELS = (320, 4)
# (cross-attention keys in the U-Net, width of the text states) -> kind
FAMILIES = {(16, 768): "v1", (16, 1024): "v2", (70, 2048): "xl"}
# kind -> architecture, resolution, kohya's name
_KINDS = {
    "v1": ("stable-diffusion-v1", "512x512", "sd_v1"),
    "v2-512": ("stable-diffusion-v2-512", "512x512", "sd_v2"),
    "v2-768-v": ("stable-diffusion-v2-768-v", "768x768", "sd_v2_v"),
    "xl": ("stable-diffusion-xl-v1-base", "1024x1024", "sdxl_base_v1-0"),
}
# (what the network predicts, width of its latents) -> which of the two SD 2.x, whose shapes are the same
_SECOND = {("epsilon", "64"): "v2-512", ("v_prediction", "96"): "v2-768-v"}
_RESERVED = (METADATA_KEY, "realera_edit_file", "format", HASH)


def kind_of(
    shapes: Mapping[str, Sequence[int]],
    prefix: str = "",
    *,
    told: str | None = None,
    unet: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> str | None:
    """Which Stable Diffusion the U-Net whose keys begin with `prefix` is: "v1", "v2-512", "v2-768-v", "xl"; or None.

    "v2" is one of the two whose shapes are the same, where neither `told` (the architecture that the file itself
    states) nor the configurations of the U-Net and of the scheduler say which.
    """
    own = {name[len(prefix) :]: tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}
    keys = [shape for name, shape in own.items() if _KEY.fullmatch(name)]
    first: tuple[int, ...] = next((own[name] for name in _INPUT if name in own), ())
    widths = {shape[-1] for shape in keys}
    if first[:2] != _CHANNELS or len(widths) != 1:
        return None
    found = FAMILIES.get((len(keys), widths.pop()))
    if found != "v2":
        return found
    stated = next((kind for kind, (name, _, _) in _KINDS.items() if name == told and kind.startswith("v2")), None)
    predicts, width = (scheduler or {}).get("prediction_type", "epsilon"), (unet or {}).get("sample_size")
    return stated or _SECOND.get((str(predicts), str(width)), "v2")


def check_given(given: Mapping[str, str]) -> None:
    """Raise `ConfigError` for metadata that a caller cannot give."""
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, str) or not key:
            raise ConfigError(f"metadata {key!r} = {value!r}: keys and values are text, and no key is empty")
        if key in _RESERVED:
            raise ConfigError(f"metadata {key!r}: is written by realera-edit itself; leave it out")


def of_checkpoint(
    file: TensorFile, prefix: str, names: Sequence[str], before: Sequence[str], given: Mapping[str, str]
) -> dict[str, str | None]:
    """Changes of a single file's metadata by an edit: key -> new value, None where the key goes.

    `names`: what is erased now, `before`: what was erased earlier. The file's own keys stay, but for the title, which
    tells what was erased, and the hash and the date, which are no longer true. `given` goes before all.
    """
    own = file.metadata
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    kind = kind_of(shapes, prefix, told=own.get(f"{_SPEC}architecture"))
    changes: dict[str, str | None] = {}
    if kind in _KINDS:
        layout = _SGM if any(name.startswith(f"{prefix}{_INPUT[0]}") for name in shapes) else _DIFFUSERS
        changes |= {key: value for key, value in _spec(kind, layout).items() if key not in own}
    if changes or _TITLE in own:
        old = own.get(_TITLE, file.path.stem)
        if before and old.endswith(_without(before)):
            old, names = old.removesuffix(_without(before)), (*before, *names)
        changes[_TITLE] = old + _without(names)
    stale = [key for key in own if key == _DATE or key.startswith(f"{_SPEC}hash_")]
    changes |= dict.fromkeys(stale, None) | ({HASH: _NO_HASH} if HASH in own else {})
    return changes | dict(given)


def of_lora(
    kind: str | None, format: str, title: str, ranks: Sequence[int], alpha: float, given: Mapping[str, str]
) -> dict[str, str]:
    """Metadata of an exported LoRA. `kind`: of the model (`kind_of`); `ranks`: of its layers."""
    found: dict[str, str] = {}
    if kind in _KINDS:
        layout = _SGM if kind == "xl" and format != "diffusers" else _DIFFUSERS
        spec = _spec(kind, layout)
        spec[f"{_SPEC}architecture"] += "/lora"
        found = {**spec, _TITLE: title, HASH: _NO_HASH}
    if format == "kohya":
        rank = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"  # as kohya's resizing tool calls it
        found |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": str(alpha)}
    if format != "diffusers" and kind is not None:
        found |= {"ss_v2": str(kind.startswith("v2"))}
        found |= {"ss_base_model_version": _KINDS[kind][2]} if kind in _KINDS else {}
    return {**found, **given}


def _spec(kind: str, implementation: str) -> dict[str, str]:
    architecture, resolution, _ = _KINDS[kind]
    values = {
        "sai_model_spec": VERSION,
        "architecture": architecture,
        "implementation": implementation,
        "resolution": resolution,
    }
    return {f"{_SPEC}{key}": value for key, value in values.items()}


def _without(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" (without {', '.join(names[:3])}{more})"


def seal(path: Path) -> None:
    """Put the hash of all tensors into the header of a file that was written with a place for it."""
    place = f'"{HASH}":"{_NO_HASH}"'.encode()
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        at = file.read(length).find(place)
        if at < 0:
            return
        digest = hashlib.sha256()
        while data := file.read(2**22):
            digest.update(data)
        file.seek(8 + at + len(place) - 65)
        file.write(digest.hexdigest().encode() + b'"')


def replaced(changes: Mapping[str, str | None], own: Mapping[str, str]) -> dict[str, str | None]:
    """What `changes` replace of a file's metadata, to be put back: None where there was nothing."""
    return {key: own.get(key) for key in changes if changes[key] != own.get(key)}


def originals_in(stored: TensorFile) -> dict[str, str | None]:
    """What a file of original weights says of the metadata before the edit. Raises `CheckpointError`."""
    try:
        found = json.loads(stored.metadata.get(METADATA_KEY, "{}")).get("metadata", {})
        sound = all(value is None or isinstance(value, str) for value in found.values())
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{stored.path}: the metadata in its header is damaged; take a sound copy")
    return dict(found)
