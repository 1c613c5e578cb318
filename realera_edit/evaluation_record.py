"""What an evaluation found: rates, means and distances from the verdicts, the record `evaluation.json`, the table."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation_plan import Case, same
from .generate import PictureFolder
from .judges import Judge, Verdicts
from .metrics import (
    Mean,
    Rate,
    feature_distance,
    floor_of,
    frechet,
    harmonic_means,
    kernel_distance,
    pixel_distances,
)
from .provenance import versions
from .report import plain
from .writer import staged_file

FORMAT = "realera-edit evaluation 1"
FILE = "evaluation.json"
NOTHING = "none of them"
_SHOWN = 6
_CHUNK = 256


@dataclass(frozen=True)
class Judged:
    """Cases x seeds, judged: verdicts have one row for each case and seed, seeds fastest. `before`: the original."""

    cases: Sequence[Case]
    seeds: Sequence[int]
    judge: Judge
    before: PictureFolder
    after: PictureFolder
    original: Verdicts
    edited: Verdicts

    def right(self, verdicts: Verdicts) -> np.ndarray:
        """Whether each picture shows its case's truth: booleans [cases, seeds]."""
        truth = np.array([self.judge.labels.index(case.truth) for case in self.cases], np.int64)
        return np.asarray(verdicts.concept.reshape(len(self.cases), -1) == truth[:, None])

    def of(self, owners: Collection[str]) -> Judged:
        """The cases of these erased concepts alone, with those of all."""
        places = [i for i, case in enumerate(self.cases) if case.owner == "" or case.owner in owners]
        count = len(self.seeds)
        rows = [i * count + j for i in places for j in range(count)]
        original, edited = (verdicts.rows(rows) for verdicts in (self.original, self.edited))
        return replace(self, cases=[self.cases[i] for i in places], original=original, edited=edited)

    def rows(self, kind: str, owner: str | None = None) -> list[int]:
        """Places of the cases of a kind, and of one erased concept if given (those of all are of each)."""
        return [
            i for i, case in enumerate(self.cases) if case.kind == kind and (owner is None or case.owner in ("", owner))
        ]

    def style_kept(self, verdicts: Verdicts) -> Rate:
        """Pictures in the style that was asked for, on the concept's own prompts."""
        if verdicts.style is None:
            return Rate(0, 0)
        styles = self.judge.styles
        chosen = [i for i in self.rows("e") if self.cases[i].style in styles]
        wanted = np.array([styles.index(self.cases[i].style or "") for i in chosen], np.int64)
        got = verdicts.style.reshape(len(self.cases), -1)[chosen]
        return Rate(int((got == wanted[:, None]).sum()), got.size)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Mean |edited - original| / 255 of each picture: [cases, seeds]."""
        shots = [(case.prompt, seed) for case in self.cases for seed in self.seeds]
        parts = [shots[at : at + _CHUNK] for at in range(0, len(shots), _CHUNK)]
        found = [pixel_distances(self.after.load(part), self.before.load(part)) for part in parts]
        return np.concatenate([np.zeros(0), *found]).reshape(len(self.cases), -1)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. `data` is the whole record as JSON types; the rest is what the table shows.

    `rates`: name -> (edited, original). `harmonic`: name -> mean over concepts. `distances`: name -> value, and the
    floor between two halves of the original's pictures where it is needed to read the value.
    """

    rates: Mapping[str, tuple[Rate, Rate]]
    harmonic: Mapping[str, Mean]
    distances: Mapping[str, Mapping[str, float]]
    data: Mapping[str, Any]

    def table(self) -> str:
        """The figures in lines, the unedited model's beside."""
        lines = [f"{'':<13}{'edited':<26}{'unedited':<26}pictures"]
        for name, pair in self.rates.items():
            if pair[0].count:
                both = "".join(f"{r.value:6.3f} [{r.interval[0]:.3f}, {r.interval[1]:.3f}]   " for r in pair)
                lines.append(f"{name:<13}{both}{pair[0].count:>6}")
            else:
                lines.append(f"{name:<13}     -")
        for name, mean in self.harmonic.items():
            figures = f"{mean.value:6.3f} [{mean.low:.3f}, {mean.high:.3f}]   over {mean.concepts} concepts"
            lines.append(f"{name:<13}{figures}" if mean.concepts else f"{name:<13}     -")
        for name, found in self.distances.items():
            floor = f"   original against itself {found['floor']:.4g}" if "floor" in found else ""
            known = not math.isnan(found["value"])
            lines.append(f"{name:<13}{found['value']:6.4g}{floor}" if known else f"{name:<13}     -")
        if still := self.still_drawn():
            shown = (f"{row['prompt']!r}: {row['owner']} ({row['edited']} of {row['count']})" for row in still[:_SHOWN])
            more = f", and {len(still) - _SHOWN} prompts more" if len(still) > _SHOWN else ""
            lines.append(f"still drawn by {', '.join(shown)}{more}")
            lines.append(
                "Erase again with such words as aliases (--alias, or the column aliases) if they are to go, too."
            )
        return "\n".join(lines)

    def still_drawn(self) -> list[Mapping[str, Any]]:
        """Rows of `data["prompts"]` of other names and of words whose pictures still show the concept, most first."""
        rows = [row for row in self.data["prompts"] if row["kind"] in "gr" and row["edited"]]
        return sorted(rows, key=lambda row: -row["edited"] / row["count"])

    def to_dict(self) -> dict[str, Any]:
        """The record that is written to `evaluation.json`."""
        return dict(self.data)

    def save(self, folder: str | Path) -> Path:
        """Write `evaluation.json` into the folder of the pictures, whole or not at all. Raises `CheckpointError`."""
        path = Path(folder) / FILE
        text = json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with staged_file(path, force=True, needed=len(text)) as place:
            place.write_text(text, encoding="utf-8")
        return path


