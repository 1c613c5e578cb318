"""What lies in a model's folder: its JSON files, its sets of weights, and all else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CheckpointError

UNDO_FILE = "realera_edit_undo.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CONVERT = (
    'python -c "from diffusers import DiffusionPipeline as P; '
    "P.from_pretrained('{path}', use_safetensors=False).save_pretrained('{path}-safetensors')\""
)
_WEIGHTS = re.compile(
    r"^(?P<stem>model|diffusion_pytorch_model)(\.(?P<variant>[\w-]+?))?(?P<shard>-\d{5}-of-\d{5})?\.safetensors$"
)


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
