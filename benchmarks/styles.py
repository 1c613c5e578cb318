"""A drawing style erased: is it gone from its own prompts, is the drawn thing still right, do other styles stay?

`python -m benchmarks.styles --model emoji --editors ours uce mace speed rece` erases each style of the emoji model by
itself with each editor of `benchmarks.compare`; two of the other styles are named to be retained (`--retain`), two are
not. A thing takes part in a style where the unedited model draws both of them right. Rows are kept as in
`benchmarks.compare`.
`--together N` erases N styles in one edit, in as many such groups as there are styles.
`--beside N` erases N concepts in the same edit, with half of the others retained: a mixture of a style and things.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.compare import Editor, append_row, key_of, make_editor, read_rows, retained
from benchmarks.pooling import Row, shown, tidy, total
from benchmarks.quality import PLAIN, Bench, Rate, Settings, generate, load_pipeline
from benchmarks.reference_model.pictures import DEFAULT_CACHE
from benchmarks.reference_model.splits import split_of
from realera_edit import Concept, EditConfig, RealEraError, RealEraWarning
from realera_edit.config import KINDS
from realera_edit.contexts import CONTEXTS

TEMPLATES = ("a {style} emoji of a {name}", "{name} in {style} style")
METRICS = ("style_left", "object_kept", "retained_styles", "other_styles", "other_objects", "beside_left")
RETAINED = "<retained>"
BESIDE = ""  # the style of prompts that name none: those of the things that are erased beside a style


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, the style that it names and the thing."""

    prompt: str
    style: str
    name: str


def cases_of(styles: Sequence[str], things: dict[str, list[str]]) -> list[Case]:
    """Every prompt of every style with its things."""
    return [Case(t.format(style=s, name=n), s, n) for s in styles for n in things[s] for t in TEMPLATES]


