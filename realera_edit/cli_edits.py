"""Commands about edits as files: apply, compose, scale, invert, diff, export-lora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_common import (
    DTYPES,
    UNDO_NOTE,
    Command,
    F,
    card_option,
    check_metadata,
    check_output,
    metadata_option,
    output_options,
    print_result,
)

FILE = click.Path(path_type=Path)


def _file_output(command: F) -> F:
    return click.option("--output", "-o", "out", required=True, type=FILE, help="Edit file to write.")(command)


def _model_options(command: F) -> F:
    """Options of every command that takes an edit to a model."""
    for option in reversed(
        (
            click.option(
                "--text-encoder",
                type=FILE,
                help="Diffusers folder whose text encoder to compare, for a single file of the U-Net alone.",
            ),
            click.option("--force-encoder", is_flag=True, help="Go on though the text encoder is not the edit's own."),
            click.option("--variant", help="Weights of the text encoder to compare, such as fp16."),
            click.option("--revision", help="Branch, tag or commit of a hub model."),
        )
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@click.argument("edit", type=FILE)
@click.argument("model")
@click.option("--output", "-o", "out", required=True, type=FILE, help="Folder or .safetensors file to write.")
@_model_options
@click.option("--link", is_flag=True, help="Hard-link the unedited weights in place of copying them.")
@click.option("--undo/--no-undo", default=True, show_default=True, help="Keep the original weights for `undo`.")
@card_option
@metadata_option
@output_options
def apply(edit: Path, model: str, out: Path, **options: Any) -> None:
    """Write a copy of MODEL with the edit file EDIT applied: what `erase` would write, without encoding or solving.

    MODEL is any model that shares the text encoder: a fine-tune, another precision.

    \b
    realera-edit apply no-van-gogh.safetensors ./sd15-fine-tune -o ./no-van-gogh
    """
    quiet, force, as_json = (options.pop(name) for name in ("quiet", "force", "as_json"))
    saving = {name: options.pop(name) for name in ("link", "undo", "card", "metadata")}
    check_output(out, force)
    check_metadata(out, saving["metadata"])
    from .transfer import apply_edit

    result = apply_edit(edit, model, progress=not quiet and not as_json, **options)
    result.save(out, force=force, **saving)
    note = f"\nwritten    {out}" + (UNDO_NOTE if saving["undo"] else "")
    print_result(result.to_dict(), result.report() + note, as_json, quiet)


@click.command(cls=Command)
@click.argument("edits", nargs=-1, required=True, type=FILE, metavar="EDIT...")
@_file_output
@output_options
def compose(edits: tuple[Path, ...], out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Join edit files into one that does what they do when applied one after the other, in this order.

    \b
    realera-edit compose no-van-gogh.safetensors no-picasso.safetensors -o no-painters.safetensors
    """
    check_output(out, force, edits)
    from .editfile import EditFile
    from .editfile import compose as joined

    _write(joined([EditFile.load(path) for path in edits]), out, force, as_json, quiet)


@click.command(cls=Command)
@click.argument("edit", type=FILE)
@click.option("--by", required=True, type=float, help="0 is no edit, 1 the edit as it is, 0.5 half of the way.")
@_file_output
@output_options
def scale(edit: Path, by: float, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Make an edit weaker or stronger: M_s = I + s (M - I).

    \b
    realera-edit scale no-van-gogh.safetensors --by 0.5 -o less-van-gogh.safetensors
    """
    check_output(out, force, (edit,))
    from .editfile import EditFile

    _write(EditFile.load(edit).scale(by), out, force, as_json, quiet)


@click.command(cls=Command)
@click.argument("edit", type=FILE)
@_file_output
@output_options
def invert(edit: Path, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write the edit that takes EDIT back, where it was applied without keeping the originals.

    \b
    realera-edit invert no-van-gogh.safetensors -o van-gogh-again.safetensors
    """
    check_output(out, force, (edit,))
    from .editfile import EditFile

    _write(EditFile.load(edit).invert(), out, force, as_json, quiet)


@click.command(cls=Command)
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Compare two edit files: how far apart they are, and in what their recipes differ.

    \b
    realera-edit diff no-van-gogh.safetensors no-painters.safetensors
    """
    from .editdiff import diff as compared
    from .editfile import EditFile
    from .report import render_diff

    data = compared(EditFile.load(first), EditFile.load(second))
    print_result(data, render_diff(data), as_json, False)


@click.command("export-lora", cls=Command)
@click.argument("edit", type=FILE)
@click.argument("model")
@click.option("--output", "-o", "out", required=True, type=FILE, help="LoRA file to write.")
@click.option(
    "--format",
    type=click.Choice(("diffusers", "kohya", "full")),
    default="diffusers",
    show_default=True,
    help="diffusers: load_lora_weights; kohya: A1111, Forge, ComfyUI; full: whole differences (.diff).",
)
@click.option("--rank", type=int, help="Most that is kept of each layer.  [default: all of a low-rank edit]")
@click.option("--energy", type=float, help="Share of each layer's squared norm to keep.  [default: 0.99 if dense]")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Precision to store.")
@metadata_option
@_model_options
@output_options
def export_lora(edit: Path, model: str, out: Path, dtype: str, **options: Any) -> None:
    """Write the edit file EDIT as a LoRA of MODEL, to be loaded on top of it; its scale is a dial of the erasure.

    \b
    realera-edit export-lora no-van-gogh.safetensors ./sd15 -o no-van-gogh-lora.safetensors
    realera-edit export-lora no-van-gogh.safetensors ./sdxl --format kohya --dtype float16 -o lora.safetensors
    """
    quiet, as_json = (options.pop(name) for name in ("quiet", "as_json"))
    check_output(out, options["force"], (edit,))
    import torch

    from .lora import export_lora as export

    report = export(edit, model, out, dtype=getattr(torch, dtype), **options)
    print_result(report.to_dict(), report.report(), as_json, quiet)


def _write(edit: Any, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    edit.save(out, force=force)
    print_result(edit.to_dict(), f"{edit.report()}\nwritten    {out}", as_json, quiet)


COMMANDS = (apply, compose, scale, invert, diff, export_lora)
