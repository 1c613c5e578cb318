"""What `--robust N` buys and costs in text space: closed-form attacks against drift, by rounds.

`python -m benchmarks.robust --model ../shared/models/emoji-sd --concepts "cat face" pizza --preserve "dog face" guitar`
erases one concept at a time and prints a row for each number of rounds; all norms are those of the layers. Success:
`realera_edit.attack.Scored`, on every position of the bare name. Drawn pictures are not looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from typing import Any

import torch

from benchmarks import common
from realera_edit import EditConfig, RealEraWarning, edit_model
from realera_edit.attack import attack
from realera_edit.layers import Layers, metric
from realera_edit.robust import BUDGET


def measured(model: str, concept: str, preserve: list[str], rounds: int) -> dict[str, Any]:
    """One row: the edit, its attacks within `BUDGET`, and the drift of words and preserved entries."""
    start = time.perf_counter()
    result = edit_model(model, [concept], preserve=preserve, config=EditConfig(robust=rounds))
    solved = result.edit.seconds["solve"]
    q, factor = metric(result.source), result.edit.cross.factor
    layers = Layers.of_factor(torch.eye(factor.width, dtype=torch.float64) + factor.delta(), q)
    (encoded,) = result.source.encoder.encode([concept], result.config.padding)
    prior = result.edit.prior
    if prior is None:
        raise SystemExit("the vocabulary prior is off; it is the bank of the word search")
    found = attack(
        layers,
        concept,
        encoded.states[1:],
        budgets=(BUDGET,),
        words=prior.words,
        bank=prior.last,
        end=len(encoded.ids) - 2,
        top=1,
    )
    begun = time.perf_counter()
    geometry = result.geometry(weighted=True)
    reported = time.perf_counter() - begun
    within = {a.kind: a.scored for a in found.attacks if a.budget == BUDGET}
    word = found.words[0]
    return {
        "concept": concept,
        "rounds": rounds,
        "embedding": within["embedding"].success,
        "embedding_distance": within["embedding"].distance,
        "inverse": within["inverse"].success,
        "word": word.word,
        "word_success": word.scored.success,
        "word_distance": word.scored.distance,
        "median_word": geometry.typical,
        "preserved": {entry.name: entry.moved for entry in geometry.preserved},
        "seconds": {"all": time.perf_counter() - start, "solve": solved, "geometry": reported},
    }


def main() -> int:
    """Print the table as Markdown, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concepts", nargs="+", required=True)
    parser.add_argument("--preserve", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 1, 2, 4])
    options = parser.parse_args()
    warnings.simplefilter("ignore", RealEraWarning)
    names = ["erased", "rounds", "embedding", "inverse", "nearest word", "median word moved", *options.preserve]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    rows = []
    for concept in options.concepts:
        for rounds in options.rounds:
            row = measured(options.model, concept, options.preserve, rounds)
            rows.append(row)
            kept = " | ".join(f"{row['preserved'][name]:.3f}" for name in options.preserve)
            print(
                f"| {concept} | {rounds} | {row['embedding']:.2f} | {row['inverse']:.2f} | {row['word']} "
                f"{row['word_success']:.2f} | {row['median_word']:.3f} | {kept} |",
                flush=True,
            )
    record = {
        "command": "python -m benchmarks.robust " + " ".join(sys.argv[1:]),
        "machine": common.machine(),
        "versions": common.versions(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
