"""The record of an edit: `realera_edit.json`, header metadata, `inspect`, and the way back."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, history
from .checkpoint import Checkpoint
from .compute import space_report
from .errors import CheckpointError
from .folder import UNDO_FILE
from .front_matter import CARD, licence
from .history import header_of, read_record, recipe_in, record_before, record_beside, sidecars, undone_metadata
from .hub import is_hub_id, public_name
from .tensorfile import TensorFile, copy_tensors, open_tensors, rewrite
from .writer import copy_rest, copy_size, digest, staged

if TYPE_CHECKING:
    from .edit import EditResult
    from .pipeline import LoadedPipeline

RECORD = history.RECORD
UNDO = UNDO_FILE
METADATA_KEY = history.METADATA_KEY
EDIT_FILE_KEY = "realera_edit_file"


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
    dtype = _encoder_dtype(result)
    return {
        "realera_edit": __version__,
        **origin(result.source),
        "config": result.config.to_dict(),
        "concepts": concepts,
        "preserve": list(result.preserve),
        **({"prior": list(result.prior)} if result.prior else {}),
        **({"dtype": dtype} if dtype not in (None, "float32") else {}),
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
        **({"previous": list(result.previous)} if result.previous else {}),
    }


def origin(source: Checkpoint | LoadedPipeline) -> dict[str, Any]:
    """Name and licence of a model, as far as they are known, for a record."""
    if isinstance(source, Checkpoint):
        name, root = public_name(source.where), source.root
        # a card beside a single file is that file's only where the hub put it there
        terms = licence((root.parent if "hub_id" in name else root) / CARD)
        return {**name, **({"license": terms} if terms else {})}
    told = str(getattr(source.pipe, "name_or_path", None) or "")
    name = public_name(told)
    if "revision" in name:
        return name
    return {"model": told if is_hub_id(told) and not os.path.exists(told) else source.where}


def _encoder_dtype(result: EditResult) -> str | None:
    """The precision that the text encoder ran in, None where it did not run."""
    pairs = result.source.encoder.pairs
    return str(pairs[0][1].dtype).removeprefix("torch.") if pairs else None


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def header_metadata(result: EditResult) -> dict[str, str]:
    """What goes into the header of an edited weight file."""
    recipe = {
        "version": __version__,
        "concepts": [{"name": c.name, "target": c.target, "aliases": list(c.aliases)} for c in result.edit.concepts],
        "config": result.config.to_dict(),
    }
    return header_of(recipe, result.previous)


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_undo(
    path: Path, root: Path, chosen: Mapping[str, Sequence[str]], metadata: Mapping[str, str | None] | None = None
) -> None:
    """Store the original bytes of every edited tensor, named "file::tensor", and what else was in the header."""
    files = {relative: open_tensors(root / relative) for relative in chosen}
    tensors = {f"{relative}::{name}": (files[relative], name) for relative, names in chosen.items() for name in names}
    told = {"undo": True, "version": __version__, **({"metadata": dict(metadata)} if metadata else {})}
    copy_tensors(path, tensors, {METADATA_KEY: json.dumps(told, ensure_ascii=False)})


def inspect_path(path: str | Path) -> dict[str, Any]:
    """The record of an edited folder, an edit file, or an edited weight file's header. `CheckpointError` if none."""
    path = Path(path)
    if path.is_dir():
        if not (path / RECORD).is_file():
            raise CheckpointError(f"{path}: no {RECORD}; this folder was not written by realera-edit")
        data = read_record(path / RECORD)
        data["undo"] = (path / UNDO).is_file()
        return data
    file = open_tensors(path)
    if EDIT_FILE_KEY in file.metadata:
        from .editfile import EditFile

        return EditFile.load(path).to_dict()
    recipe = recipe_in(file)
    if recipe is None:
        raise CheckpointError(f"{path}: its header has no record of an edit")
    whole = record_beside(path, recipe) if "concepts" in recipe else None
    if whole is None:
        return recipe
    return {**whole, "undo": sidecars(path)[1].is_file()}


def undo_folder(path: str | Path, out: str | Path, *, force: bool = False, progress: bool = False) -> Path:
    """Write the folder `out` as `path` with the original weights, to the bit; `path` stays as it is.

    Our part of the model card goes, too. Raises `CheckpointError` where the undo file is missing or damaged, or a
    weight is not the one that the edit wrote.
    """
    from .card import restore

    root, out = Path(path), Path(out)
    data = inspect_path(root)
    tensors: dict[str, dict[str, dict[str, str]]] = data["tensors"]
    if not (root / UNDO).is_file():
        raise CheckpointError(f"{root}: no {UNDO}: it was saved without one, or the file was deleted before publishing")
    stored = open_tensors(root / UNDO)
    originals = originals_of(stored, tensors, root / RECORD)
    files = {relative: open_tensors(root / relative) for relative in originals}
    for relative, names in originals.items():
        for name in names:
            check_hashes(files[relative], stored, relative, name, tensors[relative][name])
    skip = {file.path for file in files.values()} | {root / UNDO, root / RECORD}
    needed = copy_size(root, out, skip, False) + sum(file.path.stat().st_size for file in files.values())
    with staged(out, force=force, needed=needed, source=root) as folder:
        copy_rest(root, folder, skip, False, progress)
        for relative, file in files.items():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            restored = ((name, stored.read(f"{relative}::{name}")) for name in originals[relative])
            rewrite(file, folder / relative, undone_metadata(data), originals[relative], restored)
        if (before := record_before(data)) is not None:
            write_record(folder / RECORD, before)
        restore(folder, before)
    return out


def originals_of(stored: TensorFile, tensors: Mapping[str, Mapping[str, Any]], record: Path) -> dict[str, list[str]]:
    """File -> the tensors to restore in it: those of the undo file, which must be those of the record."""
    originals: dict[str, list[str]] = {relative: [] for relative in tensors}
    for relative in tensors:
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise CheckpointError(f"{record}: names {relative!r}, which is outside of its folder; not restored")
    for key in stored.entries:
        relative, _, name = key.partition("::")
        if name not in tensors.get(relative, {}):
            raise CheckpointError(f"{stored.path}: {key} is not among the tensors that {record.name} names as edited")
        originals[relative].append(name)
    for relative, names in tensors.items():
        for name in names:
            if name not in originals[relative]:
                raise CheckpointError(f"{stored.path}: holds no original of {name} in {relative}; take a sound copy")
    return originals


def check_hashes(file: TensorFile, stored: TensorFile, relative: str, name: str, hashes: Mapping[str, str]) -> None:
    """Raise `CheckpointError` where a weight is not as the edit left it, or its stored original is damaged."""
    if name not in file.entries or digest(file.read(name)) != hashes["after"]:
        raise CheckpointError(f"{file.path}: {name} is not as the edit left it; undo would mix two models")
    if digest(stored.read(f"{relative}::{name}")) != hashes["before"]:
        raise CheckpointError(f"{stored.path}: the original of {name} is damaged; take a sound copy")
