"""What the command line hands to the library: each option, and each field of the configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from helpers import run

import realera_edit
from realera_edit import Concept, EditConfig
from realera_edit.cli import cli


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `edit_model`, which here ends the command."""
    calls: list[Any] = []

    def record(*args: Any, **options: Any) -> None:
        calls.append((args, options))
        raise realera_edit.RealEraError("asked")

    monkeypatch.setattr("realera_edit.edit.edit_model", record)
    return calls


def changed_value(spec: Any) -> Any:
    """A valid value of a configuration field that is not its default."""
    if isinstance(spec.default, bool):
        return not spec.default
    if spec.metadata["choices"]:
        return next(choice for choice in spec.metadata["choices"] if choice != spec.default)
    if spec.name == "contexts":
        return ("an etching of {}", "{} at night")
    return {"cos_min": 0.5, "cos_max": 0.9}.get(spec.name, spec.default + 1 if isinstance(spec.default, int) else 0.25)


@pytest.mark.parametrize("spec", fields(EditConfig), ids=lambda spec: spec.name)
def test_every_field_of_the_configuration_is_an_option(spec: Any, asked: list[Any]) -> None:
    value = changed_value(spec)
    flag = f"--{spec.name.replace('_', '-')}"
    if spec.name == "contexts":
        words = [word for context in value for word in ("--context", context)]
    elif isinstance(value, bool):
        words = [flag if value else f"--no-{flag.removeprefix('--')}"]
    else:
        words = [flag, str(value)]
    run("erase", "model", "cat", "-o", "nowhere", *words)
    run("erase", "model", "cat", "-o", "nowhere")
    (_, with_option), (_, without) = asked
    assert with_option["config"] == EditConfig(**{spec.name: value})
    assert without["config"] == EditConfig()
    option = next(p for p in cli.commands["erase"].params if p.name == spec.name)
    assert isinstance(option, click.Option)
    assert option.help == spec.metadata["help"]
    assert spec.metadata["help"].split()[0] in run("erase", "--help").stdout


def test_every_other_option_reaches_the_library(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("concept,target\nVan Gogh,art\n")
    (tmp_path / "keep.txt").write_text("Monet\nRodin\n")
    (tmp_path / "prior.txt").write_text("a photo of a lake\n")
    files = ["--concepts", tmp_path / "names.csv", "--preserve-file", tmp_path / "keep.txt"]
    options = ["--prior-file", tmp_path / "prior.txt", "--device", "cpu", "--dtype", "bfloat16"]
    more = ["--variant", "fp16", "--revision", "v1", "--to", "a painting", "--preserve", "Manet", "-q"]
    folders = ["--tokenizer", "words", "--text-encoder", "sd15"]
    run("erase", "owner/model", "  Pablo  Picasso", "-o", "nowhere", *files, *options, *more, *folders)
    (args, options_given), *rest = asked
    assert not rest
    assert args == ("owner/model", [Concept("Pablo Picasso"), Concept("Van Gogh", "art")])
    assert options_given == {
        "target": "a painting",
        "preserve": ["Manet", "Monet", "Rodin"],
        "prior": ["a photo of a lake"],
        "config": EditConfig(),
        "device": "cpu",
        "dtype": torch.bfloat16,
        "variant": "fp16",
        "revision": "v1",
        "tokenizer": Path("words"),
        "text_encoder": Path("sd15"),
        "progress": False,
    }


def test_aliases_and_progress(asked: list[Any]) -> None:
    run("erase", "model", "cat", "--alias", "kitty", "--alias", "puss", "-o", "nowhere")
    run("erase", "model", "cat", "--json", "-o", "nowhere")
    assert asked[0][0][1] == [Concept("cat", aliases=("kitty", "puss"))]
    assert [options["progress"] for _, options in asked] == [True, False]
