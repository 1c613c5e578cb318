"""Our edit and its peers on the same concepts, pictures and judge, in one table.

`python -m benchmarks.compare --model DIR --editors ours uce rece mace speed realera --concepts 1 10 --draws 5` draws
nested sets of concepts, edits the model with each editor and measures it with `benchmarks.quality`. A peer's name alone
stands for its published settings, with "+" it is given our contexts, positions, prior and target; settings may follow
as JSON, `'ours{"strength": 0.7}'`. All editors are told
the same half of the remaining concepts to retain; acc_s and acc_n_unseen are taken on the other half.
Each row is appended to a JSONL file as soon as it is there, and a row that is there already is not drawn again.

The seconds are of the edit with a loaded model, text encoding included; the words' second moments come from the disk
cache. Peers are our own implementations, which solve once for all layers: their authors' programs are slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.peers import PEERS, Options, given, vocabulary_prior
from benchmarks.pooling import Row, by_metric, curves, summary, table, tidy
from benchmarks.quality import Bench, Quality, Settings, load_pipeline, measure
from benchmarks.reference_model.pictures import DEFAULT_CACHE, write_atomically
from benchmarks.reference_model.splits import Split, split_of
from realera_edit import Concept, EditConfig, RealEraError, RealEraWarning, edit_model
from realera_edit.pipeline import LoadedPipeline

EDITORS = ("ours", *(name + suffix for name in PEERS for suffix in ("", "+")))
# No run erases concepts of both splits, so an alias of the other split has not been seen either.
ALL_ALIASES: dict[str, Any] = {"split_aliases": False, "candidates": 20, "aliases": 8}


@dataclasses.dataclass(frozen=True)
class Editor:
    """A name of `EDITORS` with all that decides its edit; `prior`: it is given the words' second moments."""

    name: str
    settings: EditConfig | Options
    prior: bool = False

    def __call__(self, pipe: Any, concepts: Sequence[Concept], retain: Sequence[str]) -> None:
        """Edit the pipeline in place."""
        if isinstance(self.settings, EditConfig):
            edit_model(pipe, concepts, preserve=retain, config=self.settings)
            return
        options = self.settings
        if self.prior:
            names = [name for concept in concepts for name in concept.names]
            options = dataclasses.replace(options, prior=vocabulary_prior(pipe, names))
        PEERS[self.name.removesuffix("+")].edit(pipe, concepts, retain, options)

    def described(self) -> Row:
        """The settings as plain JSON types."""
        return {k: v for k, v in tidy(dataclasses.asdict(self.settings)).items() if k != "prior"}


def make_editor(written: str, count: int) -> Editor:
    """An editor for `count` concepts, from its name and the settings that follow it. Raises `ValueError`."""
    name, brace, settings = written.partition("{")
    try:
        changes = json.loads(brace + settings) if brace else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"editor {written!r}: after the name comes a JSON object ({error})") from None
    changed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    if name not in EDITORS:
        raise ValueError(f"editor {name!r}: expected one of {', '.join(EDITORS)}")
    try:
        if name == "ours":
            return Editor(name, EditConfig(**changed))
        peer, plus = PEERS[name.removesuffix("+")], name.endswith("+")
        options = peer.published(count)
        options = given(options) if plus else options
        return Editor(name, dataclasses.replace(options, **changed), plus or peer.needs_prior)
    except TypeError as error:
        raise ValueError(f"editor {name!r} has no such setting: {error}") from None


def nested_sets(bench: Bench, split: Split, counts: Sequence[int], draw: int, seed: int) -> dict[int, list[str]]:
    """Concepts that the model draws, in one random order; a set is the beginning of the next.

    Those that it draws by an alias, too, come first: H_4 is taken over them. Others fill up large sets.
    """
    labels = sorted(bench.qualified(split))
    order = random.Random(f"{seed} {draw}").sample(labels, len(labels))
    if len(order) < max(counts):
        raise ValueError(f"only {len(order)} {split} concepts take part, {max(counts)} were asked for")
    named = itertools.islice((label for label in order if bench.drawn_aliases(label)), max(counts))
    chosen = list(named)
    chosen += [label for label in order if label not in chosen]
    return {count: chosen[:count] for count in counts}


def retained(bench: Bench, split: Split, erased: Sequence[str]) -> list[str]:
    """A fixed half of the concepts that stay."""
    return [o for o in bench.qualified(split) if o not in erased and split_of(o + "#retain") == split]


def read_rows(path: Path) -> dict[str, Row]:
    """Key -> row of a results file. What an interruption left of a line is cut off."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        os.truncate(path, end)
    rows = [json.loads(line) for line in whole[:end].decode("utf-8").splitlines() if line]
    return {row["key"]: row for row in rows}


def append_row(path: Path, row: Row) -> None:
    """Write a row to the disk before the next one is begun, at once: another process may be adding rows of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        os.fsync(file.fileno())


def key_of(bench: Bench, about: Row) -> str:
    """What decides a row's figures, in a hash: model, judge, drawing, editor, settings and concepts."""
    network = getattr(bench.judge, "network", None)
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()) if network is not None else ():
        digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
    drawing = [bench.store.key, digest.hexdigest(), dataclasses.asdict(bench.settings)]
    return hashlib.sha256(json.dumps([drawing, about], sort_keys=True).encode()).hexdigest()[:24]


def figures(quality: Quality) -> Row:
    """What a row keeps of a measurement: hits and counts, so that rows can be pooled."""
    found = dataclasses.asdict(quality)
    chosen = found.pop("chosen")
    return tidy({**found, "aliases": chosen["aliases"], "far": chosen["far"], "far_kind": chosen["far_kind"]})


