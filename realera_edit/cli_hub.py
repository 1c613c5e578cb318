"""Commands for publishing: a model card, and a push to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from .cli_common import Command, F, print_result
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


@click.command(cls=Command)
@click.argument("path", type=FILE)
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--revision", help="Branch to push to; made where it is missing.  [default: main]")
@click.option("--message", "-m", help="Commit message.  [default: names the concepts]")
@click.option("--create-pr", is_flag=True, help="Open a pull request in a repository that exists, in place of a push.")
@click.option(
    "--with-undo",
    is_flag=True,
    help="Upload the original weights too. Whoever downloads them can bring each concept back; without this option "
    "they stay here.",
)
@click.option("--card/--no-card", default=True, show_default=True, help="Upload a model card (README.md).")
@_card_options
@click.option("--dry-run", is_flag=True, help="List what would be uploaded, and ask nothing of the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors.")
def push(path: Path, repo_id: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Upload PATH with its record and a model card to the hub repository REPO_ID, as one commit.

    PATH is an edited folder or single file, an edit file, or an exported LoRA; its weights must be those that the
    record tells of. The original weights that `undo` needs are left out. You must be logged in (`hf auth login`).

    \b
    realera-edit push ./no-van-gogh alice/sd15-no-van-gogh --private
    realera-edit push edited.safetensors alice/edited --dry-run
    realera-edit push LORA.safetensors alice/loras --create-pr --message "No Van Gogh"
    """
    from huggingface_hub.utils import disable_progress_bars

    from .push import push_to_hub

    if quiet or as_json:
        disable_progress_bars()
    found = push_to_hub(path, repo_id, **options)
    print_result(found.to_dict(), found.report(), as_json, quiet)


COMMANDS = (card, push)
