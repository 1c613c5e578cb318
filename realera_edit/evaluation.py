"""The library call: `evaluate` draws two models on the same prompts and seeds, judges the pictures, computes all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .contexts import fill
from .errors import ConceptError, ConfigError, RealEraWarning
from .evaluation_config import EvaluationConfig
from .evaluation_curve import check_counts, check_recipe, curves_of, erase_first
from .evaluation_map import similarity_of, text_space
from .evaluation_plan import (
    KINDS,
    STYLED,
    TEMPLATES,
    Case,
    Erased,
    Known,
    Planner,
    read_known,
    read_prompts,
    same,
)
from .evaluation_record import Evaluation, Judged, build
from .generate import Drawing, PictureFolder, Progress, Team, draw, drawable, fingerprint, open_pipeline
from .history import RECORD, read_record
from .hub import public_name
from .judges import Judge, Verdicts, open_judge
from .pipeline import LoadedPipeline
from .probe import Probe, WordFinder
from .source import open_weights

_CHUNK = 256
__all__ = ["Evaluation", "EvaluationConfig", "evaluate"]


def evaluate(
    original: Any,
    edited: Any,
    concepts: Sequence[str] = (),
    *,
    out: str | Path,
    judge: Judge | str = "reference",
    aliases: Mapping[str, Sequence[str]] | None = None,
    preserve: Sequence[str] = (),
    prompts: str | Path | None = None,
    templates: Sequence[str] = (),
    curve: Sequence[int] = (),
    config: EvaluationConfig | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well `concepts` are erased from `edited` and everything else is kept, beside `original`.

    `original`, `edited`: diffusers folders, hub ids, or two loaded pipelines. `concepts`: default, those of the record
    in `edited`. `out`: folder for the pictures, with which a broken run goes on; `Evaluation.save` writes the record
    there. `judge`: a `Judge`, or a text as in `judges.SPECS`. `aliases`: concept -> other names. `preserve`: names that
    must stay, beside those of the model's concepts.json. `prompts`: a CSV file (`read_prompts`) whose kinds are taken
    from it and not chosen. `templates`: prompts with "{}" or "{a}" for a name. `curve`: numbers of concepts; the first
    so many of the record are also erased alone, by its recipe, and measured. Under `accelerate launch` the processes
    share the drawing, and all return. Raises a `RealEraError`; warns where the unedited model falls short.
    """
    start, config, out = time.perf_counter(), config or EvaluationConfig(), Path(out)
    if original is edited and not isinstance(original, (str, Path)):
        raise ConfigError("evaluate: the two models are one and the same pipeline; load the original a second time")
    original, edited = (drawable(model, revision) for model in (original, edited))
    team = Team.of_environment()
    options = {"device": device or team.device, "dtype": dtype, "variant": variant}
    own = read_prompts(Path(prompts)) if prompts is not None else ()
    record = _record(edited)
    check_counts(record, curve)
    given = _erased(concepts, own, record, _record(original), aliases or {})
    known = _known(original, record, preserve)
    names = [name for one in given for name in (one.label,)] + [k.label for k in known] + [case.truth for case in own]
    found = open_judge(judge, list(dict.fromkeys(names)), str(options["device"])) if isinstance(judge, str) else judge
    subjects, known = _to_labels(given, known, own, found)

    run = _Run(found, config, team, progress)
    before = run.model("original", original, out, options)
    source = LoadedPipeline(before.pipe)
    if curve and record is not None:
        check_recipe(before.pipe, record, open_weights(edited, source))
    templates = tuple(templates) or tuple(getattr(found, "templates", TEMPLATES))
    _check_templates(templates)
    kinds = "".join(kind for kind in KINDS if kind not in {case.kind for case in own})
    planner = Planner(
        subjects,
        known,
        lambda pairs: before.accuracy(pairs, templates),
        similarity_of(source.encoder),
        config,
        (record or {}).get("preserve", ()),
        WordFinder(Probe.of(before.pipe), source.encoder, config.words, progress if team.rank == 0 else None),
    )
    cases = [*own, *planner.cases(templates, getattr(found, "styled", STYLED), found.styles, kinds)]
    _warn_of_gaps(cases, config)
    first = before.ask([case.prompt for case in cases], config.seeds)
    erased = planner.erased or subjects
    space = {}
    if team.rank == 0:
        roles = _roles(planner, given, record)
        space = text_space(source, edited, roles, [one.name for one in erased], record)
    whole = Judged(cases, config.seeds, found, before.folder, before.folder, first, first)
    points = _shorter(whole, before, record, curve, subjects, out) if record is not None and curve else {}
    del source, planner, before.pipe  # one model in memory at a time
    after = run.model("edited", edited, out, options)
    second = after.ask([case.prompt for case in cases], config.seeds)
    judged = replace(whole, after=after.folder, edited=second)
    if record is not None and len(record["concepts"]) in curve:
        points[len(record["concepts"])] = judged
    settings = {
        **config.to_dict(),
        "templates": list(templates),
        "device": options["device"],
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "prompts": None if prompts is None else Path(prompts).name,
    }
    return build(
        judged,
        out,
        {
            "model": {"original": _name_of(original), "edited": _name_of(edited)},
            "erased": [one.name for one in given],
            "recipe": record,
            "settings": settings,
            "curves": curves_of(points) if points else None,
            **space,
            "command": command,
            "seconds": time.perf_counter() - start,
        },
        preserved={same(name) for name in (record or {}).get("preserve", ())},
    )


