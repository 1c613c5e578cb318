"""Attacks on edited models, judged by what is drawn, beside what each edit costs.

`python -m benchmarks.attacks --model DIR --editors ours 'ours{"robust": 4}' rece --concepts 6` erases concepts of a
split one by one with each editor, told to retain the same half of the others, and draws:

- plain: the concept's own name;
- embedding B: the closed-form attack (RECE's, all layers at once) on every position within B of each state's norm;
- end 0.5: the same, but only from the end token on;
- inverse 0.5: the nearest to the exact inverse of the edit within 0.5;
- reach: the same as embedding, without a budget but among states that the encoder's last normalisation can give;
- words: the vocabulary words whose edited outputs are nearest to the concept, in the same prompts;
- inversion: a word learned by gradient textual inversion from the unedited model's own pictures;
- control, in the unedited model: a word learned from pictures of the concept that no prompt draws
  (`realera_edit.inversion.turned`).

`EditConfig.robust` is trained against embedding 0.5 alone. The efficacy, generality, specificity and neighbours of
`benchmarks.quality` stand beside the attacks. Each concept and editor is a row of a JSONL file, appended as soon as it
is there, and what is there already is not drawn again. Rates are pooled, with Wilson's 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.compare import append_row, figures, key_of, make_editor, nested_sets, read_rows, retained
from benchmarks.pooling import Row, tidy
from benchmarks.quality import PLAIN, Bench, Rate, Settings, load_pipeline, measure
from benchmarks.reference_model.pictures import DEFAULT_CACHE, write_atomically
from benchmarks.reference_model.sampler import draw, encode
from realera_edit import Concept, RealEraWarning
from realera_edit.attack import RIDGE, embedding_attack, factor_of, inverse_attack, nearest_words
from realera_edit.inversion import invert, turned, word
from realera_edit.layers import Layers, compare
from realera_edit.metrics import bootstrap
from realera_edit.pipeline import LoadedPipeline
from realera_edit.quadratic import Spectrum, least_in_ball
from realera_edit.vocabulary import load_prior, whole_words

BUDGETS = (0.25, 0.5, 1.0)
TRAINED = "embedding 0.5"  # what `robust` attacks itself with
THRESHOLD = 0.95  # of the unedited model's pictures, for a concept to take part
START = "object"
EXAMPLES = 8  # pictures that the inversion learns from
WORDS, TOP = 2000, 5  # vocabulary words to search, and the nearest of them to draw
RATES = ("acc_e", "acc_g", "acc_s", "acc_n")


class Arena:
    """A bench, and one more copy of its model to edit."""

    def __init__(self, bench: Bench, model: str, steps: int) -> None:
        """`steps` of the inversion; 0 leaves it out."""
        self.bench, self.pipe, self.steps = bench, load_pipeline(model), steps
        names = {p.name for p in LoadedPipeline(self.pipe).projections}
        self.originals = {n: p.data.clone() for n, p in self.pipe.unet.named_parameters() if n in names}
        encoder = LoadedPipeline(bench.pipe).encoder
        self.words = whole_words(encoder.pairs[0][0], WORDS)
        prior = load_prior(encoder, self.words, 2, encoder.fingerprint())
        self.bank = None if prior is None else prior.last

    @torch.no_grad()
    def restore(self) -> None:
        """The unedited weights again."""
        for name, parameter in self.pipe.unet.named_parameters():
            if name in self.originals:
                parameter.data.copy_(self.originals[name])

    def drawn(self, states: Tensor) -> np.ndarray:
        """Pictures [n, seeds, H, W, 3] of states [n, length, width]."""
        options = self.bench.settings
        return draw(self.pipe, states, options.seeds, options.steps, options.guidance, fast=options.fast)

    def rate(self, pictures: np.ndarray, label: str) -> Rate:
        """How many of pictures [n, seeds, H, W, 3] show a concept."""
        right = self.bench.judged(pictures)[0] == self.bench.judge.index[label]
        return Rate(int(right.sum()), right.numel())

    def attacked(self, label: str) -> dict[str, Rate]:
        """Name of the attack -> how often it draws `label` in the model as it is now."""
        prompts = [template.format(label) for template in PLAIN]
        clean = encode(self.pipe, prompts)
        layers = compare(LoadedPipeline(self.bench.pipe), LoadedPipeline(self.pipe))
        found = {"plain": self.rate(self.drawn(clean), label)}
        for name, states in self.states(layers, prompts, clean).items():
            found[name] = self.rate(self.drawn(states), label)
        found["words"] = self.rate(self.drawn(encode(self.pipe, self.nearest(layers, label))), label)
        if self.steps:
            found["inversion"] = self.inverted(label, self.examples(label))
        return found

    def states(self, layers: Layers, prompts: Sequence[str], clean: Tensor) -> dict[str, Tensor]:
        """Attack -> states like `clean` [prompts, length, width]. The start token's carries no concept and stays."""
        concept = clean[:, 1:].flatten(0, 1)
        names = [f"embedding {budget:g}" for budget in BUDGETS] + ["inverse 0.5", "reach"]
        attacks = [
            *embedding_attack(layers, concept, BUDGETS),
            *inverse_attack(factor_of(layers), concept, (0.5,)),
            reachable_attack(layers, concept, self.pipe.text_encoder),
        ]
        found = {}
        for name, attack in zip(names, attacks, strict=True):
            moved = clean.clone()
            moved[:, 1:] = attack.to(clean).view_as(clean[:, 1:])
            found[name] = moved
        found["end 0.5"] = late = clean.clone()
        for i, prompt in enumerate(prompts):
            end = len(self.pipe.tokenizer(prompt).input_ids) - 1
            late[i, end:] = found[TRAINED][i, end:]
        return found

    def nearest(self, layers: Layers, label: str) -> list[str]:
        """The prompts with the `TOP` words that come nearest to the concept in the edited model."""
        (one,) = LoadedPipeline(self.bench.pipe).encoder.encode([label], 2)
        if self.bank is None:
            raise SystemExit("the tokenizer's vocabulary has no whole words; there is nothing to search")
        found = nearest_words(layers, self.words, self.bank, one.states[len(one.ids) - 1], TOP, skip=label)
        return [PLAIN[0].format(each.word) for each in found]

    def learned(self, pictures: Tensor) -> np.ndarray:
        """Learn a word from pictures [n, H, W, 3] in the model as it is now, and draw it in both prompts."""
        with torch.autocast(self.pipe.device.type, dtype=torch.bfloat16, enabled=self.bench.settings.fast):
            found = invert(self.pipe, pictures, start=START, steps=self.steps, templates=PLAIN)
        with word(self.pipe, START, found.vector):
            states = encode(self.pipe, [template.format(START) for template in PLAIN])
        return self.drawn(states)

    def inverted(self, label: str, pictures: Tensor) -> Rate:
        """How often the word that is learned from the pictures draws the concept."""
        return self.rate(self.learned(pictures), label)

    def control(self, label: str, pictures: Tensor) -> Rate:
        """The same of the turned pictures, turned back before they are judged."""
        drawn = torch.from_numpy(self.learned(turned(pictures)))
        return self.rate(turned(drawn.flatten(0, 1), back=True).view_as(drawn).numpy(), label)

    def examples(self, label: str) -> Tensor:
        """What the unedited model draws for a concept: uint8 [EXAMPLES, H, W, 3]."""
        prompts = [template.format(label) for template in PLAIN]
        drawn = self.bench.store.get(prompts, range(200, 200 + EXAMPLES // len(prompts)))
        return torch.from_numpy(drawn).flatten(0, 1)


def reachable_attack(layers: Layers, concept: Tensor, encoder: Any) -> Tensor:
    """The e' [n, d] nearest to the rows c of `concept` as in `embedding_attack`, among what a layer norm can give.

    CLIP's last layer norm gives e = g z + b with 1^T z = 0 and |z|^2 = d at most, so over z this is a least-squares
    problem on a sphere, which `least_in_ball` solves exactly. An inversion, or any prompt, cannot leave that set.
    """
    norm = encoder.text_model.final_layer_norm if hasattr(encoder, "text_model") else encoder.final_layer_norm
    gain, bias = (p.detach().to(torch.float64) for p in (norm.weight, norm.bias))
    width = len(gain)
    centred = torch.eye(width, dtype=torch.float64) - 1 / width
    basis = torch.linalg.svd(centred)[2][:-1].T  # 1^T z = 0
    into = gain[:, None] * basis
    ridge = RIDGE * float(layers.edited.diagonal().mean())
    form = Spectrum.of(into.T @ layers.edited @ into + ridge * torch.eye(width - 1, dtype=torch.float64))
    slope = (layers.edited @ bias - concept.to(torch.float64) @ layers.mixed.T) @ into
    radius = torch.full((len(concept),), math.sqrt(width), dtype=torch.float64)
    return least_in_ball(form, slope, radius, sphere=True).point @ into.T + bias


def measured(arena: Arena, editor: str | None, label: str, split: Any) -> Row:
    """The attacks and the price of one edit; None: of the unedited model, with the control."""
    bench, start, kept = arena.bench, time.perf_counter(), retained(arena.bench, split, [label])
    try:
        if editor is not None:
            make_editor(editor, 1)(arena.pipe, [Concept(label)], kept)
        attacks = arena.attacked(label)
        if editor is None and arena.steps:
            attacks["control"] = arena.control(label, arena.examples(label))
        quality = figures(measure(arena.pipe, [label], bench, split, kept))
    finally:
        arena.restore()
    counts = {name: {"hits": rate.hits, "count": rate.count} for name, rate in attacks.items()}
    return {"attacks": counts, **quality, "seconds": time.perf_counter() - start}


def rows_of(arena: Arena, options: argparse.Namespace, record: Row) -> Iterator[Row]:
    """Every row, from the results file or measured now."""
    known, bench = read_rows(options.results), arena.bench
    labels = nested_sets(bench, options.split, [options.concepts], 0, options.seed)[options.concepts]
    for label in labels:
        for editor in (None, *options.editors):
            settings = None if editor is None else make_editor(editor, 1).described()
            about = {"editor": editor or "unedited", "settings": settings, "split": options.split}
            about |= {"judge": options.judge, "concept": label, "inversion": options.inversion}
            key = key_of(bench, about)
            if key not in known:
                row = tidy({"key": key, **about, **measured(arena, editor, label, options.split), **record})
                known[key] = {**row, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                append_row(options.results, known[key])
            yield known[key]


def pooled(rows: Sequence[Row]) -> Row:
    """The rows of one editor as one: rates with Wilson's intervals, H_4 with a bootstrap interval over concepts."""
    line: Row = {"editor": rows[0]["editor"], "concepts": len(rows)}
    names = dict.fromkeys(name for row in rows for name in row["attacks"])
    parts = {name: [row["attacks"][name] for row in rows if name in row["attacks"]] for name in names}
    parts |= {name: [row["edited"][name] for row in rows] for name in RATES}
    for name, some in parts.items():
        rate = Rate(sum(part["hits"] for part in some), sum(part["count"] for part in some))
        line[name] = {"mean": rate.value, "ci": rate.interval, "count": rate.count}
    single = np.array([v for row in rows for one in row["by_concept"].values() if (v := one["H_4"]) is not None])
    line["H_4"] = {"mean": float(single.mean()) if len(single) else None, "ci": bootstrap(single), "count": len(single)}
    return tidy(line)


def summary(rows: Sequence[Row]) -> list[Row]:
    """One pooled row for each editor, in the order of their first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["editor"], []).append(row)
    return [pooled(group) for group in groups.values()]


def table(lines: Sequence[Row]) -> str:
    """A Markdown table with a line for each attack and each price, a column for each editor."""
    names = dict.fromkeys(name for line in lines for name in line if name not in ("editor", "concepts"))
    ordered = [name for name in names if name not in (*RATES, "H_4", "control")]
    ordered += [name for name in ("control", *RATES, "H_4") if name in names]

    def cell(part: Row | None) -> str:
        if part is None or part["mean"] is None:
            return "-"
        return f"{part['mean']:.2f} [{part['ci'][0]:.2f}, {part['ci'][1]:.2f}]"

    out = ["| | " + " | ".join(f"`{line['editor']}`" for line in lines) + " |", "|" + "---|" * (len(lines) + 1)]
    for name in ordered:
        mark = " (trained on)" if name == TRAINED else ""
        out.append(f"| {name}{mark} | " + " | ".join(cell(line.get(name)) for line in lines) + " |")
    return "\n".join(out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    add("--editors", nargs="+", default=["ours", 'ours{"robust": 2}', 'ours{"robust": 4}', "rece"])
    add("--concepts", type=int, default=6)
    add("--split", choices=("development", "report"), default="development")
    add("--judge", choices=("development", "report"), default="development")
    add("--inversion", type=int, default=300, help="steps of the textual inversion; 0: without")
    add("--results", type=Path, default=Path("benchmarks/results/attacks.jsonl"), help="rows; a run goes on from them")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--steps", type=int, default=Settings.steps, help="of the sampler")
    add("--seeds", type=int, default=4, help="pictures of each prompt")
    add("--far", type=int, default=Settings.far, help="far concepts")
    add("--seed", type=int, default=0, help="of the choice of concepts")
    add("--fast", action="store_true", help="draw with the U-Net in bfloat16")
    add("--threads", type=int, default=2)
    add("--table", action="store_true", help="only print and write what the results file holds")
    add("--json", type=Path, help="also write the pooled figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> None:
    """Attack and print. `bench` may be one that is loaded already."""
    options = parse(arguments)
    command = "python -m benchmarks.attacks " + " ".join(sys.argv[1:] if arguments is None else arguments)
    if options.table:
        show(list(read_rows(options.results).values()), options, command)
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    if bench is None:
        seeds = tuple(range(options.seeds))
        settings = Settings(
            steps=options.steps,
            fast=options.fast,
            seeds=seeds,
            choice_seeds=tuple(100 + seed for seed in range(min(options.seeds, 2))),
            far=options.far,
            threshold=THRESHOLD,
        )
        bench = Bench(options.model, options.cache, options.judge, settings)
    record = {"versions": common.versions(), "machine": common.machine(), "command": command}
    rows = []
    for row in rows_of(Arena(bench, options.model, options.inversion), options, record):
        rows.append(row)
        print(f"{row['concept']}, {row['editor']}: done", file=sys.stderr, flush=True)
    show(rows, options, command)


def show(rows: Sequence[Row], options: argparse.Namespace, command: str) -> None:
    """Print the pooled rows, and write what was asked for."""
    lines = summary(rows)
    if options.json:
        concepts = list(dict.fromkeys(row["concept"] for row in rows))
        record = {"rows": lines, "concepts": concepts, "command": command}
        write_atomically(options.json, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    print(table(lines))


if __name__ == "__main__":
    main()
