"""The library call: `invert_model` attacks an edit by textual inversion, with its control, and judges what is drawn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contexts import fill
from .errors import ConceptError, ConfigError
from .evaluation_plan import TEMPLATES, read_known, same
from .generate import Drawing, PictureFolder, Progress, draw, drawable, fingerprint, open_pipeline
from .inversion import Inversion, denoising_error, invert, start_token, turned, word
from .judges import Judge, open_judge
from .metrics import Rate
from .report import plain

STEPS, EXAMPLES, START = 200, 8, "object"
# Shots of one prompt: examples are drawn with seeds that no figure is taken on.
FIRST_EXAMPLE = 10_000


@dataclass(frozen=True)
class Drawn:
    """One line of the report: what `model` ("unedited", "edited") draws of the concept by `word`.

    `word`: "its name", "start word", "learned word" or "control". `rate`: how often the judge sees the concept, None
    without a judge. `error`: of the denoiser, on pictures that nothing was learned from (the control: turned ones).
    """

    model: str
    word: str
    rate: Rate | None
    error: float


@dataclass(frozen=True)
class InversionReport:
    """Textual inversion of one concept: what the attack brings back, beside what it could and what it must not.

    "edited, learned word" is the attack; "edited, start word" is where it begins. "unedited, learned word" is the most
    that so many steps bring about, "edited, control" the least: a word for pictures that no prompt draws (`turned`).
    """

    concept: str
    steps: int
    examples: int
    judge: str | None
    rows: tuple[Drawn, ...]

    def row(self, model: str, word: str) -> Drawn:
        """The line of this model and word."""
        return next(row for row in self.rows if (row.model, row.word) == (model, word))

    @property
    def regained(self) -> float:
        """The way from the start word to the unedited model's own name that the learned word went, by denoising error.

        For want of a judge: 0 is nothing, 1 the concept as it was; NaN where there is no way to go.
        """
        begun, found = (self.row("edited", word).error for word in ("start word", "learned word"))
        whole = begun - self.row("unedited", "its name").error
        return (begun - found) / whole if whole > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [
            {"model": r.model, "word": r.word, "rate": r.rate.to_dict() if r.rate else None, "error": r.error}
            for r in self.rows
        ]
        about = {"concept": self.concept, "steps": self.steps, "examples": self.examples, "judge": self.judge}
        found: dict[str, Any] = plain({**about, "regained": self.regained, "rows": rows})
        return found

    def report(self) -> str:
        """A few lines of text."""
        by = f", judged by {self.judge}" if self.judge else ""
        lines = [f"inversion  {self.concept}: {self.steps} steps on {self.examples} pictures of the unedited model{by}"]
        for row in self.rows:
            shown = ""
            if row.rate is not None:
                low, high = row.rate.interval
                shown = f"drawn {row.rate.value:.2f} [{low:.2f}, {high:.2f}] of {row.rate.count}, "
            lines.append(f"           {f'{row.model}, {row.word}':<24}{shown}denoising error {row.error:.4f}")
        if not math.isnan(self.regained):
            lines.append(
                f"           by this error, the learned word goes {self.regained:.0%} of the way to the concept"
            )
        return "\n".join(lines)


def invert_model(
    model: Any,
    edited: Any,
    concepts: str | Sequence[str],
    *,
    steps: int = STEPS,
    examples: int = EXAMPLES,
    start: str = START,
    judge: Judge | str | None = None,
    preserve: Sequence[str] = (),
    templates: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2, 3),
    drawing: Drawing | None = None,
    batch: int = 16,
    out: str | Path | None = None,
    device: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> list[InversionReport]:
    """Learn a word for each of `concepts` in the edited model, and look how often it draws the concept again.

    `model`, `edited`: diffusers folders, hub ids, or two loaded pipelines, in float32. Each word is learned in `steps`
    from `examples` pictures that the unedited model draws. `judge`: as in `evaluate`; None looks at the denoising error
    alone. `preserve`: other labels for a judge that is told what to tell apart. `out`: a folder for words (as
    `pipe.load_textual_inversion` reads them) and pictures, with which a broken run goes on; None keeps nothing. Raises
    a `RealEraError`.
    """
    names = [concepts] if isinstance(concepts, str) else list(concepts)
    if not names or not all(name.strip() for name in names):
        raise ConceptError("attack: a concept is empty; name at least one")
    if steps < 1 or examples < 1 or not seeds:
        raise ConfigError(
            f"inversion: {steps} steps, {examples} examples, {len(seeds)} seeds: expected at least 1 each"
        )
    model, edited = (drawable(one, revision) for one in (model, edited))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = [entry.label for entry in read_known(model)] if isinstance(model, Path) else []
    found = _judge(judge, names, [*preserve, *known], place)
    templates = tuple(templates) or tuple(getattr(found, "templates", TEMPLATES))
    options = {"device": place, "variant": variant}
    rows: dict[str, list[Drawn]] = {name: [] for name in names}
    with _folder(out) as folder:
        task = _Task(folder, found, templates, start, steps, tuple(seeds), drawing or Drawing(), batch, progress)
        before = _side("unedited", model, task, options)
        shown = {name: before.examples(name, examples) for name in names}
        held = {name: before.own(name) for name in names}
        for name in names:
            rows[name] += [before.named(name, held[name]), before.learned(name, shown[name], held[name])]
        del before  # one model in memory at a time
        after = _side("edited", edited, task, options)
        for name in names:
            rows[name] += [after.named(name, held[name]), after.begun(name, held[name])]
            rows[name] += [after.learned(name, shown[name], held[name], control=control) for control in (False, True)]
    return [
        InversionReport(name, steps, examples, None if found is None else found.name, tuple(rows[name]))
        for name in names
    ]


def _side(label: str, model: Any, task: _Task, options: Mapping[str, Any]) -> _Side:
    pipe = open_pipeline(model, **options) if isinstance(model, Path) else model
    start_token(pipe, task.start)  # told before anything is drawn
    return _Side(label, pipe, fingerprint(pipe), task)


@contextlib.contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="realera-edit-") as folder:
        yield Path(folder)


def _judge(judge: Judge | str | None, names: Sequence[str], others: Sequence[str], device: str) -> Judge | None:
    """The judge, which must tell the concepts from something else."""
    if judge is None:
        return None
    found = open_judge(judge, list(dict.fromkeys([*names, *others])), device) if isinstance(judge, str) else judge
    if len(found.labels) < 2:
        raise ConfigError(
            f"judge {found.name} knows one label, and would see it in every picture; name others with --preserve"
        )
    labels = {same(label) for label in found.labels}
    strange = [name for name in names if same(name) not in labels]
    if strange:
        raise ConceptError(f"judge {found.name} does not know {', '.join(map(repr, strange))}; choose another judge")
    return found


@dataclass(frozen=True)
class _Task:
    """What all models and concepts have in common."""

    folder: Path
    judge: Judge | None
    templates: tuple[str, ...]
    start: str
    steps: int
    seeds: tuple[int, ...]
    drawing: Drawing
    batch: int
    progress: Progress | None

    def rate(self, pictures: np.ndarray, name: str) -> Rate | None:
        """How many of uint8 pictures [n, H, W, 3] show the concept."""
        if self.judge is None:
            return None
        index = [same(label) for label in self.judge.labels].index(same(name))
        return Rate(int((self.judge(pictures).concept == index).sum()), len(pictures))


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    label: str
    pipe: Any
    fingerprint: str
    task: _Task

    def drawn(self, name: str, seeds: Sequence[int], count: int | None = None, key: str = "") -> Tensor:
        """Pictures [n, H, W, 3] of every template on every seed, the first `count` of them; stored by model and `key`.

        `name`: the word in the prompts, which a hook may have given another meaning, of which `key` must tell.
        """
        task = self.task
        shots = [(fill(t, name).prompt, seed) for seed in seeds for t in task.templates][:count]
        place = task.folder / "pictures" / (f"{self.label}-{key[:16]}" if key else self.label)
        folder = PictureFolder(place, self.fingerprint + key, task.drawing)
        draw(self.pipe, folder, shots, batch=task.batch, label=f"drawing {self.label}", progress=task.progress)
        return torch.from_numpy(folder.load(shots))

    def examples(self, name: str, count: int) -> Tensor:
        """What a word is learned from."""
        return self.drawn(name, range(FIRST_EXAMPLE, FIRST_EXAMPLE + count), count)

    def own(self, name: str) -> Tensor:
        """What the concept's own name draws."""
        return self.drawn(name, self.task.seeds)

    def named(self, name: str, held: Tensor) -> Drawn:
        """The concept by its own name."""
        rate = self.task.rate(self.own(name).numpy(), name)
        return Drawn(self.label, "its name", rate, self.error(name, held))

    def begun(self, name: str, held: Tensor) -> Drawn:
        """The word that learning starts from."""
        rate = self.task.rate(self.own(self.task.start).numpy(), name)
        return Drawn(self.label, "start word", rate, self.error(self.task.start, held))

    def error(self, name: str, held: Tensor) -> float:
        return denoising_error(self.pipe, held, [fill(t, name).prompt for t in self.task.templates])

    def learned(self, name: str, pictures: Tensor, held: Tensor, control: bool = False) -> Drawn:
        """The concept by a word that is learned from its pictures; `control`: from turned ones."""
        kind = "control" if control else "learned word"
        source, held = (turned(pictures), turned(held)) if control else (pictures, held)
        found = self.word(f"{name}, {self.label}{', control' if control else ''}", source)
        with word(self.pipe, found.start, found.vector):
            drawn = self.drawn(found.start, self.task.seeds, key=_digest(found.vector))
            error = self.error(found.start, held)
        shown = turned(drawn, back=True) if control else drawn
        return Drawn(self.label, kind, self.task.rate(shown.numpy(), name), error)

    def word(self, label: str, pictures: Tensor) -> Inversion:
        """A word learned in this model, from the disk where the same one was learned before."""
        task = self.task
        key = hashlib.sha256(
            json.dumps([self.fingerprint, task.start, task.steps, task.templates, _digest(pictures)]).encode()
        ).hexdigest()
        path = task.folder / "words" / f"{key[:20]}.safetensors"
        if path.is_file():
            return Inversion.load(path)

        def show(step: int, _: float) -> None:
            if task.progress is not None:
                task.progress(f"learning {label}", step + 1, task.steps)

        found = invert(
            self.pipe,
            pictures,
            start=task.start,
            steps=task.steps,
            templates=[fill(template, task.start).prompt for template in task.templates],
            progress=show,
        )
        found.save(path)
        return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()