def summary(
    judged: Judged, preserved: set[str]
) -> tuple[dict[str, tuple[Rate, Rate]], list[dict[str, Any]], dict[str, Mean]]:
    """Rates (edited, original), each erased concept's figures, and their harmonic means."""
    right = _right(judged)
    owners = dict.fromkeys(case.owner for case in judged.cases if case.kind == "e")
    concepts = [_concept(judged, right, owner) for owner in owners]
    harmonic = {name: Mean.of(row[name] for row in concepts) for name in ("H_4", "H_o", "H_c")}
    return _rates(judged, right, preserved), concepts, harmonic


def build(judged: Judged, out: Path, about: Mapping[str, Any], preserved: set[str]) -> Evaluation:
    """Compute everything. `about`: the parts of the record that no picture tells; `preserved`: held by the edit."""
    rates, concepts, harmonic = summary(judged, preserved)
    distances = _distances(judged)
    recipe = about.get("recipe")
    data = plain(
        {
            "format": FORMAT,
            **{name: value for name, value in about.items() if name != "recipe"},
            "judge": {"name": judged.judge.name, "concepts": len(judged.judge.labels)},
            "rates": {name: {"edited": e.to_dict(), "original": o.to_dict()} for name, (e, o) in rates.items()},
            "harmonic": {name: vars(mean) for name, mean in harmonic.items()},
            "distances": distances,
            "concepts": concepts,
            "prompts": _prompts(judged, _right(judged), out),
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    )
    return Evaluation(rates, harmonic, distances, {**data, "recipe": recipe})


def _right(judged: Judged) -> dict[str, np.ndarray]:
    return {"edited": judged.right(judged.edited), "original": judged.right(judged.original)}


def _rate(right: np.ndarray, rows: Sequence[int]) -> Rate:
    chosen = right[list(rows)]
    return Rate(int(chosen.sum()), chosen.size)


def _rates(judged: Judged, right: Mapping[str, np.ndarray], preserved: set[str]) -> dict[str, tuple[Rate, Rate]]:
    near = judged.rows("n")
    rows = {f"acc_{kind}": judged.rows(kind) for kind in "egsn"}
    rows["acc_n_unseen"] = [i for i in near if same(judged.cases[i].truth) not in preserved]
    rows["residue"] = judged.rows("r")
    found = {name: (_rate(right["edited"], places), _rate(right["original"], places)) for name, places in rows.items()}
    return {**found, "style_kept": (judged.style_kept(judged.edited), judged.style_kept(judged.original))}


def _concept(judged: Judged, right: Mapping[str, np.ndarray], owner: str) -> dict[str, Any]:
    """One erased concept's own figures, edited; under "original" those of the unedited model."""
    rows = {kind: judged.rows(kind, owner) for kind in "egsn"}
    both = {
        model: {f"acc_{kind}": _rate(array, places).value for kind, places in rows.items()}
        for model, array in right.items()
    }
    e, g, s, n = (both["edited"][f"acc_{kind}"] for kind in "egsn")
    return {"name": owner, **both["edited"], **harmonic_means(e, g, s, n), "original": both["original"]}


def _distances(judged: Judged) -> dict[str, dict[str, float]]:
    """Of the pictures that must stay: far concepts, or neighbours where there are none."""
    rows = judged.rows("s") or judged.rows("n")
    pixel = float(judged.pixels[rows].mean()) if rows else math.nan
    found: dict[str, dict[str, float]] = {"pixel": {"value": pixel}, "feature": {"value": math.nan}}
    empty = {"value": math.nan, "floor": math.nan}
    if judged.edited.features is None or judged.original.features is None or not rows:
        return {**found, "frechet": empty, "kernel": dict(empty)}
    shape = (len(judged.cases), len(judged.seeds), -1)
    after, before = (v.reshape(shape)[rows] for v in (judged.edited.features, judged.original.features))
    width = before.shape[2]
    a, b = after.reshape(-1, width), before.reshape(-1, width)
    found["feature"] = {"value": feature_distance(a, b)}
    for name, distance in (("frechet", frechet), ("kernel", kernel_distance)):
        found[name] = {"value": distance(a, b), "floor": floor_of(before, distance)}
    return found


def _prompts(judged: Judged, right: Mapping[str, np.ndarray], out: Path) -> list[dict[str, Any]]:
    """Each prompt with its hits and its pictures, by paths relative to the folder of the record."""
    labels = (*judged.judge.labels, NOTHING)  # -1 is the last
    said = {
        "original": judged.original.concept.reshape(len(judged.cases), -1),
        "edited": judged.edited.concept.reshape(len(judged.cases), -1),
    }
    folders = {"original": judged.before, "edited": judged.after}
    found = []
    for i, case in enumerate(judged.cases):
        pictures = [
            {
                "seed": seed,
                **{m: f.path(case.prompt, seed).relative_to(out).as_posix() for m, f in folders.items()},
                **{f"{model}_verdict": labels[verdict[i, j]] for model, verdict in said.items()},
                "pixel": float(judged.pixels[i, j]),
            }
            for j, seed in enumerate(judged.seeds)
        ]
        found.append(
            {
                **{name: getattr(case, name) for name in ("kind", "owner", "prompt", "truth", "style")},
                **{model: int(array[i].sum()) for model, array in right.items()},
                "count": len(judged.seeds),
                "pictures": pictures,
            }
        )
    return found