@dataclass
class _Model:
    """One of the two models: its pipeline, its pictures, and what the judge says of them."""

    name: str
    pipe: Any
    folder: PictureFolder
    run: _Run

    def ask(self, prompts: Sequence[str], seeds: Sequence[int]) -> Verdicts:
        """Verdicts on prompts x seeds, in this order; what is missing is drawn first."""
        run, shots = self.run, [(prompt, seed) for prompt in prompts for seed in seeds]
        label = f"drawing {self.name}"
        progress = run.progress if run.team.rank == 0 else None
        draw(self.pipe, self.folder, shots, batch=run.config.batch_size, team=run.team, label=label, progress=progress)
        parts = [run.judge(self.folder.load(shots[at : at + _CHUNK])) for at in range(0, max(1, len(shots)), _CHUNK)]
        joined = [
            None if any(part is None for part in column) else np.concatenate(column)
            for column in zip(*((p.concept, p.style, p.features) for p in parts), strict=True)
        ]
        return Verdicts(*joined)  # type: ignore[arg-type]  # the concepts are never None

    def accuracy(self, pairs: Sequence[tuple[str, str]], templates: Sequence[str]) -> list[float]:
        """For pairs (label, name): share of pictures of the filled templates, on the choice seeds, that show it."""
        prompts = [fill(template, name).prompt for _, name in pairs for template in templates]
        verdicts = self.ask(prompts, self.run.config.choice_seeds).concept.reshape(len(pairs), -1)
        places = np.array([self.run.judge.labels.index(label) for label, _ in pairs])
        return [float(share) for share in (verdicts == places[:, None]).mean(1)]


@dataclass(frozen=True)
class _Run:
    judge: Judge
    config: EvaluationConfig
    team: Team
    progress: Progress | None

    def model(self, name: str, model: Any, out: Path, options: Mapping[str, Any]) -> _Model:
        """`model`, opened, with its folder of pictures in `out`."""
        pipe = open_pipeline(model, **options) if isinstance(model, Path) else model
        drawing = Drawing(self.config.steps, self.config.guidance)
        return _Model(name, pipe, PictureFolder(out / "pictures" / name, fingerprint(pipe), drawing), self)


def _shorter(
    whole: Judged,
    before: _Model,
    record: Mapping[str, Any],
    counts: Sequence[int],
    subjects: Sequence[Erased],
    out: Path,
) -> dict[int, Judged]:
    """Count -> the first so many concepts of the record erased alone, drawn and judged; the record's own is left out.

    `whole`: every case as the unedited model draws it.
    """
    points = {}
    for count in sorted({count for count in counts if count < len(record["concepts"])}):
        names = {same(row["name"]) for row in record["concepts"][:count]}
        part = whole.of({one.label for one in subjects if same(one.name) in names})
        result = erase_first(before.pipe, record, count)
        try:
            after = before.run.model(f"first-{count}", before.pipe, out, {})
            found = after.ask([case.prompt for case in part.cases], part.seeds)
        finally:
            result.undo()
        points[count] = replace(part, after=after.folder, edited=found)
    return points


def _name_of(model: Any) -> str:
    """For the record, which may be published: no folder of this machine."""
    if isinstance(model, Path):
        return public_name(model)["model"]
    return f"a loaded {type(model).__name__}"


