"""The command lines that make an edit again, from its record."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .config import EditConfig
from .history import PIPELINE

# More names than this go into a file.
_INLINE = 8


@dataclass(frozen=True)
class Recipe:
    """Commands to run in order, and name -> content of the files that they read."""

    commands: tuple[str, ...]
    files: Mapping[str, str]


def recipe_of(data: Mapping[str, Any], out: str = "OUT") -> Recipe | None:
    """How the model or the edit file of the record `data` was made; None where the record does not tell.

    Of a model that was edited several times, every step from the unedited model on. The recipe in a header has no
    preserve list, and a loaded pipeline, or an edit that was composed, scaled or inverted, has no command.
    """
    steps = [*data.get("previous", ()), data]
    if steps[0].get("model") in (None, PIPELINE) or any("preserve" not in step or _computed(step) for step in steps):
        return None
    commands: list[str] = []
    files: dict[str, str] = {}
    model = str(steps[0]["model"])
    for number, step in enumerate(steps, 1):
        suffix = "" if len(steps) == 1 else f"-{number}"
        target = out if number == len(steps) else f"STEP{suffix}{'.safetensors' * out.endswith('.safetensors')}"
        words, own = _erase(step, suffix)
        files |= own
        if "applied" in step:
            edit, made = f"EDIT{suffix}.safetensors", step["applied"]
            commands.append(_line("erase", str(made["made_from"]), *words, *_revision(made), "--save-edit", edit))
            commands.append(_line("apply", edit, model, *_revision(step), "-o", target))
        else:
            option = "--save-edit" if "encoders" in step else "-o"
            commands.append(_line("erase", model, *words, *_revision(step), option, target))
        model = target
    return Recipe(tuple(commands), files)


def _line(*words: str) -> str:
    return shlex.join(["realera-edit", *words])


def _revision(step: Mapping[str, Any]) -> list[str]:
    return ["--revision", str(step["revision"])] if "revision" in step and "hub_id" not in step else []


def _computed(step: Mapping[str, Any]) -> bool:
    """Whether the edit was computed from others: composed, scaled or inverted."""
    return bool(step.get("history") or step.get("applied", {}).get("history"))


def _erase(step: Mapping[str, Any], suffix: str) -> tuple[list[str], dict[str, str]]:
    """(words of the command line, files) for the concepts, what is kept, and the configuration."""
    words, files = _concepts(step, suffix)
    for option, entries in (("preserve", step["preserve"]), ("prior", step.get("prior", ()))):
        if len(entries) > _INLINE or (entries and option == "prior"):
            files[f"{option}{suffix}.json"] = _json(list(entries))
            words += [f"--{option}-file", f"{option}{suffix}.json"]
        else:
            words += [word for entry in entries for word in (f"--{option}", str(entry))]
    words += _options(step["config"])
    return [*words, *(["--dtype", str(step["dtype"])] if "dtype" in step else [])], files


def _concepts(step: Mapping[str, Any], suffix: str) -> tuple[list[str], dict[str, str]]:
    """The concepts as words, where these can say it all, else as a file."""
    rows = [_row(row, step) for row in step["concepts"]]
    targets = {row["target"] for row in rows}
    said = {"concept", "target"} | ({"aliases"} if len(rows) == 1 else set())
    plain = all(set(row) <= said and not row["concept"].startswith("-") for row in rows)
    if plain and len(targets) == 1 and len(rows) <= _INLINE:
        aliases = [word for alias in rows[0].get("aliases", ()) for word in ("--alias", alias)]
        return [*(row["concept"] for row in rows), *aliases, "--to", targets.pop()], {}
    # a target that a file leaves blank is that of --to: only so can it be the empty prompt
    return ["--concepts", f"concepts{suffix}.json", *(["--to", ""] if "" in targets else [])], {
        f"concepts{suffix}.json": _json(rows)
    }


def _row(row: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a concept file, without what the configuration says already."""
    config = step["config"]
    names = sum(1 + len(other["aliases"]) for other in step["concepts"])
    told = {name: config[name] for name in ("strength", "overshoot", "robust") if name in config}
    common = EditConfig.of(told).strength_for(names)
    found: dict[str, Any] = {"concept": str(row["name"]), "target": str(row["target"])}
    if row["aliases"]:
        found["aliases"] = [str(alias) for alias in row["aliases"]]
    if row.get("strength") not in (None, common):
        found["strength"] = row["strength"]
    if row.get("kind") not in (None, config.get("kind")):
        found["kind"] = row["kind"]
    return found


def _options(config: Mapping[str, Any]) -> list[str]:
    """The options of every field that is not at its default."""
    words: list[str] = []
    for spec in fields(EditConfig):
        value = config.get(spec.name, spec.default)
        value = tuple(value) if isinstance(value, list) else value
        if value == spec.default:
            continue
        flag = spec.name.replace("_", "-")
        if spec.name == "contexts":
            words += [word for template in value for word in ("--context", str(template))]
        elif isinstance(spec.default, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def _json(value: Sequence[Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
