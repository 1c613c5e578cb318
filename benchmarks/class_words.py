"""What holding the last word of a name does for others of its class, on development concepts, without a picture.

`python -m benchmarks.class_words --model emoji` erases concepts of several words, one at a time or in sets, with
`hold_class` on and off. A prompt counts as drawing the concept whose U-Net output is nearest, as in
`benchmarks.defaults`: e, g, n, s as there, and t: other concepts with the same last word.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.defaults import TEMPLATES, Readings
from benchmarks.reference_model.splits import split_of
from realera_edit import EditConfig, RealEraWarning, edit_model
from realera_edit.hub import resolve

VARIANTS: tuple[dict[str, Any], ...] = ({}, {"hold_class": False}, {"hold_class": False, "strength": 0.7})
KINDS = "egnts"


def measure(readings: Readings, erased: Sequence[str], options: dict[str, Any]) -> dict[str, list[bool]]:
    """Kind -> whether each prompt still counts as its concept, after erasing `erased`."""
    others = [label for label in readings.labels if label not in erased]
    rows = [("e", label, label) for label in erased]
    rows += [("g", name, label) for label in erased for name in readings.aliases.get(label, ())]
    rows += [("n", near, near) for label in erased for near in readings.neighbours(label, erased)]
    last = {label.split()[-1] for label in erased}
    rows += [("t", other, other) for other in others if other.split()[-1] in last and " " in other]
    rows += [("s", far, far) for far in random.Random(11).sample(others, 10)]
    result = edit_model(readings.pipe, erased, config=EditConfig(**options))
    drawn = readings.nearest([TEMPLATES[0].format(prompt) for _, prompt, _ in rows], 0)
    result.undo()
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for (kind, _, truth), seen in zip(rows, drawn, strict=True):
        found[kind].append(seen == truth)
    return found


def main() -> None:
    """Run every variant, print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    parser.add_argument("--sets", type=int, default=30, help="how many sets of concepts")
    parser.add_argument("--size", type=int, default=1, help="concepts in each set")
    parser.add_argument("--any", action="store_true", help="names of one word, too")
    parser.add_argument("--defaults", action="store_true", help="the defaults alone")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    readings = Readings(Path(resolve(options.model)))
    labels = [label for label in readings.labels if split_of(label) == "development"]
    pool = [label for label in labels if options.any or " " in label]
    sets = [random.Random(seed).sample(pool, options.size) for seed in range(options.sets)]
    rows = []
    print(f"| changed | {' | '.join(KINDS)} |\n|{'---|' * (1 + len(KINDS))}")
    for changed in VARIANTS[: 1 if options.defaults else None]:
        total: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for erased in sets:
            for kind, hits in measure(readings, erased, changed).items():
                total[kind] += hits
        rates = {kind: sum(hits) / len(hits) if hits else None for kind, hits in total.items()}
        rows.append({"changed": changed, **rates, "prompts": {kind: len(hits) for kind, hits in total.items()}})
        said = ", ".join(f"{k} = {v!r}" for k, v in changed.items()) or "(defaults)"
        shown = ["-" if rate is None else f"{rate:.3f} of {len(total[kind])}" for kind, rate in rates.items()]
        print(f"| {said} | {' | '.join(shown)} |", flush=True)
    record = {"command": "python -m benchmarks.class_words " + " ".join(sys.argv[1:]), "sets": sets, "rows": rows}
    print(json.dumps({**record, "machine": common.machine(), "versions": common.versions()}))


if __name__ == "__main__":
    main()
