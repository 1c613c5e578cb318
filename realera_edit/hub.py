"""A model's folder from a path, or from the Hugging Face hub: its local cache first, then the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .checkpoint import PICKLES, read_json
from .errors import CheckpointError
from .reference import NAME, reference_model

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# No pickles, and no single-file checkpoint beside the folders.
_PATTERNS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]


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
