"""Does the geometry report name the prompts whose pictures change? Predicted drift against pictures, by rank.

`python -m benchmarks.drift --model DIR --concepts 4` erases one concept at a time and takes other concepts' prompts:
the `TOP` whose state moves most, and more of them spread evenly over the ranks of all the rest. Of each it predicts the
drift without a picture,

- end: |M r - r| / |r| at the end token of the bare name, what the geometry report lists;
- end, layers: the same in the norm of what the layers read (`geometry(weighted=True)`);
- prompt, layers: the same over all positions of the prompt that is drawn;

and measures what the edit changed at the same seeds: the mean difference of pixels, and of the judge's features as a
share of their norm. It prints Spearman's rank correlation of each pair with a bootstrap interval over prompts, over all
of them and over the evenly spread ones alone, and beside it what is left to noise: the rank correlation of the measure
with itself on the other half of the seeds. Each concept is a row of a JSONL file, and is not drawn again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.compare import append_row, key_of, make_editor, nested_sets, read_rows, retained
from benchmarks.pooling import Row
from benchmarks.quality import Bench, Settings, load_pipeline
from benchmarks.reference_model.pictures import DEFAULT_CACHE, write_atomically
from benchmarks.reference_model.sampler import generate
from realera_edit import Concept, RealEraWarning
from realera_edit.attack import factor_of
from realera_edit.evaluation_map import end_states, shifts
from realera_edit.layers import Layers, compare
from realera_edit.metrics import pixel_distances
from realera_edit.pipeline import LoadedPipeline

PROMPT = "an emoji of a {}"
THRESHOLD = 0.95  # of the unedited model's pictures, for a concept to take part
TOP = 24
PREDICTED = ("end", "end, layers", "prompt, layers")
MEASURED = ("pixels", "features")


def predicted(bench: Bench, layers: Layers, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Each prediction of `PREDICTED` for each label: [labels]."""
    encoder = LoadedPipeline(bench.pipe).encoder
    ends = end_states(encoder, labels).double()
    change = factor_of(layers) - torch.eye(ends.shape[1], dtype=torch.float64)
    plain = (ends @ change.T).norm(dim=1) / ends.norm(dim=1)
    whole = []
    for one in encoder.encode([PROMPT.format(label) for label in labels], 2):
        rows = one.states[1:].to("cpu", torch.float64)
        weight = ((rows @ layers.original) * rows).sum(1)
        whole.append(float(((shifts(layers, rows).square() * weight).sum() / weight.sum()).sqrt()))
    found = (plain.numpy(), shifts(layers, ends).numpy(), np.array(whole))
    return dict(zip(PREDICTED, found, strict=True))


