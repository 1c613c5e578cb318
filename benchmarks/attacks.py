"""Attacks on edited models, judged by what is drawn: how often does the erased concept come back?

`python -m benchmarks.attacks --model DIR --editors ours rece --concepts 6` erases concepts of a split one by one with
each editor, told to retain the same half of the others, and draws: the plain prompt; the closed-form embedding attack
(RECE's, all layers at once) on every position of the prompt within each budget; and a word learned by gradient textual
inversion from the unedited model's own pictures. acc_s, of far concepts, says what the edit cost. The same attacks on a
concept that the model never knew are the control: what they draw owes nothing to the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.compare import make_editor, nested_sets, retained
from benchmarks.quality import PLAIN, Bench, Rate, Settings, load_pipeline
from benchmarks.reference_model.pictures import DEFAULT_CACHE, load, write_atomically
from benchmarks.reference_model.sampler import draw, encode
from realera_edit import Concept, RealEraWarning
from realera_edit.attack import embedding_attack
from realera_edit.inversion import invert, word
from realera_edit.layers import Layers, compare
from realera_edit.pipeline import LoadedPipeline

BUDGETS = (0.25, 0.5, 1.0)
PROMPT = "an emoji of a {}"
START = "object"
EXAMPLES = 8  # pictures that the inversion learns from


class Arena:
    """A bench, and one more copy of its model to edit."""

    def __init__(self, bench: Bench, model: str, steps: int) -> None:
        """`steps` of the inversion; 0 leaves it out."""
        self.bench, self.pipe, self.steps = bench, load_pipeline(model), steps
        names = {p.name for p in LoadedPipeline(self.pipe).projections}
        self.originals = {n: p.data.clone() for n, p in self.pipe.unet.named_parameters() if n in names}

    @torch.no_grad()
    def restore(self) -> None:
        """The unedited weights again."""
        for name, parameter in self.pipe.unet.named_parameters():
            if name in self.originals:
                parameter.data.copy_(self.originals[name])

    def rate(self, states: Tensor, labels: Sequence[str]) -> Rate:
        """How many pictures of states [n, length, width] show their concept."""
        options = self.bench.settings
        pictures = draw(self.pipe, states, options.seeds, options.steps, options.guidance, fast=options.fast)
        concept, _ = self.bench.judged(pictures)
        truth = torch.tensor([self.bench.judge.index[label] for label in labels])
        right = concept == truth[:, None]
        return Rate(int(right.sum()), right.numel())

    def attacked(self, label: str, pictures: Tensor) -> dict[str, Rate]:
        """Name of the attack -> how often it draws `label` in the model as it is now."""
        clean = encode(self.pipe, [PROMPT.format(label)])
        layers = compare(LoadedPipeline(self.bench.pipe), LoadedPipeline(self.pipe))
        found = {"plain prompt": self.rate(clean, [label])}
        for budget, moved in zip(BUDGETS, self._moved(layers, clean[0]), strict=True):
            found[f"embedding {budget:g}"] = self.rate(moved, [label])
        if self.steps:
            found["textual inversion"] = self.inverted(label, pictures)
        return found

    @staticmethod
    def _moved(layers: Layers, states: Tensor) -> list[Tensor]:
        """The attack on every position but the start token's, which carries no concept: [1, length, width] each."""
        attacks = embedding_attack(layers, states[1:], BUDGETS)
        return [torch.cat([states[:1], attack.to(states)])[None] for attack in attacks]

    def inverted(self, label: str, pictures: Tensor) -> Rate:
        """Learn a word from the pictures in the model as it is now, and draw it."""
        learned = invert(self.pipe, pictures, start=START, steps=self.steps, templates=PLAIN)
        with word(self.pipe, START, learned.vector):
            states = encode(self.pipe, [template.format(START) for template in PLAIN])
        return self.rate(states, [label] * len(states))

    def examples(self, label: str) -> Tensor:
        """What the unedited model draws for a concept: uint8 [EXAMPLES, H, W, 3]."""
        prompts = [template.format(label) for template in PLAIN]
        drawn = self.bench.store.get(prompts, range(200, 200 + EXAMPLES // len(prompts)))
        return torch.from_numpy(drawn).flatten(0, 1)


def measured(arena: Arena, editor: str | None, labels: Sequence[str], split: Any) -> dict[str, Rate]:
    """Pooled over the concepts, each erased alone; None: the unedited model."""
    bench, totals = arena.bench, dict[str, Rate]()
    for label in labels:
        far = bench.choose([label], split).far
        if editor is not None:
            make_editor(editor, 1)(arena.pipe, [Concept(label)], retained(bench, split, [label]))
        found = arena.attacked(label, arena.examples(label))
        found["acc_s"] = arena.rate(encode(arena.pipe, [PROMPT.format(o) for o in far]), far)
        arena.restore()
        for name, rate in found.items():
            before = totals.get(name, Rate(0, 0))
            totals[name] = Rate(before.hits + rate.hits, before.count + rate.count)
        print(f"{editor or 'unedited'}: {label}", file=sys.stderr, flush=True)
    return totals


def control(arena: Arena, cache: Path, count: int) -> Rate:
    """Textual inversion of concepts that the model never saw, from their true pictures; judged as drawing those.

    The judge does not know them either, so what is counted is the share of pictures that it takes for the concept
    that it sees in the true ones most often.
    """
    everything = load(cache)
    size = arena.pipe.vae.config.sample_size
    unknown = [i for i, c in enumerate(everything.concepts) if c.label not in arena.bench.concepts][:count]
    hits = total = 0
    for place in unknown:
        full = torch.from_numpy(everything.pictures[place]).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.adaptive_avg_pool2d(full, size).round().to(torch.uint8).permute(0, 2, 3, 1)
        seen = arena.bench.judged(small[None].numpy())[0].mode().values
        rate = arena.inverted(arena.bench.judge.labels[int(seen)], small)
        hits, total = hits + rate.hits, total + rate.count
    return Rate(hits, total)


def main() -> None:
    """Attack and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    add("--editors", nargs="+", default=["ours", "uce", "rece"])
    add("--concepts", type=int, default=6)
    add("--split", choices=("development", "report"), default="development")
    add("--judge", choices=("development", "report"), default="development")
    add("--inversion", type=int, default=300, help="steps of the textual inversion; 0: without")
    add("--control", type=int, default=4, help="concepts unknown to the model to invert as a control")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--steps", type=int, default=Settings.steps)
    add("--seeds", type=int, default=4)
    add("--fast", action="store_true", help="draw with the U-Net in bfloat16")
    add("--threads", type=int, default=2)
    add("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    seeds = range(options.seeds)
    settings = Settings(
        steps=options.steps, fast=options.fast, seeds=tuple(seeds), choice_seeds=tuple(100 + s for s in seeds)
    )
    bench = Bench(options.model, options.cache, options.judge, settings)
    arena = Arena(bench, options.model, options.inversion)
    labels = nested_sets(bench, options.split, [options.concepts], 0, 0)[options.concepts]
    table = {
        editor or "unedited": measured(arena, editor, labels, options.split) for editor in (None, *options.editors)
    }
    rows = {
        editor: {name: {"value": r.value, "ci": r.interval, "count": r.count} for name, r in rates.items()}
        for editor, rates in table.items()
    }
    names = list(next(iter(table.values())))
    print("| editor | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for editor, rates in table.items():
        cells = [f"{r.value:.2f} [{r.interval[0]:.2f}, {r.interval[1]:.2f}]" for r in rates.values()]
        print(f"| {editor} | " + " | ".join(cells) + " |")
    record: dict[str, Any] = {"rows": rows, "concepts": labels}
    if options.control and options.inversion:
        unknown = control(arena, options.cache, options.control)
        record["control"] = {"value": unknown.value, "ci": unknown.interval, "count": unknown.count}
        print(f"control, inversion of unknown concepts in the unedited model: {unknown.value:.2f} of {unknown.count}")
    if options.json:
        record |= {"versions": common.versions(), "machine": common.machine(), "command": " ".join(sys.argv)}
        write_atomically(options.json, json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
