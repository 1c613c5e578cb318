"""The section of a model card that tells of an edit, as Markdown from its record."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from .evaluation_file import Part
from .folder import UNDO_FILE
from .hub import hub_id
from .recipe import recipe_of

_SHOWN = 50
_ROLES = (("k", "keys"), ("v", "values"), ("pooled", "pooled projections"))
_METHOD = (
    "Each edited projection `W` of the cross-attention became `W M`, where one matrix `M` for all layers solves a "
    "single least-squares problem: text states of the erased names go to those of their targets, states that must stay "
    "are held. The closed form is that of UCE ([arXiv 2308.14761](https://arxiv.org/abs/2308.14761)); the neighbours "
    "of a concept, and what lies beyond them, are the idea of RealEra "
    "([arXiv 2410.09140](https://arxiv.org/abs/2410.09140)), whose training the solve replaces."
)
_LIMITS = (
    "What is measured above is the text space, not pictures. Look at pictures before you rely on it: "
    "`realera-edit evaluate`.",
    "A name or description that is not listed can still draw a concept, and so can an embedding that was sought for "
    "it: `realera-edit attack`. Against somebody who holds the weights this is no protection.",
    "Concepts near an erased one can change their looks; only what is listed as kept was held by name.",
    "Text encoder and image decoder are those of the unedited model, with their biases and their limits.",
    "Whoever has the unedited model, the file of original weights or the edit file can go back.",
)


def section(data: Mapping[str, Any], kind: str, name: str, evaluation: Part | None) -> str:
    """The whole section. `kind`: folder, file, edit or lora; `name`: of the file, for commands."""
    steps = [*data.get("previous", ()), data]
    parts = {
        "": f"# {escaped(title(data))}\n\n{_what(data, kind)}",
        "Erased": "\n\n".join(_erased(step) for step in steps),
        "Kept": _kept(data),
        "Method": _METHOD,
        "Measured in the text space": _measured(data),
        "Evaluation": "" if evaluation is None else _figures(evaluation),
        "Limits": "\n".join(f"- {line}" for line in _LIMITS),
        "Use, and the way back": _use(data, kind, name),
        "Made by": _made(data, kind),
    }
    return "\n\n".join((f"## {head}\n\n" if head else "") + text for head, text in parts.items() if text)


def title(data: Mapping[str, Any]) -> str:
    """Such as "sd15 without Van Gogh, Picasso and 7 more"."""
    steps = [*data.get("previous", ()), data]
    names = list(dict.fromkeys(str(row["name"]) for step in steps for row in step["concepts"]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    model = str(steps[0].get("model", "")).rpartition("/")[2].removesuffix(".safetensors")
    return f"{model or ('A LoRA' if 'lora' in data else 'A model')} without {', '.join(names[:3])}{more}"


def escaped(text: object) -> str:
    """Any text as one line of Markdown that means nothing but itself."""
    line = " ".join("".join(c if c.isprintable() or c == "\u200d" else " " for c in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", line)


def _fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _listed(names: Iterable[object]) -> str:
    shown = [escaped(name) for name in names]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _what(data: Mapping[str, Any], kind: str) -> str:
    name = str(data.get("model", ""))
    base = f" of {escaped(name)}" if name else ""
    if found := hub_id(data):
        base += f" in [{escaped(found)}](https://huggingface.co/{found})" if found != name else ""
        base = f" of [{escaped(name)}](https://huggingface.co/{name})" if found == name else base
        base += f", revision {escaped(data['revision'])}" if "revision" in data else ""
    texts = {
        "edit": f"An edit by itself, made with the text encoder{base}: it erases what is listed below from any Stable "
        "Diffusion model with the same text encoder.",
        "lora": f"A LoRA{base} that erases what is listed below. Its scale is a dial: 1 is the edit, 0 none. It "
        "belongs to the weights that it was exported for.",
    }
    copy = f"A copy{base} from whose cross-attention the concepts below were erased in closed form, without training."
    terms = data.get("license", {}).get("license")
    known = f"that of the unedited model, {escaped(terms)}" if terms else "not known here; see the unedited model"
    return f"{texts.get(kind, copy)}\n\nLicence: {known}. What is made from a model is under the terms of that model."


def _erased(step: Mapping[str, Any]) -> str:
    rows = step["concepts"]
    measured = any(row.get("residual") for row in rows)
    lines = [f"| concept | becomes | aliases |{' left |' * measured}", f"|---|---|---|{'---|' * measured}"]
    for row in rows[:_SHOWN]:
        cells = [escaped(row["name"]), escaped(row["target"]) or "(the empty prompt)", _listed(row["aliases"])]
        if measured:
            cells.append(", ".join(f"{escaped(name)} {left:.2f}" for name, left in row["residual"].items()))
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{len(rows) - _SHOWN} more are in the record."] if len(rows) > _SHOWN else []
    if words := list(dict.fromkeys(word for row in rows for word in row.get("words", ()))):
        notes.append(f"Words near by that went with them: {_listed(words)}.")
    if measured:
        notes.append("Left: share of the name in the text space, 1 before the edit and 0 where nothing is left.")
    return "\n\n".join(["\n".join(lines), *notes])


def _kept(data: Mapping[str, Any]) -> str:
    if "preserve" not in data:
        return "The record beside the model tells it, and was not found."
    named = f"By name: {_listed(data['preserve'])}." if data["preserve"] else "By name: nothing."
    given, frequent = data.get("prior", ()), data["config"].get("prior_words")
    softly = f"{len(given)} prompts" if given else f"{frequent} frequent words of the tokenizer"
    near = list(dict.fromkeys(word for row in data["concepts"] for word in row.get("near", ())))
    rim = f" Words just beyond the erased ones that were held: {_listed(near)}." if near else ""
    return f"{named} Softly: {softly}. Exactly: the empty prompt.{rim}"


def _measured(data: Mapping[str, Any]) -> str:
    lines = []
    if counts := data.get("projections"):
        found = [f"{counts[f'{r}_edited']} of {counts[f'{r}_found']} {t}" for r, t in _ROLES if counts[f"{r}_found"]]
        lines.append(f"- Edited: {', '.join(found)}.")
    for name, space in data.get("spaces", {}).items():
        jitter = f", jitter {space['jitter']:.1e}" if space["jitter"] else ""
        shape = f"{escaped(space['form'])}, rank {space['rank']:d} of {space['width']:d}"
        lines.append(f"- Solve ({escaped(name)}): {shape}, condition {space['condition']:.1e}{jitter}.")
    if left := [value for row in data["concepts"] for value in row.get("residual", {}).values()]:
        lines.append(f"- Left of the erased names: {statistics.fmean(left):.2f} on average, {max(left):.2f} at most.")
    if drift := data.get("drift"):
        worst = sorted(drift.items(), key=lambda item: -float(item[1]["mean"]))[:6]
        moved = ", ".join(f"{escaped(name)} {value['mean']:.3f} ({value['worst']:.3f})" for name, value in worst)
        lines.append(f"- Drift of what was kept by name, |M r - r| / |r|, the mean (the worst) of its states: {moved}.")
    return "\n".join(lines)


def _figures(evaluation: Part) -> str:
    """The rates of an evaluation beside those of the unedited model."""
    lines = ["| figure | edited | unedited | pictures |", "|---|---|---|---|"]
    rates, means, settings = (evaluation.part(key) for key in ("rates", "harmonic", "settings"))
    for name in rates.data:
        edited, original = (rates.part(name).part(side) for side in ("edited", "original"))
        if cell := _interval(edited):
            lines.append(f"| {escaped(name)} | {cell} | {_interval(original)} | {edited.text('count')} |")
    for name in means.data:
        if cell := _interval(means.part(name)):
            lines.append(f"| {escaped(name)} | {cell} | | |")
    judge, date = (escaped(text) for text in (evaluation.part("judge").text("name"), evaluation.text("date")))
    drawn = f"{len(settings.texts('seeds'))} seeds, {escaped(settings.text('steps'))} steps, guidance " + escaped(
        settings.text("guidance")
    )
    return "\n".join(lines) + (
        f"\n\nBy `realera-edit evaluate`, judge {judge}, {drawn}, {date}. Shares of pictures with 95 % intervals: of "
        "those that still show the erased concept under its own name (acc_e), under others (acc_g) and without a name "
        "(residue), where low is good; and of near (acc_n) and far (acc_s) concepts that are drawn as asked. H_4, H_o "
        "and H_c are harmonic means, high is good."
    )


def _interval(part: Part) -> str:
    value, low, high = (part.number(key) for key in ("value", "low", "high"))
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _use(data: Mapping[str, Any], kind: str, name: str) -> str:
    model = str(data.get("model") or "MODEL")
    if kind == "edit":
        lines = [["apply", name, model, "-o", "OUT"], ["invert", name, "-o", "BACK.safetensors"]]
        return f"{_commands(lines)}\n\n`apply` takes it to a model, `invert` makes the edit that takes it back."
    if kind == "lora":
        python = f"pipe.load_lora_weights(FOLDER, weight_name={name!r})"
        ui = "Put it into the folder of LoRAs of the program, and use it at strength 1."
        how = _fenced(python, "python") if data["lora"] == "diffusers" else ui
        return f"{how}\n\nWithout it, or at scale 0, the model is as it was."
    names = [str(row["name"]) for row in data["concepts"]][:1]
    lines = [["attack", model, "--edited", name, *names]]
    if kind == "folder":
        lines.insert(0, ["evaluate", model, name, "-o", "REPORT"])
    back = "RESTORED" if kind == "folder" else "restored.safetensors"
    undo = UNDO_FILE if kind == "folder" else f"{name.removesuffix('.safetensors')}.{UNDO_FILE}"
    return (
        f"It is used as the unedited model is. To look for yourself:\n\n{_commands(lines)}\n\n"
        f"`realera-edit undo {shlex.quote(name)} -o {back}` gives the original weights back, to the bit, where the "
        f"file that holds them ({escaped(undo)}) is beside it. It is not uploaded unless asked for; without it, take "
        "the unedited model."
    )


def _commands(lines: Iterable[Iterable[str]]) -> str:
    return _fenced("\n".join(shlex.join(["realera-edit", *line]) for line in lines), "sh")


def _made(data: Mapping[str, Any], kind: str) -> str:
    out = {"folder": "OUT", "edit": "EDIT.safetensors"}.get(kind, "OUT.safetensors")
    recipe = None if kind == "lora" else recipe_of(data, out)
    parts = []
    if recipe is not None:
        parts += [_fenced("\n".join(recipe.commands), "sh")]
        parts += [f"with {escaped(name)}:\n\n{_fenced(text, 'json')}" for name, text in recipe.files.items()]
        if kind == "file":
            parts.append("A single file also needs `--tokenizer` (a folder with CLIP's vocab.json and merges.txt), or "
                         "`--text-encoder` where it has none of its own.")  # fmt: skip
    else:
        parts.append("What is known of how it was made does not make one command: it was made from a pipeline or from "
                     "other edits, or the record was not found.")  # fmt: skip
    parts.append(f"Configuration:\n\n{_fenced(json.dumps(data['config'], ensure_ascii=False), 'json')}")
    versions = data.get("versions") or {"realera_edit": data.get("realera_edit", data.get("version"))}
    parts.append(f"Versions: {', '.join(f'{escaped(name)} {escaped(v)}' for name, v in versions.items())}. The same "
                 "versions, seed and configuration on the same kind of machine give the same bytes.")  # fmt: skip
    if "text_encoder" in data:
        parts.append(f"Text encoder and tokenizer: SHA-256 {escaped(data['text_encoder'])}.")
    return "\n\n".join(parts)
