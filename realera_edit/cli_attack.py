"""The command that attacks an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_common import Command, print_result


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
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder with CLIP's vocab.json and merges.txt, for a single file.  [default: the local hub cache]",
)
@click.option("--device", help="Where the text encoder runs.  [default: cuda where there is one, else cpu]")
@click.option("--variant", help="Weights of the text encoder to read, such as fp16.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def attack(model: str, names: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Look for embeddings and words that bring each CONCEPT back in an edited copy of MODEL, in closed form.

    Draws nothing, changes nothing. 0 % is no gain over the erased prompt, 100 % is the concept as the original model
    reads it. The edit need not be one of realera-edit: the weights of the two models are compared.

    \b
    realera-edit attack ./sd15 --edited ./no-van-gogh "Van Gogh"
    realera-edit attack ./sd15 --edited ./no-van-gogh "Van Gogh" --budget 0.2 --words 10000 --json
    """
    from .attack_run import attack_model

    reports = attack_model(model, concepts=names, progress=not as_json, **options)
    print_result(
        {"concepts": [report.to_dict() for report in reports]},
        "\n\n".join(report.report() for report in reports),
        as_json,
        False,
    )
