"""A model's folder from a path, or from the Hugging Face hub: its local cache first, then the network."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .folder import PICKLES, read_json
from .reference import FOLDER, NAME, reference_model

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# No pickles, and no single-file checkpoint beside the folders. The card and the licence go with whatever is made of it.
_PATTERNS = [
    *("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"),
]
_SNAPSHOT = re.compile(r"(?:^|[\\/])models--([^\\/]+)[\\/]snapshots[\\/]([0-9a-f]{40})(?:[\\/]+(.+))?$")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name."""
    return _HUB_ID.match(name) is not None


def public_name(where: str | Path) -> dict[str, str]:
    """What a model is called in a record, which may be published: no folder of this machine.

    "model": the hub id of a folder in the hub's cache, `emoji`, or the last part of the path; with "revision" for what
    is in the hub's cache, and "hub_id" for a single file there.
    """
    path, match = Path(where), _SNAPSHOT.search(str(where))
    if match is None:
        return {"model": NAME if path == FOLDER else path.name or path.resolve().name}
    name, revision = match[1].replace("--", "/", 1), match[2]
    if match[3] is None:
        return {"model": name, "revision": revision}
    return {"model": path.name, "revision": revision, "hub_id": name}


def hub_id(data: Mapping[str, Any]) -> str | None:
    """The hub id of the model that a record names, None where it is not known."""
    name = str(data.get("hub_id") or data.get("model") or "")
    return name if is_hub_id(name) else None


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot holds every component; a download that was broken off leaves some out."""
    try:
        index = read_json(folder / "model_index.json")
    except CheckpointError:
        return False
    names = [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]
    weights = [name for name in names if name.startswith(("unet", "text_encoder", "vae"))]
    return all((folder / name).is_dir() for name in names) and all(
        any((folder / name).glob("*.safetensors")) for name in weights
    )


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`: a path that exists, else `emoji`, else a hub id. Raises `CheckpointError`."""
    path = Path(os.path.expanduser(model))
    if str(model) == NAME and not os.path.exists(path):
        return reference_model()
    # unlike Path.exists, os.path.exists never raises; a name that ends like a weight file is no hub id
    if os.path.exists(path) or path.suffix in (*PICKLES, ".safetensors") or not _HUB_ID.match(str(model)):
        return path
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS, local_files_only=True))
        if _complete(folder):
            return folder
    except (OSError, ValueError):  # not in the cache (LocalEntryNotFoundError is an OSError), or not a valid id
        pass
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client has many kinds: offline, not found, gated, no space
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model}: no such folder, not in the hub cache, and the hub did not give it ({first}). Check the name, "
            "the network, and for gated models `hf auth login`"
        ) from error
