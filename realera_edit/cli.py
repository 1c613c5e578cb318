"""The command line: parse, one library call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_attack import attack
from .cli_common import (
    DTYPES,
    UNDO_NOTE,
    Command,
    F,
    card_option,
    check_metadata,
    check_output,
    check_same_kind,
    metadata_option,
    output_options,
    print_result,
    single_file_options,
)
from .cli_edits import COMMANDS
from .cli_evaluate import evaluate
from .cli_hub import COMMANDS as HUB_COMMANDS
from .concepts import Concept, load_concepts, load_prompts
from .config import EditConfig


def config_options(command: F) -> F:
    """One option for each field of `EditConfig`: name, default, range and help are written there alone."""
    for spec in reversed(fields(EditConfig)):
        flag = f"--{spec.name.replace('_', '-')}"
        meta: dict[str, Any] = {"help": spec.metadata["help"], "default": spec.default, "show_default": True}
        if spec.name == "contexts":
            option = click.option("--context", "contexts", multiple=True, help=spec.metadata["help"])
        elif isinstance(spec.default, bool):
            option = click.option(f"{flag}/--no-{flag.removeprefix('--')}", spec.name, **meta)
        elif spec.metadata["choices"]:
            option = click.option(flag, spec.name, type=click.Choice(spec.metadata["choices"]), **meta)
        else:
            option = click.option(flag, spec.name, type=float if spec.default is None else type(spec.default), **meta)
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="realera-edit")
def cli() -> None:
    """Erase concepts from text-to-image checkpoints, in closed form: seconds, no images, no training.

    \b
    realera-edit erase MODEL "Van Gogh" -o OUT
    realera-edit inspect OUT
    realera-edit undo OUT -o RESTORED

    The edit by itself is a small file, for any model with the same text encoder:

    \b
    realera-edit erase MODEL "Van Gogh" --save-edit EDIT.safetensors
    realera-edit apply EDIT.safetensors FINE_TUNE -o OUT
    realera-edit export-lora EDIT.safetensors MODEL -o LORA.safetensors
    """


@cli.command(cls=Command)
@click.argument("model")
@click.argument("names", nargs=-1, metavar="[CONCEPT]...")
@click.option("--output", "-o", "out", type=click.Path(path_type=Path), help="Folder or .safetensors file to write.")
@click.option(
    "--save-edit",
    type=click.Path(path_type=Path),
    help="Write the edit by itself, a .safetensors for `apply`; with --output or in place of it.",
)
@click.option(
    "--to",
    "target",
    help="What the concepts become.  [default: by kind; for things from 25 names on an average thing, for styles "
    "the average of the preserved ones, if two are, else of things]",
)
@click.option("--alias", "aliases", multiple=True, help="Another name of the one concept given; repeatable.")
@click.option(
    "--concepts",
    "concepts_file",
    type=click.Path(path_type=Path),
    help="Concepts from a .csv, .yaml, .json or .txt file (columns concept,target,aliases,strength,kind).",
)
@click.option("--preserve", multiple=True, help="A concept or prompt that must stay; repeatable.")
@click.option(
    "--preserve-file", type=click.Path(path_type=Path), help="Concepts or prompts that must stay, one a line."
)
@click.option("--prior-file", type=click.Path(path_type=Path), help="Prompts to hold in place of frequent words.")
@config_options
@click.option("--device", help="Where the text encoder runs.  [default: cuda where there is one, else cpu]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Precision of the text encoder.  [default: float32]")
@click.option("--variant", help="Weights of the text encoder to read, such as fp16.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@single_file_options
@click.option("--link", is_flag=True, help="Hard-link the unedited weights in place of copying them.")
@click.option("--undo/--no-undo", default=True, show_default=True, help="Keep the original weights for `undo`.")
@card_option
@metadata_option
@output_options
def erase(model: str, names: tuple[str, ...], out: Path | None, save_edit: Path | None, **options: Any) -> None:
    """Write a copy of MODEL that no longer draws each CONCEPT.

    MODEL is a diffusers folder, a hub id or a single .safetensors file (A1111, ComfyUI). It is never changed.

    \b
    realera-edit erase ./sd15 "Van Gogh" --kind style --preserve Monet --preserve Renoir -o ./no-van-gogh
    realera-edit erase ./sdxl --concepts celebrities.csv --preserve-file keep.txt -o ./safe
    realera-edit erase ./sd15 "Van Gogh" --save-edit no-van-gogh.safetensors
    realera-edit erase model.safetensors "Van Gogh" --tokenizer ./sd15 -o edited.safetensors
    """
    if out is None and save_edit is None:
        raise click.UsageError("Missing option '--output' / '-o' (or '--save-edit').")
    quiet, force, as_json = (options.pop(name) for name in ("quiet", "force", "as_json"))
    saving = {name: options.pop(name) for name in ("link", "undo", "card", "metadata")}
    dtype = options.pop("dtype")
    concepts = _gather(names, options.pop("concepts_file"), options.pop("aliases"))
    preserve = list(options.pop("preserve"))
    preserve += load_prompts(path) if (path := options.pop("preserve_file")) else []
    prior = load_prompts(path) if (path := options.pop("prior_file")) else []
    config = EditConfig(**{spec.name: options.pop(spec.name) for spec in fields(EditConfig)})
    for path in (out, save_edit):
        if path is not None:
            check_output(path, force)
    check_same_kind(Path(model), out)
    check_metadata(out, saving["metadata"])
    import torch

    from .edit import edit_model

    result = edit_model(
        model,
        concepts,
        preserve=preserve,
        prior=prior,
        config=config,
        dtype=getattr(torch, dtype) if dtype else None,
        progress=not quiet and not as_json,
        **options,
    )
    geometry = result.geometry(quick=True)
    geometry.warn()
    note = "".join(f"\n{line}" for line in geometry.summary())
    if save_edit is not None:
        note += f"\nwritten    {result.save_edit(save_edit, force=force)}   (the edit, for `apply`)"
    if out is not None:
        result.save(out, force=force, **saving)
        note += f"\nwritten    {out}" + (UNDO_NOTE if saving["undo"] else "")
    print_result(result.to_dict(), result.report() + note, as_json, quiet)


@cli.command(cls=Command)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the record as one JSON object.")
def inspect(path: Path, as_json: bool) -> None:
    """Print what was erased from PATH: an edited folder or single file, a weight file, or an edit file.

    \b
    realera-edit inspect ./no-painters
    realera-edit inspect no-van-gogh.safetensors
    """
    from .provenance import inspect_path
    from .report import render, render_edit

    data = inspect_path(path)
    if "encoders" in data:
        text = render_edit(data)
    else:
        text = render(data) if "tensors" in data else json.dumps(data, indent=1, ensure_ascii=False)
    print_result(data, text, as_json, False)


@cli.command(cls=Command)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--output", "-o", "out", required=True, type=click.Path(path_type=Path), help="What to write.")
@output_options
def undo(path: Path, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write a copy of the edited folder or single file PATH with the original weights, to the bit.

    \b
    realera-edit undo ./no-painters -o ./restored
    realera-edit undo edited.safetensors -o restored.safetensors
    """
    check_output(out, force)
    check_same_kind(path, out)
    from .provenance import undo_folder
    from .single_output import undo_file

    if os.path.isfile(path):
        undo_file(path, out, force=force)
    else:
        undo_folder(path, out, force=force, progress=not quiet and not as_json)
    print_result({"restored": str(out)}, f"restored   {out}", as_json, quiet)


@cli.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    eval "$(realera-edit completion bash)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"{shell} is not supported by click")
    click.echo(found(cli, {}, "realera-edit", "_REALERA_EDIT_COMPLETE").source())


for _command in (*COMMANDS, attack, evaluate, *HUB_COMMANDS):
    cli.add_command(_command)


def _gather(names: tuple[str, ...], path: Path | None, aliases: tuple[str, ...]) -> list[Concept]:
    if not names and path is None:
        raise click.UsageError(
            'name at least one CONCEPT, or give --concepts FILE. Example: erase MODEL "Van Gogh" -o OUT'
        )
    if aliases and (len(names) != 1 or path is not None):
        raise click.UsageError(
            "--alias goes with exactly one CONCEPT; for several use --concepts FILE with a column aliases"
        )
    given = [Concept(" ".join(name.split()), aliases=tuple(aliases)) for name in names]
    return given + (load_concepts(path) if path else [])


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    cli()