def right(bench: Bench, pictures: Any, cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
    """Which pictures [cases, seeds] show the named thing, and which the named style."""
    concept, style = bench.judged(pictures)
    names = torch.tensor([bench.judge.index[c.name] for c in cases])[:, None]
    styles = torch.tensor([bench.judge.styles.index(c.style) if c.style else -1 for c in cases])[:, None]
    return concept == names, style == styles


def in_order(bench: Bench, split: Any) -> list[str]:
    """The concepts of a split that the unedited model draws, in a fixed order."""
    return sorted(bench.qualified(split), key=lambda label: (split_of(label + "#style"), label[::-1]))


def chosen(bench: Bench, split: Any, most: int) -> dict[str, list[str]]:
    """For each style the first `most` concepts of a split that are drawn right in it."""
    labels = in_order(bench, split)
    found: dict[str, list[str]] = {}
    for style in bench.judge.styles:
        mine = found[style] = []
        for start in range(0, len(labels), 2 * most):  # no more is drawn than it takes
            part = labels[start : start + 2 * most]
            cases = cases_of([style], {style: part})
            drawn = bench.store.get([c.prompt for c in cases], bench.settings.choice_seeds)
            share = torch.stack(right(bench, drawn, cases)).all(0).float().view(len(part), -1).mean(1)
            mine += [n for n, rate in zip(part, share.tolist(), strict=True) if rate >= bench.settings.threshold]
            if len(mine) >= most:
                break
        del mine[most:]
    return found


def rates(
    cases: Sequence[Case], things: Tensor, styles: Tensor, erased: Sequence[str], kept: Sequence[str]
) -> dict[str, Rate]:
    """The figures of one set of pictures."""

    def rate(hits: Tensor, wanted: Sequence[str]) -> Rate:
        part = hits[[c.style in wanted for c in cases]]
        return Rate(int(part.sum()), part.numel())

    others = [style for style in dict.fromkeys(c.style for c in cases) if style not in (*erased, BESIDE)]
    return {
        "style_left": rate(styles, erased),
        "object_kept": rate(things, erased),
        "retained_styles": rate(styles, kept),
        "other_styles": rate(styles, [style for style in others if style not in kept]),
        "other_objects": rate(things, others),
        "beside_left": rate(things, [BESIDE]),
    }


def for_styles(editor: Editor, kind: str) -> Editor:
    """The editor told of what kind its concept is, where it can be told: ours and "+" by their contexts."""
    settings = editor.settings
    if isinstance(settings, EditConfig):
        return dataclasses.replace(editor, settings=dataclasses.replace(settings, kind=kind))
    if editor.name.endswith("+"):
        return dataclasses.replace(editor, settings=dataclasses.replace(settings, contexts=CONTEXTS[kind]))
    return editor


def rows_of(bench: Bench, pipe: Any, options: argparse.Namespace, record: Row) -> Iterator[Row]:
    """Every row, from the results file or measured now. `pipe`: a second copy of the model."""
    known, drawing = read_rows(options.results), bench.settings
    originals = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    styles = list(bench.judge.styles)
    if options.together + options.retain > len(styles):
        raise ValueError(f"{options.together} styles erased and {options.retain} retained: there are {len(styles)}")
    things = chosen(bench, options.split, options.things)
    drawn = {name for names in things.values() for name in names}
    beside = [name for name in reversed(in_order(bench, options.split)) if name not in drawn][: options.beside]
    staying = retained(bench, options.split, beside) if beside else []
    cases = cases_of(styles, things) + [Case(t.format(name), BESIDE, name) for name in beside for t in PLAIN]
    prompts = [case.prompt for case in cases]
    before = right(bench, bench.store.get(prompts, drawing.seeds), cases)
    for place in range(len(styles)):
        following = (styles * 2)[place : place + len(styles)]
        erased, others = following[: options.together], following[options.together :]
        kept = others[: options.retain]
        for written in options.editors:
            editor = make_editor(written, len(erased) + len(beside))
            editor = editor if beside else for_styles(editor, options.kind)
            about = {"editor": written, "settings": editor.described(), "erased": ", ".join(erased), "retain": kept}
            target = kept[0] if options.target == RETAINED else options.target
            about |= {"target": target, "split": options.split, "judge": options.judge, "things": things}
            if options.kind != "style":
                about |= {"kind": options.kind}
            if beside:
                about |= {"beside": beside, "retain": [*kept, *staying]}
            key = key_of(bench, about)
            if key not in known:
                row: Row = {"key": key, **about}
                calls = [Concept(style, target, kind=options.kind if beside else None) for style in erased]
                calls += map(Concept, beside)
                edit = functools.partial(editor, pipe, calls, about["retain"])
                try:
                    seconds, _ = common.timed(edit, pipe.device.type)
                    after = generate(pipe, prompts, drawing.seeds, drawing.steps, drawing.guidance, fast=drawing.fast)
                    row |= {"edit_seconds": seconds}
                    for side, hits in (("edited", right(bench, after, cases)), ("original", before)):
                        found = rates(cases, *hits, erased, kept)
                        row[side] = {name: dataclasses.asdict(value) for name, value in found.items()}
                except RealEraError as error:
                    row["error"] = str(error)
                pipe.unet.load_state_dict(originals)
                known[key] = tidy({**row, **record})
                append_row(options.results, known[key])
            yield known[key]


def pooled(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Rate]]]:
    """Editor -> side -> metric -> rate over all styles."""
    found: dict[str, dict[str, dict[str, Rate]]] = {}
    for editor in dict.fromkeys(row["editor"] for row in rows):
        mine = [row for row in rows if row["editor"] == editor and "error" not in row]
        found[editor] = {
            side: {name: total([r[side][name] for r in mine if name in r[side]]) for name in METRICS}
            for side in ("edited", "original")
        }
    return found


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, the unedited model first."""

    found = pooled(rows)
    head = ["editor", *(name.replace("_", " ") for name in METRICS)]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    first = next(iter(found.values()))["original"]
    for name, line in [("unedited", first), *((editor, sides["edited"]) for editor, sides in found.items())]:
        out.append(f"| {name} | " + " | ".join(shown(line[metric]) for metric in METRICS) + " |")
    return "\n".join(out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    add("--editors", nargs="+", default=["ours", "uce", "mace", "speed", "rece"], help="as for benchmarks.compare")
    add("--split", choices=("development", "report"), default="development", help="of the things that are drawn")
    add("--judge", choices=("development", "report"), default="development")
    add("--target", help=f"what every style becomes, {RETAINED}: the first retained one  [default: each editor's own]")
    add("--kind", choices=KINDS, default="style", help="what ours is told that a style is")
    add("--things", type=int, default=24, help="at most, for each style")
    add("--retain", type=int, default=2, help="other styles that are named to stay")
    add("--together", type=int, default=1, help="styles that are erased in one edit")
    add("--beside", type=int, default=0, help="concepts that are erased in the same edit")
    add("--results", type=Path, default=Path("benchmarks/results/styles.jsonl"), help="rows; a run goes on from them")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--seeds", type=int, default=1, help="pictures of each prompt")
    add("--steps", type=int, default=Settings.steps, help="of the sampler")
    add("--fast", action="store_true", help="draw with the U-Net in bfloat16")
    add("--threads", type=int, default=2)
    add("--json", action="store_true", help="one JSON object in place of the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> None:
    """Erase, draw, judge, print. `bench` may be one that is loaded already."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", RealEraWarning)
    if bench is None:
        settings = Settings(
            steps=options.steps,
            fast=options.fast,
            seeds=tuple(range(options.seeds)),
            choice_seeds=tuple(range(100, 100 + options.seeds)),
        )
        bench = Bench(options.model, options.cache, options.judge, settings)
    record = {"versions": common.versions(), "machine": common.machine(), "threads": options.threads}
    record["command"] = "python -m benchmarks.styles " + " ".join(sys.argv[1:] if arguments is None else arguments)
    record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = []
    for row in rows_of(bench, load_pipeline(options.model), options, record):
        rows.append(row)
        print(f"{row['erased']}, {row['editor']}: {row.get('error', 'done')}", file=sys.stderr, flush=True)
    print(json.dumps({**record, "rows": rows}) if options.json else table(rows))


if __name__ == "__main__":
    main()
