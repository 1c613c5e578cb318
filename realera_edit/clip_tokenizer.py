"""CLIP's tokenizer for a single file, which holds none: from a folder that is named, or the local hub cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import load_tokenizer
from .errors import CheckpointError

# All of these hold the same vocabulary; (repository, folder in it).
_CACHED = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
_HOW = (
    "a folder with vocab.json and merges.txt, such as tokenizer/ of any Stable Diffusion folder: --tokenizer DIR "
    "(tokenizer=)"
)


def find_tokenizer(given: str | Path | None, where: str) -> Path:
    """The folder to read CLIP's vocabulary from. Nothing is downloaded. Raises `CheckpointError` where there is none.

    `given`: a folder with the two text files (or a `tokenizer.json`), or a model folder with a `tokenizer/`. `where`:
    the file that needs it.
    """
    if given is not None:
        folder = Path(given).expanduser()
        for place in (folder, folder / "tokenizer", folder / "tokenizer_2"):
            if _complete(place):
                return place
        raise CheckpointError(f"{folder}: no tokenizer there; give {_HOW}")
    found = _cached()
    if found is None:
        raise CheckpointError(
            f"{where}: a single file holds no tokenizer, and CLIP's is not in the local hub cache. Give {_HOW}; or put "
            "it into the cache once: hf download openai/clip-vit-large-patch14 vocab.json merges.txt"
        )
    return found


def _complete(folder: Path) -> bool:
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return pair or (folder / "tokenizer.json").is_file()


def _cached() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, inside in _CACHED:
        found = try_to_load_from_cache(repository, f"{inside}vocab.json")
        if isinstance(found, str) and _complete(Path(found).parent):
            return Path(found).parent
    return None


def tokenizer_for(folder: Path, rows: int, pads_with_first: bool, where: str) -> Any:
    """The tokenizer in `folder`, checked against the `rows` of a token embedding, with the padding of its encoder.

    CLIP's own encoder is padded with the end token, the OpenCLIP encoders of SD 2.x and SDXL with token 0 ("!"),
    whatever the folder says. Raises `CheckpointError`.
    """
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != rows:
        raise CheckpointError(
            f"{where}: its text encoder knows {rows} tokens, the tokenizer in {folder} {len(tokenizer)}; give the "
            "tokenizer of this model with --tokenizer DIR (tokenizer=)"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0) if pads_with_first else tokenizer.eos_token
    return tokenizer
