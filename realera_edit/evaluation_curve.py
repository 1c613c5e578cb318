"""An edit's figures over the number of its concepts: the first few of its list erased alone, by the same recipe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .checkpoint import Checkpoint
from .compute import Edit, compute_edit
from .concepts import Concept, resolve_concepts
from .config import EditConfig
from .errors import ConfigError, RealEraWarning
from .evaluation_record import Judged, summary
from .history import RECORD
from .layers import compare, metric
from .pipeline import LoadedPipeline

RATES = ("acc_e", "acc_g", "acc_s", "acc_n")
# A residual that is computed anew agrees with the record's four digits, and with half precision's.
_AGREES = 0.01
# Half precision moves the weights by a thousandth of themselves, an edit by a tenth.
_SAME = 0.05


def config_of(record: Mapping[str, Any]) -> EditConfig:
    """The configuration of a record. Raises `ConfigError` for one of a later version."""
    try:
        return EditConfig.of(record["config"])
    except ConfigError as error:
        raise ConfigError(f"{RECORD}: {error}") from error


def recipe_of(record: Mapping[str, Any], count: int | None = None) -> tuple[Concept, ...]:
    """The first `count` concepts of a record (None: all, as they were erased), for an edit of so many.

    A strength or a target that nobody named is that of the shorter list, since these defaults depend on its length.
    """
    rows, config = record["concepts"], config_of(record)
    whole = tuple(Concept(r["name"], r["target"], tuple(r["aliases"]), r["strength"], r["kind"]) for r in rows)
    if count is None or count >= len(whole):
        return whole
    common = config.strength_for(sum(len(concept.names) for concept in whole))
    bare = [replace(c, target=None) for c in whole]
    unnamed = resolve_concepts(bare, kind=config.kind, preserve=record["preserve"])
    return tuple(
        replace(
            concept,
            target=None if concept.target == default.target else concept.target,
            strength=None if config.strength is None and concept.strength == common else concept.strength,
        )
        for concept, default in zip(whole[:count], unnamed, strict=False)
    )


def solved_again(source: LoadedPipeline, record: Mapping[str, Any]) -> Edit | None:
    """The edit of a record, solved anew from its recipe: seconds. None where that leaves other residuals.

    A prior of the user's own is not in the record, and another model has other states.
    """
    config, preserve = config_of(record), record["preserve"]
    wanted = resolve_concepts(recipe_of(record), preserve=preserve)
    layers = metric(source, config.edit) if config.robust else None
    edit = compute_edit(source.encoder, wanted, config, preserve, (), layers)
    told = {name: value for row in record["concepts"] for name, value in row["residual"].items()}
    own = {g.name: float(r) for g, r in zip(edit.groups, edit.residual, strict=True) if g.role != "word"}
    same = told.keys() == own.keys() and all(abs(told[name] - own[name]) <= _AGREES for name in told)
    return edit if same else None


def check_counts(record: Mapping[str, Any] | None, counts: Sequence[int]) -> None:
    """Raise `ConfigError` where the record cannot have a curve over `counts`."""
    if counts and record is None:
        raise ConfigError(f"curve: the edited model has no {RECORD}, whose recipe is needed; leave --curve out")
    most = 0 if record is None else len(record["concepts"])
    if not all(1 <= count <= most for count in counts):
        raise ConfigError(f"curve {tuple(counts)}: the edit erased {most} concepts; expected 1 to {most}")


def erase_first(pipe: Any, record: Mapping[str, Any], count: int) -> Any:
    """Erase the first `count` concepts of a record from a loaded pipeline, in place; `undo()` of the result undoes."""
    from .edit import edit_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RealEraWarning)  # those of the whole edit were shown when it was made
        return edit_model(pipe, recipe_of(record, count), preserve=tuple(record["preserve"]), config=config_of(record))


def check_recipe(pipe: Any, record: Mapping[str, Any], edited: Checkpoint | LoadedPipeline) -> None:
    """Raise `ConfigError` where the record's recipe does not make `edited` of the unedited `pipe`.

    Over all layers, what is left between the two after the whole recipe must be below `_SAME` of what was between them
    before it. `pipe` is itself again afterwards.
    """
    before = _apart(LoadedPipeline(pipe), edited)
    result = erase_first(pipe, record, len(record["concepts"]))
    try:
        after = _apart(LoadedPipeline(pipe), edited)
    finally:
        result.undo()
    if after > _SAME * before:
        raise ConfigError(
            "curve: the record's recipe does not make the edited model of the unedited one, as after an edit of "
            "another model, or with --prior-file; leave --curve out"
        )


def _apart(one: LoadedPipeline, other: Checkpoint | LoadedPipeline) -> float:
    """|W' - W| over all layers."""
    layers = compare(one, other)
    return math.sqrt(max(float((layers.edited - 2 * layers.mixed + layers.original).trace()), 0.0))


def curves_of(points: Mapping[int, Judged]) -> list[dict[str, Any]]:
    """The part "curves" of a record: for each metric a line of each model, a point for each number of concepts."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for count, judged in sorted(points.items()):
        rates, _, harmonic = summary(judged, set())
        found: dict[tuple[str, str], dict[str, Any]] = {("H_4", "edited"): vars(harmonic["H_4"])}
        for name in RATES:
            edited, original = rates[name]
            found |= {(name, "edited"): edited.to_dict(), (name, "unedited"): original.to_dict()}
        for key, one in found.items():
            point = {"count": count, **{part: one[part] for part in ("value", "low", "high")}}
            lines.setdefault(key, []).append(point)
    return [{"name": model, "metric": name, "points": found} for (name, model), found in lines.items()]
