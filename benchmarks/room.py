"""How much room a text space has: what an edit of many concepts moves of those that nobody named, without a picture.

`python -m benchmarks.room --model emoji` erases random development concepts, half of the others preserved, as in
`benchmarks.compare`. A concept's own part is what its state has beside the mean of all of them, in "an emoji of a {}"
at its last token, the end token and two of padding. `own`: how much of it is left along itself; `aside`: what the edit
adds across it, in its length. The last line of each size preserves every concept that stays: no edit can know more.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.quality import load_pipeline
from benchmarks.reference_model.pictures import read_concepts
from benchmarks.reference_model.splits import split_of
from realera_edit import Concept, EditConfig, RealEraWarning
from realera_edit.compute import compute_edit
from realera_edit.concepts import resolve_concepts
from realera_edit.embeddings import PromptEncoder
from realera_edit.hub import resolve
from realera_edit.pipeline import LoadedPipeline

TEMPLATE, PADDING = "an emoji of a {}", 2


def own_parts(encoder: PromptEncoder, names: Sequence[str]) -> Tensor:
    """States less their mean over the names, float64 [names, 4 positions, d]."""
    encoded = encoder.encode([TEMPLATE.format(name.lower()) for name in names], PADDING)
    states = torch.stack([e.states[len(e.ids) - 2 : len(e.ids) + PADDING] for e in encoded]).double()
    return states - states.mean(0)


def left(parts: Tensor, delta: Tensor) -> tuple[float, float]:
    """(own, aside) of parts [n, 4, d], which M = I + delta maps, averaged over all."""
    moved, size = parts @ delta.T, parts.square().sum(-1)
    along = (moved * parts).sum(-1) / size
    aside = (moved.square().sum(-1) / size - along.square()).clamp_min(0).sqrt()
    return float(1 + along.mean()), float(aside.mean())


def directions(parts: Tensor, share: float = 0.9) -> int:
    """Principal directions that hold a share of the variance of all parts."""
    rows = parts.flatten(0, 1)
    values = torch.linalg.eigvalsh(rows.T @ rows).flip(0)
    return int((values.cumsum(0) < share * values.sum()).sum()) + 1


def main() -> None:
    """Edit, measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="checkpoint folder with concepts.json, or emoji")
    parser.add_argument("--concepts", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    folder = resolve(options.model)
    encoder = LoadedPipeline(load_pipeline(options.model)).encoder
    names = [c.label for c in read_concepts(folder / "concepts.json") if split_of(c.label) == "development"]
    parts = dict(zip(names, own_parts(encoder, names), strict=True))
    every = torch.stack(list(parts.values()))
    rows = []
    for count in options.concepts:
        erased = random.Random(options.seed).sample(names, count)
        rest = [name for name in names if name not in erased]
        half = [name for name in rest if split_of(name + "#retain") == "development"]
        unnamed = [name for name in rest if name not in half]
        for what, kept in (("half", half), ("all", rest)):
            concepts = resolve_concepts([Concept(name) for name in erased], preserve=kept)
            delta = compute_edit(encoder, concepts, EditConfig(), kept).cross.factor.delta()
            found = {"concepts": count, "preserved": what}
            for group, listed in (("erased", erased), ("named", half), ("unnamed", unnamed)):
                found[group] = left(torch.stack([parts[name] for name in listed]), delta)
            rows.append(found)
    print(f"{directions(every)} of {every.shape[-1]} directions hold 90 % of what tells {len(names)} concepts apart\n")
    print(
        "| concepts | preserved | erased: own, aside | half that is preserved | the other half |\n|---|---|---|---|---|"
    )
    for row in rows:
        cells = " | ".join("{:.2f}, {:.2f}".format(*row[group]) for group in ("erased", "named", "unnamed"))
        print(f"| {row['concepts']} | {row['preserved']} | {cells} |")
    record = {"command": "python -m benchmarks.room " + " ".join(sys.argv[1:]), "seed": options.seed, "rows": rows}
    print(json.dumps({**record, "versions": common.versions(), "machine": common.machine()}))


if __name__ == "__main__":
    main()
