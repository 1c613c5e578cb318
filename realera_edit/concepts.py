"""What to erase: concepts, the files that list them, and the checks that name the row at fault."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config import KINDS
from .contexts import DEFAULT_TARGETS, FALLBACK_TARGET
from .errors import ConceptError


@dataclass(frozen=True)
class Concept:
    """One concept to erase.

    `target` is the text that it becomes; None takes the measured default of its kind (`contexts.DEFAULT_TARGETS`).
    `aliases` are other names that go with it. `strength` and `kind` of None are those of the configuration.
    """

    name: str
    target: str | None = None
    aliases: tuple[str, ...] = ()
    strength: float | None = None
    kind: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)


COLUMNS = tuple(spec.name for spec in fields(Concept))


def _clean(text: str) -> str:
    return " ".join(text.split())


def _key(text: str) -> str:
    return _clean(text).casefold()


def _contains(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as whole words."""
    return f" {_key(name)} " in f" {_key(text)} "


def _concept(row: Any, where: str) -> Concept:
    """A `Concept` from a string or a mapping with the columns of `COLUMNS`."""
    if isinstance(row, Concept):
        return row
    if isinstance(row, str):
        return Concept(_clean(row))
    if not isinstance(row, dict):
        raise ConceptError(f"{where}: expected a name or a mapping with {', '.join(COLUMNS)}, found {row!r}")
    unknown = sorted(str(key) for key in row if key not in COLUMNS)
    if unknown:
        raise ConceptError(
            f"{where}: unknown column {', '.join(unknown)}; known: {', '.join(COLUMNS)} (concept = name)"
        )
    aliases = row.get("aliases") or ()
    if isinstance(aliases, str):
        aliases = aliases.split(";")
    strength = row.get("strength")
    try:
        strength = None if strength in (None, "") else float(strength)
    except (TypeError, ValueError):
        raise ConceptError(f"{where}: strength {row['strength']!r} is not a number from 0 to 1") from None
    target = row.get("target")
    return Concept(
        name=_clean(str(row.get("name") or "")),
        target=_clean(str(target)) if target not in (None, "") else None,
        aliases=tuple(a for a in (_clean(str(alias)) for alias in aliases) if a),
        strength=strength,
        kind=str(row["kind"]) if row.get("kind") else None,
    )


def _check(concept: Concept, where: str) -> None:
    if not _clean(concept.name):
        raise ConceptError(f"{where}: the concept's name is empty")
    if concept.strength is not None and not 0 <= concept.strength < 1:
        raise ConceptError(f"{where}: strength {concept.strength:g} of {concept.name!r} is not in [0, 1)")
    if concept.kind is not None and concept.kind not in KINDS:
        raise ConceptError(f"{where}: kind {concept.kind!r} of {concept.name!r}: expected one of {', '.join(KINDS)}")
    for name in concept.names:
        if concept.target is not None and _contains(concept.target, name):
            raise ConceptError(
                f"{where}: the target {concept.target!r} contains the concept {name!r}, so nothing would be erased; "
                "choose a target without it"
            )
    if len({_key(name) for name in concept.names}) < len(concept.names):
        raise ConceptError(f"{where}: an alias of {concept.name!r} is listed twice, or equals the name")


def _with_target(concept: Concept, kind: str, target: str | None) -> Concept:
    """The concept with its target filled in; a default that contains a name gives way to the fallback."""
    kind = concept.kind or kind
    choices = (target, DEFAULT_TARGETS[kind], FALLBACK_TARGET, "picture")
    if concept.target is None:
        default = next(
            t for t in choices if t is not None and (t == target or not any(_contains(t, n) for n in concept.names))
        )
        concept = replace(concept, target=default)
    return replace(concept, kind=kind)


def resolve_concepts(
    items: str | Concept | Iterable[Any],
    *,
    kind: str = "general",
    target: str | None = None,
    preserve: Sequence[str] = (),
    where: str = "concepts",
) -> tuple[Concept, ...]:
    """Checked concepts with target and kind filled in.

    `items` are names, mappings or `Concept`s. Raises `ConceptError`, naming the row, for an empty list or name, a
    duplicate (also across aliases), a target that contains its concept, or a concept that is also preserved.
    """
    rows = [items] if isinstance(items, (str, Concept)) else list(items)
    if not rows:
        raise ConceptError(f"{where}: no concept given; name at least one")
    kept = {_key(text): text for text in preserve}
    seen: dict[str, str] = {}
    result = []
    for number, row in enumerate(rows, 1):
        at = f"{where}, row {number}"
        concept = _with_target(_concept(row, at), kind, target)
        _check(concept, at)
        for name in concept.names:
            if _key(name) in seen:
                raise ConceptError(f"{at}: {name!r} was already given in {seen[_key(name)]}; remove one of them")
            if _key(name) in kept:
                raise ConceptError(
                    f"{at}: {name!r} is to be erased and is also in the preserve list; remove one of them"
                )
            seen[_key(name)] = f"row {number}"
        result.append(concept)
    return tuple(result)


def _rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        # DictReader skips blank lines, and counts from the line after the header
        reader = csv.DictReader(text.splitlines())
        if not reader.fieldnames or "concept" not in reader.fieldnames:
            raise ConceptError(
                f"{path}: the header has no column 'concept'; write concept,target,aliases,strength,kind"
            )
        return [{"name" if k == "concept" else k: v for k, v in row.items() if k is not None} for row in reader]
    if suffix in (".yaml", ".yml"):
        import yaml

        data = yaml.safe_load(text)
    elif suffix == ".json":
        data = json.loads(text)
    elif suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    else:
        raise ConceptError(f"{path}: unknown ending {suffix!r}; use .csv, .yaml, .json or .txt")
    if isinstance(data, dict):
        data = data.get("concepts")
    if not isinstance(data, list):
        raise ConceptError(f"{path}: expected a list of concepts, or a mapping with the key 'concepts'")
    return [{"name" if k == "concept" else k: v for k, v in r.items()} if isinstance(r, dict) else r for r in data]


def load_concepts(path: str | Path) -> list[Concept]:
    """Concepts from a `.csv`, `.yaml`, `.json` or `.txt` file (one name a line, `#` starts a comment).

    Columns or keys: concept, target, aliases (a list, or separated by `;`), strength, kind. Raises `ConceptError`.
    """
    path = Path(path)
    try:
        rows = _rows(path)
    except FileNotFoundError:
        raise ConceptError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConceptError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except ValueError as error:
        raise ConceptError(f"{path}: not valid JSON: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise ConceptError(f"{path}: not valid YAML: {error}") from error
    if not rows:
        raise ConceptError(f"{path}: the file lists no concept")
    concepts = [_concept(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    for number, concept in enumerate(concepts, 1):
        _check(concept, f"{path}, row {number}")
    return concepts


def load_prompts(path: str | Path) -> list[str]:
    """Names or prompts of a preserve or prior file, one a line (or any format of `load_concepts`)."""
    return [concept.name for concept in load_concepts(path)]
