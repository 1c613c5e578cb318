"""How far may a word move before it is drawn as something else? Drift in text space against U-Net readings.

`python -m benchmarks.damage --model DIR` erases one random concept at a time and compares, for every other concept of
the model, |M r - r| / |r| at its end token with its readings (`benchmarks.defaults`: is its prompt's U-Net output still
nearest to its own?). It prints, for bands of drift, how many concepts lost a reading in either of two prompts: what
`realera_edit.geometry.DAMAGING` was taken from.
"""

from __future__ import annotations

import argparse
import random
import sys
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.defaults import TEMPLATES, Readings
from realera_edit import EditConfig, edit_model
from realera_edit.solve import drift

BANDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 2.0)


def measured(readings: Readings, concept: str, strength: float) -> list[tuple[float, bool]]:
    """(drift, still itself in both prompts) of every other concept."""
    result = edit_model(readings.pipe, [concept], config=EditConfig(strength=strength, overshoot=0))
    try:
        others = [label for label in readings.labels if label != concept]
        encoded = result.source.encoder.encode(others)
        ends = torch.stack([e.states[len(e.ids) - 1] for e in encoded])
        kept = [readings.nearest([t.format(o) for o in others], i) for i, t in enumerate(TEMPLATES)]
        itself = [all(read[place] == other for read in kept) for place, other in enumerate(others)]
        return list(zip(drift(result.edit.cross.factor, ends).tolist(), itself, strict=True))
    finally:
        result.undo()


def main() -> int:
    """Print one line for each band of drift."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.8, 0.95])
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    readings = Readings(args.model)
    rng = random.Random(args.seed)
    pairs = []
    for concept in rng.sample(readings.labels, args.draws):
        for strength in args.strengths:
            pairs += measured(readings, concept, strength)
    for low, high in pairwise(BANDS):
        band = [itself for moved, itself in pairs if low <= moved < high]
        print(f"drift {low:.1f} to {high:.1f}: {sum(not itself for itself in band)} of {len(band)} lost a reading")
    return 0


if __name__ == "__main__":
    sys.exit(main())
