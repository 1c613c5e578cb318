"""What to erase: concepts, the files that list them, and the checks that name the row at fault."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config import KINDS
from .contexts import AVERAGE, DEFAULT_TARGETS, FALLBACK_TARGET, MANY, is_text
from .errors import ConceptError


@dataclass(frozen=True)
class Concept:
    """One concept to erase.

    `target` is the text that it becomes; None takes the measured default of its kind
    (`contexts.DEFAULT_TARGETS`); for styles and for many names at once that is the average thing (`contexts.AVERAGE`),
    and for styles beside which others are preserved the average of those.
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
    """What the tokenizer does not tell apart is the same name: case, spaces, and the two spellings of an accent."""
    return unicodedata.normalize("NFC", _clean(text)).casefold()


def _contains(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as whole words; in scripts without spaces, whether it stands there at all."""
    name = _key(name)
    left, right = ("" if unicodedata.east_asian_width(edge) in "WF" else r"\w" for edge in (name[:1] or " ", name[-1:]))
    pattern = (f"(?<!{left})" if left else "") + re.escape(name) + (f"(?!{right})" if right else "")
    return bool(name) and re.search(pattern, _key(text)) is not None


def _concept(row: Any, where: str) -> Concept:
    """A `Concept` from a string, a mapping with the columns of `COLUMNS`, or a `Concept` as a caller made it."""
    # a target of "" is the empty prompt where a caller's `Concept` says so; in a file it is a field left blank
    blank = (None,) if isinstance(row, Concept) else (None, "")
    if isinstance(row, Concept):
        row = {column: getattr(row, column) for column in COLUMNS}
    if isinstance(row, str):
        return Concept(_clean(row))
    if not isinstance(row, Mapping):
        raise ConceptError(f"{where}: expected a name or a mapping with {', '.join(COLUMNS)}, found {row!r}")
    unknown = sorted(str(key) for key in row if key not in COLUMNS)
    if unknown:
        raise ConceptError(
            f"{where}: unknown column {', '.join(unknown)}; known: {', '.join(COLUMNS)} (concept = name)"
        )
    strength = row.get("strength")
    try:
        strength = None if strength in (None, "") else float(strength)
    except (TypeError, ValueError):
        raise ConceptError(f"{where}: strength {row['strength']!r} is not a number from 0 to 1") from None
    target = row.get("target")
    return Concept(
        name=_clean(str(row.get("name") or "")),
        target=None if target in blank else _clean(str(target)),
        aliases=_aliases(row.get("aliases") or (), where),
        strength=strength,
        kind=_clean(str(row["kind"])) if row.get("kind") else None,
    )


def _aliases(given: Any, where: str) -> tuple[str, ...]:
    if isinstance(given, str):
        return tuple(alias for alias in map(_clean, given.split(";")) if alias)
    if not isinstance(given, (list, tuple)):
        raise ConceptError(f"{where}: aliases {given!r}: expected a list, or names separated by ;")
    aliases = tuple("" if alias is None else _clean(str(alias)) for alias in given)
    if not all(aliases):
        raise ConceptError(f"{where}: an alias is empty; remove it")
    return aliases


def _check(concept: Concept, where: str) -> None:
    if not _clean(concept.name):
        raise ConceptError(f"{where}: the concept's name is empty")
    for name in (*concept.names, concept.target or ""):
        if not is_text(name):
            raise ConceptError(f"{where}: {name!r} is not text: half of a surrogate pair; give it as UTF-8")
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


def _with_target(concept: Concept, kind: str, target: str | None, where: str) -> Concept:
    """The concept with its target filled in; a default that contains a name gives way to the fallbacks."""
    kind = concept.kind or kind
    if concept.target is not None:
        return replace(concept, kind=kind)
    if target is not None:
        return replace(concept, kind=kind, target=_clean(target))
    for default in (DEFAULT_TARGETS[kind], FALLBACK_TARGET, "picture"):
        if not any(_contains(default, name) for name in concept.names):
            return replace(concept, kind=kind, target=default)
    raise ConceptError(f"{where}: {concept.name!r} and its aliases take up every default target; name a target")


def _check_unique(names: Iterable[str], where: str, at: str, seen: dict[str, str]) -> None:
    """Raise for a name that `seen` (key -> the row it was given in) holds already; add it otherwise."""
    for name in names:
        if _key(name) in seen:
            raise ConceptError(f"{where}, {at}: {name!r} was already given in {seen[_key(name)]}; remove one of them")
        seen[_key(name)] = at


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
    rows = [items] if isinstance(items, (str, Concept, Mapping)) else list(items)
    if not rows:
        raise ConceptError(f"{where}: no concept given; name at least one")
    kept = {_key(text) for text in preserve}
    seen: dict[str, str] = {}
    result: list[Concept] = []
    unnamed = set()  # places of concepts whose target nobody named
    for number, row in enumerate(rows, 1):
        at = f"{where}, row {number}"
        concept = _concept(row, at)
        _check(concept, at)
        if concept.target is None and target is None:
            unnamed.add(len(result))
        concept = _with_target(concept, kind, target, at)
        _check(concept, at)
        _check_unique(concept.names, where, f"row {number}", seen)
        for name in concept.names:
            if _key(name) in kept:
                raise ConceptError(
                    f"{at}: {name!r} is to be erased and is also in the preserve list; remove one of them"
                )
        result.append(concept)
    many = sum(len(concept.names) for concept in result) >= MANY
    return tuple(
        replace(c, target=AVERAGE) if many and i in unnamed and c.target == DEFAULT_TARGETS["object"] else c
        for i, c in enumerate(result)
    )


def _csv_rows(text: str, path: Path) -> list[Any]:
    # DictReader skips blank lines, and counts from the line after the header
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    if "concept" not in columns:
        raise ConceptError(f"{path}: the header has no column 'concept'; write concept,target,aliases,strength,kind")
    reader.fieldnames = ["name" if name == "concept" else name for name in columns]
    rows: list[Any] = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ConceptError(
                f"{path}, row {number}: more fields than the header has columns; put a name with a comma in quotes"
            )
    return rows


def _rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(text, path)
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


def _load(path: Path) -> list[Concept]:
    """The rows of a file as concepts, each checked by itself."""
    try:
        rows = _rows(path)
    except FileNotFoundError:
        raise ConceptError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConceptError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise ConceptError(f"{path}: not valid YAML: {_clean(str(error))}") from error
    if not rows:
        raise ConceptError(f"{path}: the file lists no concept")
    concepts = [_concept(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    for number, concept in enumerate(concepts, 1):
        _check(concept, f"{path}, row {number}")
    return concepts


def load_concepts(path: str | Path) -> list[Concept]:
    """Concepts from a `.csv`, `.yaml`, `.json` or `.txt` file (one name a line, `#` starts a comment).

    Columns or keys: concept, target, aliases (a list, or separated by `;`), strength, kind. Raises `ConceptError`,
    naming the row, also for a name that is listed twice.
    """
    concepts = _load(Path(path))
    seen: dict[str, str] = {}
    for number, concept in enumerate(concepts, 1):
        _check_unique(concept.names, str(path), f"row {number}", seen)
    return concepts


def load_prompts(path: str | Path) -> list[str]:
    """Names or prompts of a preserve or prior file, one a line (or any format of `load_concepts`)."""
    return [concept.name for concept in _load(Path(path))]
