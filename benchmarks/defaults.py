"""What each option costs and gains, on development concepts, without drawing a picture.

`python -m benchmarks.defaults --model DIR --concepts 1 10 --json docs/defaults.json` edits the model with one option
changed at a time. A prompt counts as drawing the concept whose own prompt gives the nearest U-Net output among all
concepts of the model, at three early timesteps on one noise: there the content is decided, and a forward pass costs a
fortieth of a picture. e, g, n, s: share of prompts of erased concepts, their aliases, their neighbours and other
concepts that still count as themselves; H_4 is their harmonic mean with 1 - e and 1 - g.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.reference_model.pictures import DEFAULT_CACHE, read_concepts
from benchmarks.reference_model.sampler import encode, load_pipeline
from benchmarks.reference_model.splits import aliases, split_of
from benchmarks.reference_model.texts import fixed_aliases
from realera_edit import EditConfig, RealEraWarning, edit_model
from realera_edit.metrics import harmonic

TIMESTEPS = (960, 840, 720)
TEMPLATES = ("an emoji of a {}", "{}")
DRAWS = {1: 12, 10: 3}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"strength": 0.7},
    {"strength": 0.9},
    {"target": "thing"},
    {"target": ""},
    {"words": 4, "word_similarity": 0.6},
    {"perturbation": "covariance"},
    {"perturbation": "isotropic"},
    {"beyond": 0},
    {"prior_words": 0},
    {"prior_words": 4000},
    {"ridge": 1e-3},
)


class Readings:
    """The unedited model's U-Net outputs for every concept, and the concepts and aliases that take part."""

    def __init__(self, model: Path) -> None:
        self.pipe = load_pipeline(model)
        concepts = read_concepts(model / "concepts.json")
        self.labels = [concept.label for concept in concepts]
        config = self.pipe.unet.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        self.own = [self.outputs([t.format(label) for label in self.labels]) for t in TEMPLATES]
        ends = torch.nn.functional.normalize(encode(self.pipe, self.labels)[:, -1].detach(), dim=1)
        self.similarity = ends @ ends.T
        fixed = fixed_aliases()
        self.aliases = self._aliases(fixed if fixed.keys() == set(self.labels) else aliases(concepts, DEFAULT_CACHE))

    @torch.inference_mode()
    def outputs(self, prompts: Sequence[str]) -> Tensor:
        """U-Net outputs [prompts, timesteps * elements] on the common noise."""
        rows = []
        for start in range(0, len(prompts), 64):
            states = encode(self.pipe, list(prompts[start : start + 64]))
            noise = self.noise.expand(len(states), -1, -1, -1)
            drawn = [self.pipe.unet(noise, t, encoder_hidden_states=states).sample.flatten(1) for t in TIMESTEPS]
            rows.append(torch.cat(drawn, 1))
        return torch.cat(rows)

    def nearest(self, prompts: Sequence[str], template: int) -> list[str]:
        """The concept that each prompt counts as drawing."""
        places = torch.cdist(self.outputs(prompts), self.own[template]).argmin(1)
        return [self.labels[place] for place in places.tolist()]

    def _aliases(self, known: dict[str, Any]) -> dict[str, list[str]]:
        """Development concepts with at least two aliases that count as them before any edit; four at most."""
        found = {}
        for label in (label for label in self.labels if split_of(label) == "development"):
            names = [alias.text for alias in known[label] if split_of(alias.text) == "development"][:8]
            drawn = self.nearest([TEMPLATES[0].format(name) for name in names], 0) if names else []
            good = [name for name, seen in zip(names, drawn, strict=True) if seen == label]
            if len(good) >= 2:
                found[label] = good[:4]
        return found

    def neighbours(self, label: str, erased: Sequence[str]) -> list[str]:
        """The four concepts nearest by end state that are not erased."""
        row = self.similarity[self.labels.index(label)]
        ranked = sorted(self.labels, key=lambda other: -float(row[self.labels.index(other)]))
        return [other for other in ranked if other not in erased][:4]


def measure(readings: Readings, erased: Sequence[str], options: dict[str, Any]) -> dict[str, list[bool]]:
    """Kind -> whether each prompt still counts as its concept, after erasing `erased`."""
    changes = dict(options)
    target = changes.pop("target", None)
    result = edit_model(readings.pipe, erased, target=target, config=EditConfig(**changes))
    far = random.Random(11).sample([label for label in readings.labels if label not in erased], 40)
    rows = [("e", label, label) for label in erased] + [("s", label, label) for label in far]
    more = [("g", name, label) for label in erased for name in readings.aliases[label]]
    more += [("n", near, near) for label in erased for near in readings.neighbours(label, erased)]
    found: dict[str, list[bool]] = {kind: [] for kind in "egns"}
    for template, group in ((0, rows + more), (1, rows)):
        drawn = readings.nearest([TEMPLATES[template].format(prompt) for _, prompt, _ in group], template)
        for (kind, _, truth), seen in zip(group, drawn, strict=True):
            found[kind].append(seen == truth)
    result.undo()
    return found


def row(readings: Readings, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: rates over several draws of `count` concepts."""
    start = time.perf_counter()
    total: dict[str, list[bool]] = {kind: [] for kind in "egns"}
    for draw in range(DRAWS.get(count, 1)):
        erased = random.Random(100 * count + draw).sample(list(readings.aliases), count)
        for kind, hits in measure(readings, erased, options).items():
            total[kind] += hits
    rate = {kind: sum(hits) / len(hits) for kind, hits in total.items()}
    h4 = harmonic(1 - rate["e"], 1 - rate["g"], rate["s"], rate["n"])
    counts = {kind: len(hits) for kind, hits in total.items()}
    return {
        "concepts": count,
        "changed": options,
        **rate,
        "h_4": h4,
        "prompts": counts,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Run every variant, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RealEraWarning)
    readings = Readings(options.model)
    head = {
        "command": "python -m benchmarks.defaults " + " ".join(sys.argv[1:]),
        "defaults": EditConfig().to_dict(),
        "development_concepts": len(readings.aliases),
        "threads": torch.get_num_threads(),
        "versions": common.versions(),
    }
    rows = []
    print("| concepts | changed | e | g | n | s | H_4 |\n|---|---|---|---|---|---|---|")
    for count in options.concepts:
        for changed in VARIANTS:
            found = row(readings, count, changed)
            rows.append(found)
            said = ", ".join(f"{k} = {v!r}" for k, v in changed.items()) or "(defaults)"
            print(
                f"| {count} | {said} | " + " | ".join(f"{found[k]:.3f}" for k in ("e", "g", "n", "s", "h_4")) + " |",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(head))


if __name__ == "__main__":
    main()