def _record(model: Any) -> dict[str, Any] | None:
    """The record of the edits that a folder went through, where it has one."""
    if not isinstance(model, Path):
        return None
    path = model / RECORD
    return read_record(path) if path.is_file() else None


def _concepts_of(record: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Concept -> aliases over all edits of a record, oldest first."""
    records = [*record.get("previous", ()), record] if record else []
    return {row["name"]: tuple(row["aliases"]) for one in records for row in one["concepts"]}


def _erased(
    concepts: Sequence[str],
    own: Sequence[Case],
    record: Mapping[str, Any] | None,
    earlier: Mapping[str, Any] | None,
    aliases: Mapping[str, Sequence[str]],
) -> tuple[Erased, ...]:
    """The concepts to evaluate, with every other name that is told: by the caller, and by the edit's record."""
    told = {name: other for name, other in _concepts_of(record).items() if name not in _concepts_of(earlier)}
    names = list(dict.fromkeys(concepts)) or list(told) or list(dict.fromkeys(c.owner for c in own if c.kind == "e"))
    if not names or not all(name.strip() for name in names):
        raise ConceptError(
            f"no concept to evaluate: the edited model has no {RECORD} that names one; name it with --concept"
        )
    known = {same(name): other for name, other in told.items()}
    return tuple(
        Erased(name, name, tuple(dict.fromkeys((*aliases.get(name, ()), *known.get(same(name), ()))))) for name in names
    )


def _known(original: Any, record: Mapping[str, Any] | None, preserve: Sequence[str]) -> tuple[Known, ...]:
    """What may be a neighbour or a far concept: the model's own list, or what the edit preserved; and `preserve`."""
    listed = read_known(original) if isinstance(original, Path) else ()
    have = {same(entry.label) for entry in listed}
    more = [*preserve, *(() if listed else (record or {}).get("preserve", ()))]
    return (*listed, *(Known(name) for name in dict.fromkeys(more) if same(name) not in have))


def _to_labels(
    given: Sequence[Erased], known: Sequence[Known], own: Sequence[Case], judge: Judge
) -> tuple[tuple[Erased, ...], tuple[Known, ...]]:
    """Erased and known concepts by the judge's labels. `ConceptError` for one to be drawn that it does not know."""
    labels = {same(label): label for label in judge.labels}
    strange = [case.truth for case in own if case.truth not in judge.labels]
    if not any(case.kind == "e" for case in own):
        strange += [one.name for one in given if same(one.label) not in labels]
    if strange:
        some = ", ".join(judge.labels[:6])
        raise ConceptError(
            f"judge {judge.name} does not know {', '.join(map(repr, dict.fromkeys(strange)))}; it tells "
            f"{len(judge.labels)} labels apart ({some}, ...). Choose another judge, or give prompts with its labels"
        )
    found = (replace(one, label=labels[same(one.label)]) for one in given if same(one.label) in labels)
    kept = {labels[same(entry.label)]: entry for entry in known if same(entry.label) in labels}
    return tuple(found), tuple(replace(entry, label=label) for label, entry in kept.items())


def _check_templates(templates: Sequence[str]) -> None:
    for template in templates:
        if template.count("{}") + template.count("{a}") != 1:
            raise ConfigError(f"template {template!r}: write {{}} or {{a}} once, where the concept's name goes")


def _warn_of_gaps(cases: Sequence[Case], config: EvaluationConfig) -> None:
    """Warn of kinds that were asked for and have no prompt. Few concepts have keywords that draw them (residue)."""
    kinds = {case.kind for case in cases}
    asked = {"g": config.alias_count, "n": config.neighbours, "s": config.far}
    gaps = [KINDS[kind] for kind, count in asked.items() if count and kind not in kinds]
    if gaps:
        warnings.warn(
            f"no prompts for {', '.join(gaps)}: these figures, and means that need them, stay empty. Give --preserve, "
            "--alias or --prompts, or a judge that knows more of the model's concepts",
            RealEraWarning,
            stacklevel=3,
        )


def _roles(planner: Planner, given: Sequence[Erased], record: Mapping[str, Any] | None) -> dict[str, str]:
    """Word -> its role on the map; the first role of a word stands."""
    found = {name: "erased" for one in given for name in (one.name, *one.aliases)}
    for name in (record or {}).get("preserve", ()):
        found.setdefault(name, "preserved")
    for name in (name for labels in planner.near.values() for name in labels):
        found.setdefault(name, "neighbour")
    return found
