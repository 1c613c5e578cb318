"""The command that attacks an edit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .cli_common import Command, bar, print_result, single_file_options
from .evaluation_config import EvaluationConfig, parse_numbers

RESULT = "attack.json"
_INVERSION = ("judge", "preserve", "start", "seeds", "steps", "guidance", "out")


@click.command(cls=Command)
@click.argument("model")
@click.argument("names", nargs=-1, required=True, metavar="CONCEPT...")
@click.option("--edited", required=True, type=click.Path(path_type=Path), help="The edited copy of MODEL.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.FloatRange(min=0, min_open=True),
    default=(0.1, 0.25, 0.5, 1.0),
    show_default=True,
    help="How far an embedding may move, as a share of its norm; repeatable.",
)
@click.option(
    "--ridge",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Weight of the embedding's own norm, in mean eigenvalues of the layers.",
)
@click.option(
    "--words",
    type=click.IntRange(min=0),
    default=2000,
    show_default=True,
    help="Frequent vocabulary words to search for some that still draw the concept (0: none).",
)
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Words to list.")
@single_file_options
@click.option(
    "--inversion",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="STEPS",
    help="Also learn a word in so many gradient steps and draw it; 200 tell, 1000 and more are an attacker's. "
    "The options below are for it.",
)
@click.option(
    "--judge",
    help="Who says what a picture shows, as in `evaluate`.  [default: nobody; the denoising error alone]",
)
@click.option("--preserve", multiple=True, help="Another label for a judge that is told its labels; repeatable.")
@click.option("--start", default="object", show_default=True, help="Word of one token to begin from.")
@click.option("--seeds", default="0-3", show_default=True, help="Such as 0-3 or 1,5,7; of each prompt.")
@click.option("--steps", type=click.IntRange(min=1), default=EvaluationConfig.steps, show_default=True, help="To draw.")
@click.option(
    "--guidance", type=click.FloatRange(min=0), default=EvaluationConfig.guidance, show_default=True, help="To draw."
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder for learned words, pictures and the report; a broken run goes on there.  [default: none is kept]",
)
@click.option("--device", help="Where to run.  [default: cuda where there is one, else cpu]")
@click.option("--variant", help="Weights to read, such as fp16.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def attack(model: str, names: tuple[str, ...], inversion: int, as_json: bool, **options: Any) -> None:
    """Look for embeddings and words that bring each CONCEPT back in an edited copy of MODEL, in closed form.

    Changes nothing. 0 % is no gain over the erased prompt, 100 % is the concept as the original model reads it. The
    edit need not be one of realera-edit: the weights of the two models are compared, each a diffusers folder, a hub id
    or a single .safetensors file. Nothing is drawn unless --inversion asks for the strongest attack, textual inversion,
    on folders: how often the judge sees the concept in what the learned word draws, beside the same attack on MODEL
    itself and, as a control, on pictures that no prompt draws.

    \b
    realera-edit attack ./sd15 --edited ./no-van-gogh "Van Gogh"
    realera-edit attack ./sd15 --edited ./no-van-gogh "Van Gogh" --budget 0.2 --words 10000 --json
    realera-edit attack model.safetensors --edited edited.safetensors "Van Gogh" --tokenizer ./sd15
    realera-edit attack emoji --edited ./no-cat "cat face" --inversion 200 --judge reference -o ./attacked
    """
    own = {name: options.pop(name) for name in _INVERSION}
    seeds, out = parse_numbers(own.pop("seeds")), own["out"]
    if out is not None and not inversion:
        raise click.UsageError("--out is for --inversion")
    from .attack_run import attack_model
    from .generate import Drawing, drawable
    from .inversion_run import invert_model

    for one in (model, options["edited"]) if inversion else ():
        drawable(one, options["revision"])  # told before the attacks without a picture, not after them
    reports = attack_model(model, concepts=names, progress=not as_json, **options)
    found = [report.to_dict() for report in reports]
    texts = [report.report() for report in reports]
    if inversion:
        learned = invert_model(
            model,
            options["edited"],
            names,
            steps=inversion,
            seeds=seeds,
            drawing=Drawing(own.pop("steps"), own.pop("guidance")),
            progress=bar() if not as_json and sys.stderr.isatty() else None,
            **own,
            **{name: options[name] for name in ("device", "variant", "revision")},
        )
        found = [{**one, "inversion": report.to_dict()} for one, report in zip(found, learned, strict=True)]
        texts = [f"{text}\n{report.report()}" for text, report in zip(texts, learned, strict=True)]
    data = {"concepts": found}
    if out is not None:
        from .evaluation_file import replaced

        replaced(out / RESULT, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    print_result(data, "\n\n".join(texts), as_json, False)
