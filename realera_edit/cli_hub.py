"""The command that writes a model card."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .cli_common import Command, F
from .errors import CheckpointError

FILE = click.Path(path_type=Path)


def _card_options(command: F) -> F:
    """Options of every command that writes a card."""
    for option in reversed(
        (
            click.option("--evaluation", type=FILE, help="Folder of `evaluate`, whose figures go into the card."),
            click.option(
                "--license",
                help="Licence to state, as the hub abbreviates it, such as creativeml-openrail-m.  [default: that of "
                "the unedited model, where its card is known]",
            ),
        )
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@click.argument("path", type=FILE)
@_card_options
@click.option(
    "--output",
    "-o",
    "out",
    type=FILE,
    help="File to write. What else is in an existing one stays; our own section is replaced.  [default: print it]",
)
def card(path: Path, evaluation: Path | None, license: str | None, out: Path | None) -> None:
    """Print or write the model card of PATH, a README.md for the hub, from the record of its edit.

    PATH is an edited folder or single file, an edit file, or an exported LoRA. `erase` and `apply` write the card of a
    folder themselves.

    \b
    realera-edit card ./no-van-gogh --evaluation ./report -o ./no-van-gogh/README.md
    realera-edit card edited.safetensors -o README.md
    """
    from .card import model_card, read_card
    from .files import write_atomically

    existing = read_card(out) if out is not None and os.path.lexists(out) else None
    text = model_card(path, evaluation=evaluation, license=license, existing=existing)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}; choose another output") from error
    click.echo(f"written    {out}")


COMMANDS = (card,)
