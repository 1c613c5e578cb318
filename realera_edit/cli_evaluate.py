"""The command that draws, judges and measures an edit."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from .cli_common import DTYPES, Command, F, bar, print_result
from .evaluation_config import EvaluationConfig, parse_numbers


def _config_options(command: F) -> F:
    """One option for each number of `EvaluationConfig`: name, default and help are written there alone."""
    for spec in reversed(fields(EvaluationConfig)):
        if spec.metadata:
            flag, kind = f"--{spec.name.replace('_', '-')}", type(spec.default)
            option = click.option(flag, type=kind, default=spec.default, show_default=True, help=spec.metadata["help"])
            command = option(command)
    return command


@click.command(cls=Command)
@click.argument("original")
@click.argument("edited")
@click.option("--out", "--output", "-o", "out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--concept", "concepts", multiple=True, help="Erased concept; repeatable.  [default: those of EDITED's record]"
)
@click.option(
    "--judge",
    default="reference",
    show_default=True,
    help="reference (emoji), reference:FILE, clip:FOLDER, classifier:FOLDER, nudenet, or python:MODULE:NAME, which "
    "imports MODULE and so RUNS ITS CODE.",
)
@click.option("--alias", "given", multiple=True, help="Another name of the one --concept; repeatable.")
@click.option("--preserve", multiple=True, help="A concept that must stay, where the model has no concepts.json.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="CSV file kind,prompt,truth[,style,owner] in place of chosen prompts; kinds: e own name, g other names, "
    "n neighbours, s far, r residue.",
)
@click.option(
    "--template", "templates", multiple=True, help="Prompt with one {} or {a} for a name.  [default: judge's]"
)
@click.option(
    "--curve",
    default="",
    help="Numbers such as 1,5,10: also erase the first so many concepts of EDITED's record alone, by its recipe, and "
    "chart the figures over their number.",
)
@click.option("--seeds", default="0-3", show_default=True, help="Such as 0-3 or 1,5,7; of each prompt.")
@_config_options
@click.option("--device", help="Where to draw.  [default: cuda where there is one, else cpu]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Precision to draw in.  [default: float32]")
@click.option("--variant", help="Weights to read, such as fp16.")
@click.option("--revision", help="Branch, tag or commit of hub models.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors.")
def evaluate(original: str, edited: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Draw ORIGINAL and EDITED on the same prompts and seeds, judge the pictures, and write a report to OUT.

    The figures, each beside the unedited model's, are in OUT/evaluation.json, the pictures beside it. A broken run goes
    on where it stopped, if it is given the same OUT. Several processes share the work under `accelerate launch`.

    \b
    realera-edit evaluate emoji ./no-cat --out ./report
    realera-edit evaluate ./sd15 ./no-van-gogh --judge clip:./clip-vit-b32 --preserve Monet --steps 30 -o ./report
    realera-edit evaluate ./sd15 ./safe --judge nudenet --prompts prompts.csv --guidance 7.5 -o ./report
    """
    if options["given"] and len(options["concepts"]) != 1:
        raise click.UsageError("--alias goes with exactly one --concept")
    names = [spec.name for spec in fields(EvaluationConfig) if spec.metadata]
    config = EvaluationConfig(seeds=parse_numbers(options.pop("seeds")), **{name: options.pop(name) for name in names})
    aliases, dtype, curve = (options.pop(name) for name in ("given", "dtype", "curve"))
    import torch

    from .evaluation import evaluate as measure
    from .generate import Team

    found = measure(
        original,
        edited,
        out=out,
        aliases=dict.fromkeys(options["concepts"], aliases),
        config=config,
        curve=parse_numbers(curve, "curve") if curve else (),
        dtype=getattr(torch, dtype) if dtype else None,
        command=_command(original, edited, out, options["prompts"], options["judge"].partition(":")[2]),
        progress=None if quiet or as_json or not sys.stderr.isatty() else bar(),
        **options,
    )
    if Team.of_environment().rank:
        return  # the first process writes and speaks
    from . import contact_sheet, html_report

    found.save(out)
    page, sheet = html_report.write(out), contact_sheet.write(out)
    print_result(found.to_dict(), f"{found.table()}\nwritten    {page}, {sheet.name}", as_json, quiet)


def _command(*paths: str | Path | None) -> str:
    """The command line as it was given, to be run again; the report may be published, so no folder of this machine.

    `paths`: what of it may be one. A relative one stays as it was typed, an absolute one is called as in the record.
    """
    from .hub import public_name

    # the longest first: one may be the end of another
    absolute = sorted({str(path) for path in paths if path and os.path.isabs(path)}, key=len, reverse=True)

    def shown(word: str) -> str:
        for path in absolute:
            before = word.removesuffix(path)
            if before != word and (before in ("", "-o") or before.endswith(("=", ":"))):
                return before + public_name(path)["model"]
        return word

    return shlex.join(["realera-edit", *map(shown, sys.argv[1:])])
