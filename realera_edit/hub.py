"""A model's folder from a path, or from the Hugging Face hub: its local cache first, then the network."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# No pickles, and no single-file checkpoint beside the folders.
_PATTERNS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`: a path that exists, else a hub id. Raises `CheckpointError`."""
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.match(str(model)):
        return path
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS, local_files_only=True))
        if (folder / "model_index.json").is_file() and any(folder.glob("unet/*.safetensors")):
            return folder
    except OSError:  # not in the cache; LocalEntryNotFoundError is one
        pass
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client has many kinds: offline, not found, gated, no space
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model}: no such folder, not in the hub cache, and the hub did not give it ({first}). Check the name, "
            "the network, and for gated models `hf auth login`"
        ) from error