def sample(moved: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """Places of the `TOP` most moved, and of `count` - `TOP` others, evenly by rank."""
    order = np.argsort(-moved, kind="stable")
    rest = order[TOP:]
    spread = np.unique(np.linspace(0, len(rest) - 1, count - TOP).round().astype(int))
    return order[:TOP].tolist(), rest[spread].tolist()


def distances(bench: Bench, pipe: Any, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Each measure of `MEASURED` for each prompt and seed: [prompts, seeds]."""
    options = bench.settings
    before = bench.store.get(prompts, options.seeds)
    after = generate(pipe, prompts, options.seeds, options.steps, options.guidance, fast=options.fast)
    shape, flat = after.shape[:2], (-1, *after.shape[2:])
    pixels = pixel_distances(after.reshape(flat), before.reshape(flat)).reshape(shape)
    one, two = (bench.judge.judge(pictures.reshape(flat)).features for pictures in (after, before))
    if one is None or two is None:
        raise SystemExit("this judge gives no features")
    features = np.linalg.norm(one - two, axis=1) / np.linalg.norm(two, axis=1).mean()
    return {"pixels": pixels, "features": features.reshape(shape)}


def measured(bench: Bench, pipe: Any, concept: str, split: Any, count: int) -> Row:
    """The prompts of one edit with what was predicted and measured of each. `pipe` is left edited."""
    make_editor("ours", 1)(pipe, [Concept(concept)], retained(bench, split, [concept]))
    layers = compare(LoadedPipeline(bench.pipe), LoadedPipeline(pipe))
    others = [label for label in bench.qualified(split) if label != concept]
    moved = predicted(bench, layers, others)
    top, spread = sample(moved["end"], count)
    found = distances(bench, pipe, [PROMPT.format(others[i]) for i in (*top, *spread)])
    prompts = [
        {
            "name": others[i],
            "top": i in top,
            "predicted": {name: float(values[i]) for name, values in moved.items()},
            "measured": {name: values[row].tolist() for name, values in found.items()},
        }
        for row, i in enumerate((*top, *spread))
    ]
    return {"prompts": prompts}


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rho with its 95 % percentile interval over resampled pairs (`scipy.stats.bootstrap`)."""
    from scipy import stats

    def rho(a: np.ndarray, b: np.ndarray) -> float:
        return float(stats.spearmanr(a, b).statistic)

    interval = stats.bootstrap(
        (x, y), rho, paired=True, vectorized=False, n_resamples=999, method="percentile", random_state=0
    ).confidence_interval
    return rho(x, y), float(interval.low), float(interval.high)


def correlations(row: Row) -> Row:
    """Measure -> prediction, and "itself", -> rho with its interval, over all prompts and the evenly spread ones."""
    found: Row = {}
    for name in MEASURED:
        values = np.array([prompt["measured"][name] for prompt in row["prompts"]])
        half = values.shape[1] // 2
        parts = {"itself": (values[:, :half].mean(1), values[:, half:].mean(1))} if half else {}
        for prediction in PREDICTED:
            moved = np.array([prompt["predicted"][prediction] for prompt in row["prompts"]])
            parts[prediction] = (moved, values.mean(1))
        spread = np.array([not prompt["top"] for prompt in row["prompts"]])
        found[name] = {
            key: {"all": spearman(x, y), "spread": spearman(x[spread], y[spread])} for key, (x, y) in parts.items()
        }
    return found


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line for each concept and measure."""
    head = ["erased", "prompts", "measured", *PREDICTED, "itself", "evenly spread: end", "itself"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def cell(part: Row | None, which: str) -> str:
        return "-" if part is None else "{:.2f} [{:.2f}, {:.2f}]".format(*part[which])

    for row in rows:
        for name, found in row["rho"].items():
            cells = [row["concept"], str(len(row["prompts"])), name]
            cells += [cell(found.get(key), "all") for key in (*PREDICTED, "itself")]
            cells += [cell(found.get(key), "spread") for key in ("end", "itself")]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    add("--concepts", type=int, default=4)
    add("--prompts", type=int, default=72, help=f"of each concept, the {TOP} most moved included")
    add("--split", choices=("development", "report"), default="development")
    add("--judge", choices=("development", "report"), default="development")
    add("--results", type=Path, default=Path("benchmarks/results/drift.jsonl"), help="rows; a run goes on from them")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--steps", type=int, default=Settings.steps, help="of the sampler")
    add("--seeds", type=int, default=4, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="of the choice of concepts")
    add("--fast", action="store_true", help="draw with the U-Net in bfloat16")
    add("--threads", type=int, default=2)
    add("--table", action="store_true", help="only print what the results file holds")
    add("--json", type=Path, help="also write the correlations there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> None:
    """Measure and print. `bench` may be one that is loaded already."""
    options = parse(arguments)
    command = "python -m benchmarks.drift " + " ".join(sys.argv[1:] if arguments is None else arguments)
    known = read_rows(options.results)
    rows = list(known.values())
    if not options.table:
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore", RealEraWarning)
        if bench is None:
            seeds = tuple(range(options.seeds))
            choice = tuple(100 + seed for seed in range(min(options.seeds, 2)))
            settings = Settings(
                steps=options.steps, fast=options.fast, seeds=seeds, choice_seeds=choice, threshold=THRESHOLD
            )
            bench = Bench(options.model, options.cache, options.judge, settings)
        rows = []
        labels = nested_sets(bench, options.split, [options.concepts], 0, options.seed)[options.concepts]
        for label in labels:
            about = {"concept": label, "split": options.split, "judge": options.judge, "count": options.prompts}
            key = key_of(bench, about)
            if key not in known:
                row = measured(bench, load_pipeline(options.model), label, options.split, options.prompts)
                record = {"versions": common.versions(), "machine": common.machine(), "command": command}
                stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                known[key] = {**about, "key": key, **row, **record, **stamp}
                append_row(options.results, known[key])
            rows.append(known[key])
            print(f"{label}: done", file=sys.stderr, flush=True)
    rows = [{**row, "rho": correlations(row)} for row in rows]
    if options.json:
        figures = [{"concept": row["concept"], "prompts": len(row["prompts"]), "rho": row["rho"]} for row in rows]
        content = json.dumps({"rows": figures, "command": command}, indent=1)
        write_atomically(options.json, content.encode() + b"\n")
    print(table(rows))


if __name__ == "__main__":
    main()
