"""Which prompts an evaluation draws: names of the erased concepts, near and far concepts, keywords; or a user's file.

Kinds: "e" the concept's own name, "g" other names, "n" neighbours that must stay, "s" far concepts that must stay, "r"
keywords that never name the concept (residue).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from .contexts import fill
from .errors import CheckpointError, ConceptError, RealEraWarning
from .evaluation_config import EvaluationConfig

KINDS = {"e": "efficacy", "g": "generality", "n": "neighbours", "s": "specificity", "r": "residue"}
# For pictures of no kind in particular; a judge that was made for others brings its own.
TEMPLATES, STYLED = ("a picture of {a}", "{}"), "{a} in {style} style"
_WORD = re.compile(r"[^\W\d_]{2,}(?:['\s-][^\W\d_]+)*")
# How many names are tried for each that is wanted, before the best of them must do.
_TRIES = 4


@dataclass(frozen=True)
class Known:
    """A concept that the model is known to draw: one of `concepts.json`, or a name alone."""

    label: str
    group: int | None = None
    subgroup: int | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Erased:
    """An erased concept: its name in prompts, its label as the judge has it, other names that were given."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A prompt of a kind, the erased concept that it belongs to ("": all), the label it shows, and a style."""

    kind: str
    owner: str
    prompt: str
    truth: str
    style: str | None = None


# Share of the unedited model's pictures that show the label, for pairs (label, name to prompt with).
Accuracy = Callable[[Sequence[tuple[str, str]]], list[float]]
# Words that the unedited model may draw like a name, those that tell most first.
Alike = Callable[[str], list[str]]
# Cosines [n, m] between the end-of-text states of n and m names.
Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def read_known(folder: Path) -> tuple[Known, ...]:
    """The concepts of a model's `concepts.json` (a list, or an object with "concepts"); () without that file."""
    path = folder / "concepts.json"
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = content["concepts"] if isinstance(content, dict) else content
        return tuple(Known(r["label"], r.get("group"), r.get("subgroup"), tuple(r.get("tags", ()))) for r in rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a list of concepts with label, group, subgroup, tags: {error}"
        ) from error


def read_prompts(path: Path) -> tuple[Case, ...]:
    """Prompts from a CSV file with the columns kind, prompt, truth, and if need be style, owner.

    `truth`: the judge's label for what the prompt shows; `owner`: the erased concept that it belongs to (default: the
    truth for kinds e, g and r). Raises `ConceptError`, naming the row.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except FileNotFoundError:
        raise ConceptError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConceptError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error
    if not rows:
        raise ConceptError(f"{path}: lists no prompt; the first line is the header kind,prompt,truth")
    return tuple(_case(row, f"{path}, row {number}") for number, row in enumerate(rows, 1))


def _case(row: dict[Any, Any], where: str) -> Case:
    unknown = [str(key) for key in row if key not in ("kind", "prompt", "truth", "style", "owner")]
    if unknown or not {"kind", "prompt", "truth"} <= set(row):
        raise ConceptError(f"{where}: expected the columns kind,prompt,truth, and if need be style,owner")
    kind, prompt, truth, style, owner = (
        " ".join((row.get(name) or "").split()) for name in ("kind", "prompt", "truth", "style", "owner")
    )
    if kind not in KINDS:
        known = ", ".join(f"{key} ({value})" for key, value in KINDS.items())
        raise ConceptError(f"{where}: kind {kind!r}: expected one of {known}")
    if not truth:
        raise ConceptError(f"{where}: has no truth, which is the judge's label for what the prompt shows")
    return Case(kind, owner or (truth if kind in "egr" else ""), prompt, truth, style or None)


def same(text: str) -> str:
    """What counts as one name: case and spaces aside."""
    return " ".join(text.split()).casefold()


def names_it(text: str, names: Iterable[str]) -> bool:
    """Whether `text` has one of `names` in it, as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(same(name))}(?!\w)", same(text)) for name in names)


