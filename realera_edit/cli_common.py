"""What the commands share: errors as one line, warnings on stderr, options of the output, printing."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from .errors import CheckpointError, ConfigError, RealEraError, RealEraWarning

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float32", "float16", "bfloat16")
UNDO_NOTE = "   (holds the originals for undo; --no-undo before you publish)"


class Command(click.Command):
    """A command whose own errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = _show_warning  # type: ignore[assignment]  # any further arguments are ignored
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except RealEraError as error:
            raise click.ClickException(str(error)) from error


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, RealEraWarning):
        click.echo(f"Warning: {message}", err=True)


def _terminate(*_: Any) -> None:
    raise SystemExit(143)  # unwinds the stack, so that temporary files go


def output_options(command: F) -> F:
    """Options of every command that writes a folder or prints a record."""
    for option in reversed(
        (
            click.option("--force", is_flag=True, help="Replace OUT if it exists."),
            click.option("--json", "as_json", is_flag=True, help="Print the record as one JSON object."),
            click.option("--quiet", "-q", is_flag=True, help="Print nothing but warnings and errors."),
        )
    ):
        command = option(command)
    return command


def card_option(command: F) -> F:
    """The option of every command that writes an edited model."""
    return click.option(
        "--card/--no-card",
        default=True,
        show_default=True,
        help="Tell of the edit in the README.md of a folder, above the card that was there.",
    )(command)


def _pairs(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise click.BadParameter(f"{bad[0]!r} has no value; write KEY=VALUE")
    return {key: value for key, _, value in pairs}


def metadata_option(command: F) -> F:
    """The option of every command that writes a single file for other programs."""
    return click.option(
        "--metadata",
        multiple=True,
        callback=_pairs,
        metavar="KEY=VALUE",
        help="Header metadata of a single file, such as modelspec.date=2026-01-31; repeatable.",
    )(command)


def single_file_options(command: F) -> F:
    """Options of every command that reads concepts by the text encoder of MODEL: what a single file may lack."""
    for option in reversed(
        (
            click.option(
                "--tokenizer",
                type=click.Path(path_type=Path),
                help="Folder with CLIP's vocab.json and merges.txt, for a single file.  [default: the local hub cache]",
            ),
            click.option(
                "--text-encoder",
                type=click.Path(path_type=Path),
                help="Diffusers folder whose text encoders to use, for a single file of the U-Net alone.",
            ),
        )
    ):
        command = option(command)
    return command


def check_output(out: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Fail before the work, not after it."""
    for path in inputs:
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise CheckpointError(f"{out}: is the input, which is never changed; choose another output")
    if os.path.exists(out) and not force:  # unlike Path.exists, never raises
        raise CheckpointError(f"{out}: already exists; choose another output, or replace it with --force")


def check_same_kind(model: Path, out: Path | None) -> None:
    """A single file becomes a single file, a folder a folder: told before the work, not after it."""
    single = os.path.isfile(model)
    if out is None or not os.path.exists(model) or single == (out.suffix == ".safetensors"):
        return
    kind, wanted = ("file", "ends in .safetensors") if single else ("folder", "does not end in .safetensors")
    raise CheckpointError(f"{out}: MODEL is a {kind}, and so is the output; give it a name that {wanted}")


def check_metadata(out: Path | None, metadata: Mapping[str, str]) -> None:
    """Only a single file has metadata to give: told before the work, not after it."""
    if metadata and (out is None or out.suffix != ".safetensors"):
        raise ConfigError("--metadata goes into the header of a single file, and no such output is asked for")


def bar() -> Callable[[str, int, int], None]:
    """Progress (label, done, total) on stderr, one bar after another."""
    bars: list[Any] = []

    def show(label: str, done: int, total: int) -> None:
        if not bars:
            bars.append(click.progressbar(length=total, label=label, file=sys.stderr).__enter__())
        bars[0].update(done - bars[0].pos)
        if done >= total:
            bars.pop().__exit__(None, None, None)

    return show


def print_result(data: dict[str, Any], text: str, as_json: bool, quiet: bool) -> None:
    """The record as one JSON object, or the text, or nothing."""
    if as_json:
        click.echo(json.dumps(data, ensure_ascii=False))
    elif not quiet:
        click.echo(text)