def rows_of(bench: Bench, pipe: Any, options: argparse.Namespace, record: Row) -> Iterator[Row]:
    """Every row of a comparison, from the results file or measured now. `pipe`: a second copy of the model."""
    names = {p.name for p in LoadedPipeline(pipe).projections}
    originals = {n: p.data.clone() for n, p in pipe.unet.named_parameters() if n in names}
    known = read_rows(options.results)
    vocabulary_prior(pipe, [])  # into the disk cache, before anything is timed
    draws = options.draws if len(options.draws) > 1 else options.draws * len(options.concepts)
    for draw in range(max(draws)):
        counts = [count for count, most in zip(options.concepts, draws, strict=True) if draw < most]
        for count, erased in nested_sets(bench, options.split, counts, draw, options.seed).items():
            kept = retained(bench, options.split, erased)
            for name in options.editors:
                editor = make_editor(name, count)
                about = {"editor": name, "settings": editor.described(), "target": options.target}
                about |= {"split": options.split, "judge": options.judge, "draw": draw, "concepts": count}
                about |= {"erased": erased, "retain": kept}
                told = kept
                if options.tell_all:
                    told = [label for label in bench.qualified(options.split) if label not in erased]
                    about["told"] = "all"
                key = key_of(bench, about)
                if key not in known:
                    concepts = [Concept(label, options.target) for label in erased]
                    row = {"key": key, **about, **measured(bench, pipe, editor, concepts, kept, told, options.split)}
                    with torch.no_grad():
                        for n, p in pipe.unet.named_parameters():
                            if n in originals:
                                p.data.copy_(originals[n])
                    known[key] = {**row, **record, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                    append_row(options.results, known[key])
                yield known[key]


def measured(
    bench: Bench,
    pipe: Any,
    editor: Editor,
    concepts: Sequence[Concept],
    kept: Sequence[str],
    told: Sequence[str],
    split: Split,
) -> Row:
    """Seconds of the edit and the figures of the edited model; an edit that fails leaves its message instead.

    `kept`: concepts that the figures count as retained; `told`: those that the edit is told to retain.
    """
    try:
        seconds, _ = common.timed(lambda: editor(pipe, concepts, told), pipe.device.type)
    except RealEraError as error:
        return {"error": str(error)}
    quality = measure(pipe, [concept.name for concept in concepts], bench, split, kept)
    return {"edit_seconds": seconds, **figures(quality)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    add("--editors", nargs="+", default=["ours", "uce", "rece", "mace", "speed", "realera"], help=", ".join(EDITORS))
    add("--concepts", type=int, nargs="+", default=[1, 10], help="sizes of the nested sets")
    add("--draws", type=int, nargs="+", default=[5], help="of sets; one number, or one for each size")
    add("--split", choices=("development", "report"), default="development", help="of the concepts")
    add("--judge", choices=("development", "report"), default="development")
    add("--target", help="what every concept becomes  [default: each editor's own]")
    add("--results", type=Path, default=Path("benchmarks/results/compare.jsonl"), help="rows; a run goes on from them")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--seeds", type=int, default=4, help="pictures of each prompt")
    add("--steps", type=int, default=Settings.steps, help="of the sampler")
    add("--fast", action="store_true", help="draw with the U-Net in bfloat16")
    add("--far", type=int, default=Settings.far, help="far concepts")
    add("--all-aliases", action="store_true", help="up to eight of a concept, of either split")
    add("--tell-all", action="store_true", help="tell the editors of every concept that stays: no edit can know more")
    add("--seed", type=int, default=0, help="of the sets")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="where the models are")
    add("--json", action="store_true", help="one JSON object in place of the table")
    add("--table", action="store_true", help="only print and write what the results file holds")
    add("--curves", type=Path, help="also draw H_4 over the number of concepts there, as SVG")
    add("--summary", type=Path, help="also write the figures there, by metric, editor and number of concepts")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """What is drawn."""
    return Settings(
        steps=options.steps,
        fast=options.fast,
        seeds=tuple(range(options.seeds)),
        choice_seeds=tuple(range(100, 100 + options.seeds)),
        far=options.far,
        **(ALL_ALIASES if options.all_aliases else {}),
    )


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> None:
    """Compare and print. `bench` may be one that is loaded already."""
    options = parse(arguments)
    if options.table:
        show(list(read_rows(options.results).values()), options, {"results": str(options.results)})
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    if bench is None:
        bench = Bench(options.model, options.cache, options.judge, settings_of(options), options.device)
    pipe = load_pipeline(options.model, options.device)
    record = {"versions": common.versions(), "machine": common.machine(), "device": str(pipe.device)}
    if pipe.device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(pipe.device)
    record |= {"threads": options.threads, "seed": options.seed}
    record["command"] = "python -m benchmarks.compare " + " ".join(sys.argv[1:] if arguments is None else arguments)
    rows = []
    for row in rows_of(bench, pipe, options, record):
        rows.append(row)
        shown = f"{row['concepts']} concepts, draw {row['draw']}, {row['editor']}"
        print(f"{shown}: {row.get('error', 'done')}", file=sys.stderr, flush=True)
    show(rows, options, record)


def show(rows: Sequence[Row], options: argparse.Namespace, record: Row) -> None:
    """Print the pooled rows, and write what was asked for."""
    lines = summary(rows)
    if options.summary:
        made = {k: rows[0][k] for k in ("split", "judge", "versions", "machine", "threads", "seed")}
        made["commands"] = list(dict.fromkeys(row["command"] for row in rows))
        content = json.dumps({**by_metric(lines), **record, **made}, indent=1, allow_nan=False)
        write_atomically(options.summary, content.encode() + b"\n")
    if options.curves:
        write_atomically(options.curves, curves(lines).encode() + b"\n")
    print(json.dumps({**record, "rows": lines}) if options.json else table(lines))


if __name__ == "__main__":
    main()