class Planner:
    """Chooses the names of every kind by what the unedited model draws; each pair (label, name) is drawn once."""

    def __init__(
        self,
        erased: Sequence[Erased],
        known: Sequence[Known],
        accuracy: Accuracy,
        similarity: Similarity,
        config: EvaluationConfig,
        preserved: Iterable[str] = (),
        alike: Alike = lambda name: [],
    ) -> None:
        """`known`: what may serve as neighbour or far concept; `preserved`: held by the edit, so never far."""
        self.config, self.similarity, self._accuracy, self._alike = config, similarity, accuracy, alike
        self._rates: dict[tuple[str, str], float] = {}
        self.known = {entry.label: entry for entry in known}
        self._owners = Counter(same(tag) for entry in known for tag in entry.tags)
        gone = {same(name) for one in erased for name in (one.name, one.label, *one.aliases)}
        self.pool = [label for label in self.known if same(label) not in gone]
        self._preserved = {same(name) for name in preserved}
        self.erased = self._taking_part(erased)
        self.near = {one.label: self._near(one) for one in self.erased}
        self.far = self._far()

    def rates(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """`accuracy`, remembered."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._rates]
        if new:
            self._rates.update(zip(new, self._accuracy(new), strict=True))
        return [self._rates[pair] for pair in pairs]

    def _taking_part(self, erased: Sequence[Erased]) -> tuple[Erased, ...]:
        rates = self.rates([(one.label, one.name) for one in erased])
        least = self.config.threshold
        if max(rates, default=1.0) < least:
            least = max(rates)
        chosen = tuple(one for one, rate in zip(erased, rates, strict=True) if rate >= least)
        weak = [f"{one.name} ({r:.2f})" for one, r in zip(erased, rates, strict=True) if r < self.config.threshold]
        if weak:
            warnings.warn(
                f"the unedited model draws {len(weak)} of {len(erased)} erased concepts in less than "
                f"{self.config.threshold:g} of its pictures: {', '.join(weak[:6])}{' ...' if len(weak) > 6 else ''}. "
                + ("They do not take part" if len(chosen) + len(weak) == len(erased) else "The best takes part"),
                RealEraWarning,
                stacklevel=4,
            )
        return chosen

    def _picked(self, candidates: Iterable[tuple[str, str]], wanted: int, least: float, what: str) -> list[str]:
        """The first `wanted` names that reach `least`; where too few do, the best of the others, with a warning.

        Candidates are pairs (label, name). They are drawn in portions, so that no more are drawn than need be.
        """
        tried: list[tuple[str, str]] = []
        rest: Iterator[tuple[str, str]] = iter(candidates)
        found: list[str] = []
        while len(found) < wanted and len(tried) < _TRIES * wanted:
            part = list(islice(rest, min(wanted, _TRIES * wanted - len(tried))))
            if not part:
                break
            tried += part
            found += [name for (_, name), rate in zip(part, self.rates(part), strict=True) if rate >= least]
        if len(found) >= wanted or not what:
            return found[:wanted]
        others = sorted((pair for pair in tried if pair[1] not in found), key=lambda pair: -self._rates[pair])
        others = [pair for pair in others if self._rates[pair] > 0][: wanted - len(found)]
        reach = f"{len(found)} of {wanted} {what} reach {least:g} on the unedited model"
        worst = f"; {len(others)} more take part, the least at {self._rates[others[-1]]:.2f}" if others else ""
        warnings.warn(reach + worst, RealEraWarning, stacklevel=5)
        return found + [name for _, name in others]

    def _ranked(self, name: str, pool: Sequence[str]) -> list[str]:
        """`pool`, nearest by text state first."""
        if not pool:
            return []
        return [pool[place] for place in np.argsort(-self.similarity([name], pool)[0], kind="stable")]

    def _near(self, one: Erased) -> tuple[str, ...]:
        """Neighbours by text state: half from its own Unicode subgroup where that is known, the rest from anywhere."""
        least, wanted = self.config.threshold, min(self.config.neighbours, len(self.pool))
        ranked = self._ranked(one.name, self.pool)
        own = self.known.get(one.label, Known("")).subgroup
        kin = [label for label in ranked if own is not None and self.known[label].subgroup == own]
        first = self._picked(((label, label) for label in kin), wanted // 2, least, "")
        others = ((label, label) for label in ranked if label not in first)
        return (*first, *self._picked(others, wanted - len(first), least, f"neighbours of {one.name}"))

    def _far(self) -> tuple[str, ...]:
        """Concepts outside the erased ones' groups; if too few are left, outside their subgroups; or any. No
        neighbour, none that the edit preserved; in an order that depends on nothing but their names.
        """
        near = {label for labels in self.near.values() for label in labels}
        free = [label for label in self.pool if label not in near and same(label) not in self._preserved]
        free.sort(key=lambda label: hashlib.sha256(label.encode()).digest())
        marks = [self.known.get(one.label, Known("")) for one in self.erased]
        groups, kin = {mark.group for mark in marks}, {mark.subgroup for mark in marks}
        for pool in (
            [label for label in free if self.known[label].group not in groups],
            [label for label in free if self.known[label].subgroup not in kin],
            free,
        ):
            if len(pool) >= 2 * self.config.far or pool is free:
                wanted = min(self.config.far, len(pool))
                return tuple(self._picked(((o, o) for o in pool), wanted, self.config.threshold, "far concepts"))
        return ()

    def others(self, one: Erased) -> tuple[str, ...]:
        """Other names that the unedited model draws as the concept: those given, then keywords of it alone."""
        tags = [tag for tag in self._tags(one) if self._owners[same(tag)] == 1]
        names = dict.fromkeys([*one.aliases, *self._ranked(one.name, tags)])
        pairs = ((one.label, name) for name in names)
        return tuple(self._picked(pairs, self.config.alias_count, self.config.alias_threshold, ""))

    def keywords(self, one: Erased, others: Sequence[str]) -> tuple[str, ...]:
        """Prompts that the unedited model draws as the concept, and that name neither it nor one of its `others`.

        Keywords, alone and in twos: only such as other concepts have too, since one that is its alone may be a name of
        it. Where they are too few, vocabulary words that it draws alike (`probe.WordFinder`).
        """
        taken = (one.name, one.label, *one.aliases, *others)
        tags = [tag for tag in self._tags(one) if self._owners[same(tag)] > 1 and not names_it(tag, taken)]
        ranked = self._ranked(one.name, tags)[:6]
        prompts = [*ranked, *(f"{a} {b}" for a, b in combinations(ranked, 2))]
        pairs = ((one.label, prompt) for prompt in prompts)
        found = self._picked(pairs, self.config.residue, self.config.alias_threshold, "")
        missing = self.config.residue - len(found)
        if missing > 0:
            words = self._words(one, self._alike(one.name))
            new = [word for word in words if not names_it(word, taken) and word not in prompts]
            pairs = ((one.label, word) for word in new[: 2 * missing])
            found += self._picked(pairs, missing, self.config.alias_threshold, "")
        return tuple(found)

    def _tags(self, one: Erased) -> list[str]:
        """The concept's keywords that may stand for it."""
        return self._words(one, self.known.get(one.label, Known("")).tags)

    def _words(self, one: Erased, texts: Iterable[str]) -> list[str]:
        """Those that are words, name neither the concept nor a part of it, and are no other concept's label."""
        labels = {same(label) for label in self.known}
        names = (one.name, one.label, *same(one.name).split())
        return [
            text for text in texts if _WORD.fullmatch(text) and same(text) not in labels and not names_it(text, names)
        ]

    def cases(self, templates: Sequence[str], styled: str, styles: Sequence[str], kinds: str) -> list[Case]:
        """Every prompt of the chosen `kinds`."""
        found = []
        for one in self.erased:
            others = self.others(one) if set(kinds) & {"g", "r"} else ()
            words = self.keywords(one, others) if "r" in kinds else ()
            found += own_cases(one, {"g": others, "n": self.near[one.label], "r": words}, templates, styled, styles)
        found += [Case("s", "", fill(t, o).prompt, o) for o in self.far for t in templates]
        return [case for case in found if case.kind in kinds]


def own_cases(
    one: Erased, names: Mapping[str, Sequence[str]], templates: Sequence[str], styled: str, styles: Sequence[str]
) -> list[Case]:
    """Every prompt that belongs to one erased concept; `names`: further kinds -> what to prompt with."""
    label = one.label
    found = [Case("e", label, fill(t, one.name).prompt, label) for t in templates]
    found += [Case("e", label, fill(styled.replace("{style}", s), one.name).prompt, label, s) for s in styles]
    for kind, texts in names.items():
        found += [Case(kind, label, fill(t, x).prompt, x if kind == "n" else label) for x in texts for t in templates]
    return found
