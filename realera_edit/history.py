"""What earlier edits a model has been through: records and header recipes, carried into the record of the next edit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__, forms
from .errors import CheckpointError, RealEraWarning
from .folder import UNDO_FILE, read_json
from .tensorfile import TensorFile

RECORD = "realera_edit.json"
METADATA_KEY = "realera_edit"
PIPELINE = "the pipeline"  # what a record calls a model that was loaded by the caller


def sidecars(path: Path) -> tuple[Path, Path]:
    """Where the record and the original weights of an edited single file lie: beside it."""
    return path.with_name(f"{path.stem}.{RECORD}"), path.with_name(f"{path.stem}.{UNDO_FILE}")


def recipe_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that a header holds too, without earlier edits."""
    if "version" in record:
        return {name: value for name, value in record.items() if name != "previous"}
    concepts = [{name: row[name] for name in ("name", "target", "aliases")} for row in record["concepts"]]
    return {"version": record["realera_edit"], "concepts": concepts, "config": record["config"]}


def header_of(recipe: Mapping[str, Any], previous: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Header metadata for a recipe and the records of the edits before it."""
    earlier = {"previous": [recipe_of(old) for old in previous]} if previous else {}
    return {METADATA_KEY: json.dumps({**recipe, **earlier}, ensure_ascii=False)}


def recipe_in(file: TensorFile) -> dict[str, Any] | None:
    """The recipe in a weight file's header, None without one. Raises `CheckpointError` where it is damaged."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        recipe = json.loads(text)
        if not isinstance(recipe, dict):
            raise ValueError("not a mapping")
        # a file of original weights, and one that was undone, have no concepts
        forms.check(recipe, forms.recipe if "concepts" in recipe else forms.anything)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path}: the record in its header is damaged: {error}; take a sound copy"
        ) from error
    return recipe


def read_record(path: Path) -> dict[str, Any]:
    """A record whose form is sound. Raises `CheckpointError`."""
    data = read_json(path)
    try:
        forms.check(data, forms.record)
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); take a sound copy") from error
    return data


def record_beside(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The whole record beside a single file, where it is there and tells of the edit that the header tells of."""
    beside, _ = sidecars(path)
    if not beside.is_file():
        return None
    data = read_record(beside)
    if recipe_of(data) == {name: value for name, value in recipe.items() if name != "previous"}:
        return data
    warnings.warn(
        f"{beside}: is the record of another edit than that of {path.name}, and passed over", RealEraWarning, 3
    )
    return None


def previous_records(root: Path, files: Sequence[TensorFile]) -> tuple[dict[str, Any], ...]:
    """Records of the edits that a folder or a single file went through before, oldest first; recipes where no more is
    left. A damaged one is passed over, with a warning.
    """
    try:
        recipe = next((found for file in files if (found := recipe_in(file)) is not None), None)
        data = recipe
        if root.is_dir():
            data = read_record(root / RECORD) if (root / RECORD).is_file() else recipe
        elif recipe is not None and "concepts" in recipe:
            data = record_beside(root, recipe) or recipe
        if data is None or "concepts" not in data:
            return ()
        earlier = data.pop("previous", [])
        return (*earlier, data)
    except CheckpointError as error:
        warnings.warn(f"{error}. It is not carried into the new record", RealEraWarning, stacklevel=3)
        return ()


def record_before(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that a model had before the last edit, where the whole of it is known."""
    earlier = data.get("previous", [])
    if not earlier or "tensors" not in earlier[-1]:
        return None
    return {**earlier[-1], **({"previous": earlier[:-1]} if earlier[:-1] else {})}


def undone_metadata(data: Mapping[str, Any]) -> dict[str, str]:
    """Header metadata of a model whose last edit, of which `data` is the record, was undone."""
    earlier = data.get("previous", [])
    if earlier:
        return header_of(recipe_of(earlier[-1]), earlier[:-1])
    return {METADATA_KEY: json.dumps({"undone": True, "version": __version__})}
