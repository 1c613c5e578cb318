"""Residue: words that never name an erased concept and drew it, before and after an edit.

`python -m benchmarks.residue --model emoji --editors ours uce mace --concepts 10 --draws 8` takes the sets of
`benchmarks.compare` and asks the unedited denoiser which words of the whole vocabulary it draws like each concept
(`realera_edit.probe`). Those that it draws by the judge as well, on seeds of their own, are drawn again with each
edited model. "far": words not among the nearest to the concept by text state. No editor is told of any word.
Each row is appended to a JSONL file as soon as it is there, and a row that is there already is not drawn again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.compare import append_row, key_of, make_editor, nested_sets, read_rows, retained
from benchmarks.peers import vocabulary_prior
from benchmarks.pooling import Row, label, shown, total
from benchmarks.quality import PLAIN, Bench, Settings, generate, load_pipeline
from benchmarks.reference_model.pictures import DEFAULT_CACHE
from realera_edit import Concept, RealEraWarning
from realera_edit.evaluation_plan import names_it, same
from realera_edit.pipeline import LoadedPipeline
from realera_edit.probe import ALIKE, VOCABULARY, Probe
from realera_edit.vocabulary import load_ends, similarity, whole_words

NEAREST = 16
KINDS = ("all", "far", "unedited", "unedited far")


@dataclass(frozen=True)
class Words:
    """The vocabulary as the unedited model draws it: `alike` [concepts, words], cosines of the denoiser's answers, and
    `rank` [concepts, words], the place of a word among all by its text state's distance from the concept.
    """

    labels: list[str]
    words: list[str]
    alike: Tensor
    rank: Tensor

    @classmethod
    def of(cls, bench: Bench) -> Words:
        """Every word is asked about once."""
        encoder = LoadedPipeline(bench.pipe).encoder
        words = whole_words(encoder.pairs[0][0], VOCABULARY)
        ends = load_ends(encoder, words, encoder.fingerprint())
        own = encoder.encode(bench.labels)
        near = similarity(torch.stack([e.states[len(e.ids) - 1] for e in own]), ends, ends.mean(0))
        answers = Probe.of(bench.pipe).answers(encoder, [*bench.labels, *words])
        one, two = answers[: len(bench.labels)], answers[len(bench.labels) :]
        return cls(bench.labels, words, one @ two.T, near.argsort(1, descending=True).argsort(1))

    def of_concept(self, bench: Bench, name: str, most: int) -> list[tuple[str, bool]]:
        """(word, whether it is far) of words that draw the concept by denoiser and judge, the furthest first."""
        alike, rank = (matrix[self.labels.index(name)] for matrix in (self.alike, self.rank))
        places = [int(i) for i in (-rank).argsort() if alike[i] >= ALIKE]
        taken = {same(other) for other in self.labels}
        good = [i for i in places if same(self.words[i]) not in taken]
        good = [i for i in good if not names_it(self.words[i], (name, *name.split()))]
        rates = bench.accuracy([(name, self.words[i]) for i in good])
        found = [i for i, rate in zip(good, rates, strict=True) if rate >= bench.settings.alias_threshold]
        return [(self.words[i], bool(rank[i] >= NEAREST)) for i in found[:most]]


def measured(pipe: Any, bench: Bench, found: Sequence[tuple[str, str, bool]]) -> Row:
    """Rates of pictures by both models that show the concept. `found`: (concept, word, whether it is far)."""
    if not found:
        return {kind: {"hits": 0, "count": 0} for kind in KINDS}
    prompts = [template.format(word) for _, word, _ in found for template in PLAIN]
    truth = torch.tensor([bench.judge.index[name] for name, _, _ in found]).repeat_interleave(len(PLAIN))[:, None]
    far = torch.tensor([far for _, _, far in found]).repeat_interleave(len(PLAIN))
    options = bench.settings
    after = generate(pipe, prompts, options.seeds, options.steps, options.guidance, fast=options.fast)
    rates = {}
    for side, pictures in (("", after), ("unedited", bench.store.get(prompts, options.seeds))):
        right = bench.judged(pictures)[0] == truth
        for kind, rows in (("all", right), ("far", right[far])):
            name = f"{side} {kind}".strip().replace("unedited all", "unedited")
            rates[name] = {"hits": int(rows.sum()), "count": rows.numel()}
    return rates


def rows_of(bench: Bench, pipe: Any, options: argparse.Namespace, record: Row) -> Iterator[Row]:
    """Every row, from the results file or measured now. `pipe`: a second copy of the model."""
    known = read_rows(options.results)
    originals = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    vocabulary_prior(pipe, [])
    words = Words.of(bench)
    for draw in range(options.draws):
        [erased] = nested_sets(bench, options.split, [options.concepts], draw, options.seed).values()
        kept = retained(bench, options.split, erased)
        found = [(name, *pair) for name in erased for pair in words.of_concept(bench, name, options.most)]
        for written in options.editors:
            editor = make_editor(written, options.concepts)
            about = {"editor": written, "settings": editor.described(), "split": options.split, "judge": options.judge}
            about |= {"draw": draw, "concepts": options.concepts, "erased": erased, "retain": kept, "words": found}
            key = key_of(bench, about)
            if key not in known:
                editor(pipe, [Concept(name) for name in erased], kept)
                known[key] = {"key": key, **about, **measured(pipe, bench, found), **record}
                known[key]["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                with torch.no_grad():
                    for name, weight in pipe.unet.named_parameters():
                        weight.copy_(originals[name])
                append_row(options.results, known[key])
            yield known[key]


def table(rows: Sequence[Row]) -> str:
    """Pooled over the draws, in Markdown: the share of words that still draw their concept, with Wilson's interval."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["concepts"], label(row)), []).append(row)
    lines = ["| concepts | editor | sets | words left (low) | far words left (low) |", "|---|---|---|---|---|"]
    told = set()
    for (count, name), group in groups.items():
        sides = [("unedited", ("unedited", "unedited far"))] if count not in told else []
        told.add(count)
        for said, kinds in [*sides, (name, ("all", "far"))]:
            rates = [total([row[kind] for row in group]) for kind in kinds]
            cells = [f"{shown(rate)} of {rate.count}" for rate in rates]
            lines.append(f"| {count} | {said} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    add("--editors", nargs="+", default=["ours", "uce", "mace"], help="as for benchmarks.compare")
    add("--concepts", type=int, default=10, help="size of the sets")
    add("--draws", type=int, default=8, help="of sets")
    add("--most", type=int, default=8, help="words of a concept")
    add("--split", choices=("development", "report"), default="development", help="of the concepts")
    add("--judge", choices=("development", "report"), default="development")
    add("--results", type=Path, default=Path("benchmarks/results/residue.jsonl"), help="rows; a run goes on from them")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--seeds", type=int, default=1, help="pictures of each prompt")
    add("--steps", type=int, default=Settings.steps, help="of the sampler")
    add("--fast", action="store_true", help="draw with the U-Net in bfloat16")
    add("--seed", type=int, default=0, help="of the sets")
    add("--threads", type=int, default=2)
    add("--table", action="store_true", help="only print what the results file holds")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> None:
    """Measure and print. `bench` may be one that is loaded already."""
    options = parse(arguments)
    if options.table:
        print(table(list(read_rows(options.results).values())))
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    if bench is None:
        seeds = tuple(range(options.seeds))
        settings = Settings(
            steps=options.steps, fast=options.fast, seeds=seeds, choice_seeds=tuple(100 + s for s in seeds)
        )
        bench = Bench(options.model, options.cache, options.judge, settings)
    record = {"versions": common.versions(), "machine": common.machine(), "threads": options.threads}
    record |= {"seed": options.seed, "command": "python -m benchmarks.residue " + " ".join(sys.argv[1:])}
    rows = []
    for row in rows_of(bench, load_pipeline(options.model), options, record):
        rows.append(row)
        print(f"draw {row['draw']}, {row['editor']}: {row['all']}", file=sys.stderr, flush=True)
    print(table(rows))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
