"""The record of an edit: `realera_edit.json`, header metadata, `inspect`, and the way back."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint import UNDO_FILE, read_json
from .compute import space_report
from .errors import CheckpointError
from .report import render
from .tensorfile import TensorFile, open_tensors, rewrite, write_tensors
from .writer import copy_rest, digest, staged

if TYPE_CHECKING:
    from .edit import EditResult

RECORD = "realera_edit.json"
UNDO = UNDO_FILE
METADATA_KEY = "realera_edit"
EDIT_FILE_KEY = "realera_edit_file"
_SIDES = ("before", "after")


def versions() -> dict[str, str]:
    """Versions of everything that the bytes of an edit depend on."""
    found = {"realera_edit": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "diffusers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def record(result: EditResult) -> dict[str, Any]:
    """Everything about an edit as plain JSON types: recipe, outcome, hashes. The same edit gives the same record."""
    edit = result.edit
    concepts = []
    for index, concept in enumerate(edit.concepts):
        mine = [(g, float(r)) for g, r in zip(edit.groups, edit.residual, strict=True) if g.concept == index]
        words = {word: value for hood in edit.neighbourhoods[index] for word, value in hood.inside}
        concepts.append(
            {
                **asdict(concept),
                "aliases": list(concept.aliases),
                "residual": {g.name: _round(r) for g, r in mine if g.role != "word"},
                "near": {
                    word: _round(value) for hood in edit.neighbourhoods[index][:1] for word, value in hood.outside
                },
                "words": {g.name: _round(words.get(g.name, math.nan)) for g, _ in mine if g.role == "word"},
            }
        )
    return {
        "realera_edit": __version__,
        "model": result.source.where,
        "config": result.config.to_dict(),
        "concepts": concepts,
        "preserve": list(result.preserve),
        "drift": {name: {"mean": _round(mean), "worst": _round(worst)} for name, mean, worst in edit.drift},
        "projections": result.counts(),
        "spaces": {
            name: {k: _round(v) if isinstance(v, float) else v for k, v in space_report(solution).items()}
            for name, solution in (("cross", edit.cross), ("pooled", edit.pooled))
            if solution is not None
        },
        "text_encoder": edit.fingerprint,
        "versions": versions(),
        "tensors": result.tensors,
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def header_metadata(result: EditResult) -> dict[str, str]:
    """What goes into the header of an edited weight file."""
    recipe = {
        "version": __version__,
        "concepts": [{"name": c.name, "target": c.target, "aliases": list(c.aliases)} for c in result.edit.concepts],
        "config": result.config.to_dict(),
    }
    return {METADATA_KEY: json.dumps(recipe, ensure_ascii=False)}


def write_undo(path: Path, root: Path, chosen: Mapping[str, Sequence[str]]) -> None:
    """Store the original bytes of every edited tensor, named "file::tensor"."""
    tensors = {}
    for relative, names in chosen.items():
        file = open_tensors(root / relative)
        for name in names:
            entry = file.entries[name]
            tensors[f"{relative}::{name}"] = (entry.dtype, entry.shape, lambda f=file, n=name: f.read_bytes(n))
    write_tensors(path, tensors, {METADATA_KEY: json.dumps({"undo": True, "version": __version__})})


def inspect_path(path: str | Path) -> dict[str, Any]:
    """The record of an edited folder, an edit file, or an edited weight file's header. `CheckpointError` if none."""
    path = Path(path)
    if path.is_dir():
        if not (path / RECORD).is_file():
            raise CheckpointError(f"{path}: no {RECORD}; this folder was not written by realera-edit")
        data = read_json(path / RECORD)
        _check_record(path / RECORD, data)
        data["undo"] = (path / UNDO).is_file()
        return data
    metadata = open_tensors(path).metadata
    if EDIT_FILE_KEY in metadata:
        from .editfile import EditFile

        return EditFile.load(path).to_dict()
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path}: its header has no record of an edit")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the record in its header is damaged: {error}") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path}: the record in its header is damaged: not a mapping")
    return recipe


def _check_record(path: Path, data: Mapping[str, Any]) -> None:
    try:
        render(data)
        hashes = [pair[side] for file in data["tensors"].values() for pair in file.values() for side in _SIDES]
        sound = all(isinstance(value, str) for value in hashes)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error}); take a sound copy") from error
    if not sound:
        raise CheckpointError(f"{path}: is damaged: its hashes are not text; take a sound copy")


def undo_folder(path: str | Path, out: str | Path, *, force: bool = False, progress: bool = False) -> Path:
    """Write the folder `out` as `path` with the original weights, to the bit; `path` stays as it is.

    Raises `CheckpointError` where the undo file is missing or damaged, or a weight is not the one that the edit wrote.
    """
    root, out = Path(path), Path(out)
    tensors: dict[str, dict[str, dict[str, str]]] = inspect_path(root)["tensors"]
    if not (root / UNDO).is_file():
        raise CheckpointError(f"{root}: no {UNDO}: it was saved without one, or the file was deleted before publishing")
    stored = open_tensors(root / UNDO)
    originals = _originals(stored, tensors, root)
    files = {relative: open_tensors(root / relative) for relative in originals}
    for relative, names in originals.items():
        for name in names:
            _check_hashes(files[relative], stored, relative, name, tensors[relative][name])
    skip = {file.path for file in files.values()} | {root / UNDO, root / RECORD}
    needed = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    with staged(out, force=force, needed=needed, source=root) as folder:
        copy_rest(root, folder, skip, False, progress)
        for relative, file in files.items():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            restored = ((name, stored.read(f"{relative}::{name}")) for name in originals[relative])
            rewrite(
                file, folder / relative, {METADATA_KEY: json.dumps({"undone": True, "version": __version__})}, restored
            )
    return out


def _originals(stored: TensorFile, tensors: Mapping[str, Mapping[str, Any]], root: Path) -> dict[str, list[str]]:
    """File -> the tensors to restore in it: those of the undo file, which must be those of the record."""
    originals: dict[str, list[str]] = {relative: [] for relative in tensors}
    for relative in tensors:
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise CheckpointError(f"{root / RECORD}: names {relative!r}, which is outside of its folder; not restored")
    for key in stored.entries:
        relative, _, name = key.partition("::")
        if name not in tensors.get(relative, {}):
            raise CheckpointError(f"{root / UNDO}: {key} is not among the tensors that {RECORD} names as edited")
        originals[relative].append(name)
    for relative, names in tensors.items():
        for name in names:
            if name not in originals[relative]:
                raise CheckpointError(f"{root / UNDO}: holds no original of {name} in {relative}; take a sound copy")
    return originals


def _check_hashes(file: TensorFile, stored: TensorFile, relative: str, name: str, hashes: Mapping[str, str]) -> None:
    if name not in file.entries or digest(file.read(name)) != hashes["after"]:
        raise CheckpointError(f"{file.path}: {name} is not as the edit left it; undo would mix two models")
    if digest(stored.read(f"{relative}::{name}")) != hashes["before"]:
        raise CheckpointError(f"{stored.path}: the original of {name} is damaged; take a sound copy")
