"""How well concepts are erased and the others kept, judged on pictures.

`measure` draws an edited model and compares it with the unedited one: efficacy (Acc_e), generality (Acc_g),
specificity (Acc_s), neighbours (Acc_n), their harmonic means, and pixel drift. No picture is dropped.
`python -m benchmarks.quality --model CHECKPOINT --smoke` measures the unedited model against itself.
"""

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference_model.judge import Judge
from benchmarks.reference_model.pictures import DEFAULT_CACHE, Concept, read_concepts
from benchmarks.reference_model.sampler import PictureStore, generate, load_pipeline
from benchmarks.reference_model.splits import Split, aliases, split_of
from benchmarks.reference_model.texts import fixed_aliases
from realera_edit.contexts import fill
from realera_edit.evaluation_plan import Case, Erased, own_cases
from realera_edit.hub import resolve
from realera_edit.judges import ReferenceJudge
from realera_edit.metrics import Rate, bootstrap, harmonic_means

__all__ = ["Bench", "ConceptSet", "Quality", "Rate", "Settings", "generate", "load_pipeline", "measure"]

PLAIN, STYLED = ReferenceJudge.templates, ReferenceJudge.styled


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn. Concepts and aliases are chosen on `choice_seeds`, figures are taken on `seeds`."""

    steps: int = 18
    guidance: float = 4.0
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    choice_seeds: tuple[int, ...] = (100, 101, 102, 103)
    threshold: float = 0.75  # a concept takes part where the unedited model's accuracy reaches this
    alias_threshold: float = 0.5
    styles: tuple[str, ...] = ("noto", "fluent", "monochrome")
    aliases: int = 4  # at most, for each erased concept
    candidates: int = 10  # aliases tried on the unedited model
    split_aliases: bool = True  # keep the other split's aliases out
    neighbours: int = 4
    far: int = 24
    fast: bool = False  # the U-Net in bfloat16


@dataclasses.dataclass(frozen=True)
class ConceptSet:
    """Who takes part in one measurement. `far_kind` says what the far concepts share with no erased one."""

    erased: tuple[str, ...]
    aliases: dict[str, tuple[str, ...]]
    neighbours: dict[str, tuple[str, ...]]
    far: tuple[str, ...]
    far_kind: str


@dataclasses.dataclass(frozen=True)
class Quality:
    """One measurement.

    Rates are keyed acc_e, acc_g, acc_g_unseen (aliases that no training caption contains), acc_s, acc_n, acc_n_unseen
    (neighbours that the edit did not preserve) and style_kept; `h` holds (mean over concepts, how many had every part)
    for H_4, H_4_unseen (with the unseen aliases alone), H_o and H_c.
    """

    edited: dict[str, Rate]
    original: dict[str, Rate]
    h: dict[str, tuple[float, int]]
    h_4_interval: tuple[float, float]
    drift: float
    by_concept: dict[str, dict[str, float]]
    chosen: ConceptSet
    pictures: int
    seconds: float

    def table(self) -> str:
        """The figures in lines: name, edited with its interval, unedited, pictures."""
        lines = []
        for name, rate in self.edited.items():
            low, high = rate.interval
            before = self.original[name].value
            figures = f"{rate.value:6.3f} [{low:.3f}, {high:.3f}]  unedited {before:.3f}  n {rate.count}"
            lines.append(f"{name:<13}{figures}")
        lines += [f"{name:<13}{mean:6.3f}  over {count} concepts" for name, (mean, count) in self.h.items()]
        return "\n".join([*lines, f"{'drift':<13}{self.drift:6.4f}"])


class Bench:
    """The unedited model, its stored pictures, a judge, and the concepts that may take part."""

    def __init__(
        self,
        model: Path | str,
        cache: Path = DEFAULT_CACHE,
        judge: Split = "development",
        settings: Settings = Settings(),
        device: str = "cpu",
    ) -> None:
        """Load everything; `judge` names which judge answers, `device` where it looks and the model draws."""
        model = resolve(model)
        self.settings, self.judge = settings, Judge.load(judge, model, cache, device)
        self.concepts = {c.label: c for c in read_concepts(model / "concepts.json")}
        fixed = fixed_aliases()
        ships = fixed.keys() == self.concepts.keys()
        self.names = fixed if ships else aliases(list(self.concepts.values()), cache)
        self.pipe = load_pipeline(model, device)
        self.store = PictureStore(
            self.pipe, cache / "pictures.sqlite", settings.steps, settings.guidance, settings.fast
        )
        self.labels = list(self.concepts)
        self.unseen = {(label, a.text) for label, names in self.names.items() for a in names if not a.seen}
        self.known: dict[tuple[str, str], float] = {}
        self.similarity = self._similarity()

    @torch.inference_mode()
    def _similarity(self) -> np.ndarray:
        """Cosine between the labels' text states at the end-of-text token: [concepts, concepts]."""
        tokens = self.pipe.tokenizer(self.labels, padding="max_length", truncation=True, return_tensors="pt")
        top = self.pipe.text_encoder(tokens.input_ids.to(self.pipe.text_encoder.device)).pooler_output
        states = torch.nn.functional.normalize(top, dim=1).cpu()
        return (states @ states.T).numpy()

    def judged(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """Concept and style verdicts [prompts, seeds] on pictures [prompts, seeds, H, W, 3]."""
        concept, style = self.judge(pictures.reshape(-1, *pictures.shape[2:]))
        return concept.view(pictures.shape[:2]), style.view(pictures.shape[:2])

    def accuracy(self, named: Sequence[tuple[str, str]]) -> list[float]:
        """For pairs (concept, name to prompt with): share of the unedited model's pictures judged right."""
        new = [pair for pair in dict.fromkeys(named) if pair not in self.known]
        if new:
            prompts = [template.format(name) for _, name in new for template in PLAIN]
            concept, _ = self.judged(self.store.get(prompts, self.settings.choice_seeds))
            truth = torch.tensor([self.judge.index[label] for label, _ in new])
            rates = (concept.view(len(new), -1) == truth[:, None]).float().mean(1)
            self.known |= zip(new, rates.tolist(), strict=True)
        return [self.known[pair] for pair in named]

    def qualified(self, split: Split, threshold: float | None = None) -> list[str]:
        """Concepts of a split on which the unedited model reaches the threshold."""
        least = self.settings.threshold if threshold is None else threshold
        labels = [label for label in self.labels if split_of(label) == split]
        rates = self.accuracy([(label, label) for label in labels])
        return [label for label, rate in zip(labels, rates, strict=True) if rate >= least]

    def drawn_aliases(self, label: str) -> tuple[str, ...]:
        """Aliases that the unedited model draws as the concept, in the order of `splits.aliases`."""
        options, split = self.settings, split_of(label)
        usable = [a.text for a in self.names[label] if not options.split_aliases or split_of(a.text) == split]
        tried = usable[: options.candidates]
        rates = self.accuracy([(label, name) for name in tried])
        drawn = [name for name, rate in zip(tried, rates, strict=True) if rate >= options.alias_threshold]
        return tuple(drawn[: options.aliases])

    def nearest(self, label: str, pool: Iterable[str]) -> tuple[str, ...]:
        """Neighbours by text state: half from the concept's own Unicode subgroup, the rest from anywhere."""
        row = self.similarity[self.labels.index(label)]
        ranked = sorted(pool, key=lambda other: -row[self.labels.index(other)])
        kin = [o for o in ranked if self.concepts[o].subgroup == self.concepts[label].subgroup]
        first = kin[: self.settings.neighbours // 2]
        return tuple([*first, *(o for o in ranked if o not in first)][: self.settings.neighbours])

    def choose(self, erased: Sequence[str], split: Split, preserve: Sequence[str] = ()) -> ConceptSet:
        """Aliases, neighbours and far concepts for a list of erased concepts; all from one split."""
        unknown = [label for label in erased if label not in self.concepts]
        if unknown:
            raise ValueError(f"not concepts of this model: {unknown}; see its concepts.json")
        staying = [label for label in self.qualified(split) if label not in erased]
        near = {label: self.nearest(label, staying) for label in erased}
        used = {*preserve, *(other for others in near.values() for other in others)}
        free = sorted((o for o in staying if o not in used), key=lambda o: (split_of(o + "#far"), o[::-1]))
        far, kind = self._far(free, [self.concepts[label] for label in erased])
        return ConceptSet(tuple(erased), {c: self.drawn_aliases(c) for c in erased}, near, far, kind)

    def _far(self, free: list[str], erased: Sequence[Concept]) -> tuple[tuple[str, ...], str]:
        """Concepts outside the erased ones' groups; if too few are left, outside their subgroups; or any."""
        pool, wanted = free, self.settings.far
        for kind in ("group", "subgroup"):
            taken = {getattr(concept, kind) for concept in erased}
            pool = [o for o in free if getattr(self.concepts[o], kind) not in taken]
            if len(pool) >= wanted:
                return tuple(pool[:wanted]), kind
        return tuple(free[:wanted]), "nothing"


def cases_of(chosen: ConceptSet, styles: Sequence[str]) -> list[Case]:
    """Every prompt of a measurement."""
    cases: list[Case] = []
    for label in chosen.erased:
        names = {"g": chosen.aliases[label], "n": chosen.neighbours[label]}
        cases += own_cases(Erased(label, label), names, PLAIN, STYLED, styles)
    return cases + [Case("s", "", t.format(other), other) for other in chosen.far for t in PLAIN]


def pooled(
    cases: Sequence[Case], right: Tensor, kind: str, owner: str | None = None, prompts: set[str] | None = None
) -> Rate:
    """Hits of right [cases, seeds] over the cases of a kind; of one erased concept, of some prompts alone if given."""
    rows = [i for i, c in enumerate(cases) if c.kind == kind and owner in (None, c.owner)]
    rows = [i for i in rows if prompts is None or cases[i].prompt in prompts]
    return Rate(int(right[rows].sum()), right[rows].numel())


def unseen_prompts(bench: Bench) -> set[str]:
    """The alias prompts of names that no training caption contains."""
    return {fill(template, name).prompt for _, name in bench.unseen for template in PLAIN}


def rates_of(
    bench: Bench, cases: Sequence[Case], pictures: np.ndarray, kept: set[str]
) -> tuple[dict[str, Rate], Tensor]:
    """Pooled rates, and right [cases, seeds]. A neighbour shared by two erased concepts counts for both."""
    concept, style = bench.judged(pictures)
    right = concept == torch.tensor([bench.judge.index[c.truth] for c in cases])[:, None]
    rates = {f"acc_{kind}": pooled(cases, right, kind) for kind in "egsn"}
    rates["acc_g_unseen"] = pooled(cases, right, "g", prompts=unseen_prompts(bench))
    unseen = [i for i, c in enumerate(cases) if c.kind == "n" and c.truth not in kept]
    rates["acc_n_unseen"] = Rate(int(right[unseen].sum()), right[unseen].numel())
    styled = [(i, bench.judge.styles.index(c.style)) for i, c in enumerate(cases) if c.style]
    matches = [style[i] == s for i, s in styled]
    rates["style_kept"] = Rate(sum(int(m.sum()) for m in matches), sum(m.numel() for m in matches))
    return rates, right


def harmonics(
    cases: Sequence[Case], right: Tensor, erased: Sequence[str], unseen: set[str]
) -> dict[str, dict[str, float]]:
    """For each erased concept its own e, g, n, the common s, and H_4, H_4_unseen, H_o, H_c."""
    s, found = pooled(cases, right, "s").value, {}
    for label in erased:
        e, g, n = (pooled(cases, right, kind, label).value for kind in "egn")
        new = pooled(cases, right, "g", label, unseen).value
        found[label] = {"acc_e": e, "acc_g": g, "acc_g_unseen": new, "acc_n": n, "acc_s": s}
        found[label] |= {**harmonic_means(e, g, s, n), "H_4_unseen": harmonic_means(e, new, s, n)["H_4"]}
    return found


def measure(
    pipe: Any, erased: Sequence[str], bench: Bench, split: Split = "development", preserve: Sequence[str] = ()
) -> Quality:
    """Draw an edited pipeline and judge it beside the unedited model on the same prompts and seeds.

    `pipe` must not share weights with `bench.pipe`. Drift is mean |edited - unedited| / 255, far concepts.
    """
    start, options = time.perf_counter(), bench.settings
    chosen = bench.choose(erased, split, preserve)
    cases = cases_of(chosen, options.styles)
    prompts = [case.prompt for case in cases]
    after = generate(pipe, prompts, options.seeds, options.steps, options.guidance, fast=options.fast)
    before = bench.store.get(prompts, options.seeds)
    edited, right = rates_of(bench, cases, after, set(preserve))
    original, _ = rates_of(bench, cases, before, set(preserve))
    by_concept = harmonics(cases, right, erased, unseen_prompts(bench))
    h, whole = {}, np.empty(0)
    for name in ("H_c", "H_o", "H_4_unseen", "H_4"):
        whole = np.array([v for row in by_concept.values() if not math.isnan(v := row[name])])
        h[name] = (float(whole.mean()) if len(whole) else math.nan, len(whole))
    far = [i for i, case in enumerate(cases) if case.kind == "s"]
    change = np.abs(after[far].astype(np.float32) - before[far].astype(np.float32))
    drift = float(change.mean() / 255) if far else math.nan
    seconds = time.perf_counter() - start
    interval = bootstrap(whole)  # of H_4, the last of the loop
    count = after.shape[0] * after.shape[1]
    return Quality(edited, original, h, interval, drift, by_concept, chosen, count, seconds)


def main() -> None:
    """Measure the unedited model against itself: each Acc equals its baseline, the drift is rounding only."""
    import diffusers
    import transformers

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--smoke", action="store_true", required=True)
    parser.add_argument("--erased", type=int, default=5, help="how many concepts stand in for erased ones")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.model, options.cache)
    labels = bench.qualified("development")[: options.erased]
    quality = measure(load_pipeline(options.model), labels, bench)
    print(quality.table())
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers, np)}
    record = {
        "python": platform.python_version(),
        **versions,
        "threads": options.threads,
        "command": sys.argv,
    }
    record["settings"] = dataclasses.asdict(bench.settings)
    print(json.dumps({**record, **dataclasses.asdict(quality)}))


if __name__ == "__main__":
    main()
