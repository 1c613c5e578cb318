"""The command line: help, exit codes, one line for each of our errors, and what it hands to the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from diffusers import DiffusionPipeline
from helpers import UNET, run, tensor_bytes, tree

import realera_edit
from realera_edit import EditConfig
from realera_edit.cli import cli
from realera_edit.provenance import RECORD, UNDO

FAST = ("--words", "0", "--prior-words", "60", "--beyond", "0")
COMMANDS = sorted(cli.commands)


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    examples = [line.strip() for line in result.stdout.splitlines() if f"realera-edit {name} " in line]
    assert examples
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in result.stdout


def test_every_example_in_the_help_is_a_valid_command_line() -> None:
    lines = [line.strip() for name in COMMANDS for line in run(name, "--help").stdout.splitlines()]
    examples = [line for line in lines if line.startswith("realera-edit ")]
    assert len(examples) >= 4
    for line in examples:
        name, *words = click.parser.split_arg_string(line)[1:]
        with cli.commands[name].make_context(name, words) as context:
            assert context.params


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\nfrom realera_edit.cli import cli\n"
        "try:\n    cli(sys.argv[1:])\nfinally:\n"
        "    print('HEAVY', [m for m in ('torch', 'numpy', 'transformers', 'diffusers') if m in sys.modules])"
    )
    for args in (["--help"], ["erase", "--help"], ["--version"], ["completion", "zsh"], ["erase", "model"]):
        assert "HEAVY []" in python("-c", code, *args).stdout
    # control: a command that does its work imports torch
    assert "HEAVY ['torch', 'numpy'" in python("-c", code, "inspect", "nowhere").stdout
    resource = pytest.importorskip("resource")
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "realera_edit", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_version_as_a_module_and_as_a_script() -> None:
    wanted = f"realera-edit, version {realera_edit.__version__}\n"
    assert python("-m", "realera_edit", "--version").stdout == wanted
    script = Path(sys.executable).with_name("realera-edit")
    if script.exists():
        assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = run("completion", shell).stdout
    assert f"_REALERA_EDIT_COMPLETE={shell}_complete" in script
    complete = ShellComplete(cli, {}, "realera-edit", "_REALERA_EDIT_COMPLETE")
    assert [item.value for item in complete.get_completions([], "er")] == ["erase"]
    assert "--prior-words" in [item.value for item in complete.get_completions(["erase"], "--pri")]


# Exit codes


def test_our_errors_are_one_line_and_exit_code_1(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "bad.yaml").write_text("- {cat: [\n")
    new = tmp_path / "new"
    cases = {
        ("erase", tmp_path / "gone", "cat", "-o", new): "gone: no such folder",
        ("erase", sd1, "cat", "-o", tmp_path / "there"): "there: already exists",
        ("erase", sd1, "cat", "cat", "-o", new): "row 2: 'cat' was already given",
        ("erase", sd1, "cat", "-o", new, "--to", "a cat"): "contains the concept",
        ("erase", sd1, "cat", "-o", new, "--strength", "1.5"): "strength = 1.5: expected 0 to",
        ("erase", sd1, "", "-o", new): "name is empty",
        ("erase", sd1, "\udcff", "-o", new): "is not text",
        ("erase", sd1, "cat", "--preserve", "caf\udce9", "-o", new): "preserve: 'caf\\udce9' is not text",
        ("erase", sd1, "cat", "--context", "caf\udce9 {}", "-o", new): "is not text",
        ("erase", sd1, "cat", "-o", new, "--context", "no place"): "write {} once",
        ("erase", sd1, "--concepts", tmp_path / "bad.yaml", "-o", new): "bad.yaml: not valid YAML",
        ("erase", sd1, "cat", "-o", new, "--preserve-file", tmp_path / "gone.txt"): "gone.txt: no such file",
        ("erase", sd1, "cat", "-o", new, "--device", "cuda:99"): "device 'cuda:99' cannot be used",
        ("erase", sd1, "cat", "-o", new, "--device", "toaster"): "device 'toaster' cannot be used",
        ("erase", sd1, "cat", "-o", tmp_path / ("x" * 300), *FAST): "cannot be written: File name too long",
        ("erase", "x" * 5000, "cat", "-o", new): "no such folder",
        ("inspect", sd1): "was not written by realera-edit",
        ("inspect", sd1 / UNET): "its header has no record of an edit",
        ("undo", sd1, "-o", new): "was not written by realera-edit",
        ("undo", sd1, "-o", tmp_path / "there"): "there: already exists",
    }
    for args, message in cases.items():
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, ""), args
        assert message in result.stderr
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    assert not new.exists()


def test_usage_errors_are_exit_code_2(sd1: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    cases = {
        ("erase",): "Missing argument 'MODEL'",
        ("erase", sd1, "cat"): "Missing option '--output'",
        ("erase", sd1, *out): "name at least one CONCEPT",
        ("erase", sd1, "cat", "dog", "--alias", "puss", *out): "--alias goes with exactly one CONCEPT",
        ("erase", sd1, "cat", *out, "--kind", "animal"): "'animal' is not one of",
        ("erase", sd1, "cat", *out, "--seed", "one"): "'one' is not a valid integer",
        ("erase", sd1, "cat", *out, "--colour", "red"): "No such option",
        ("completion", "tcsh"): "'tcsh' is not one of",
        ("paint",): "No such command 'paint'",
    }
    for args, message in cases.items():
        result = run(*args)
        assert result.exit_code == 2, args
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


# A whole edit


def test_erase_inspect_undo(sd1: Path, tmp_path: Path) -> None:
    before, out, back = tree(sd1), tmp_path / "out", tmp_path / "back"
    said = run("erase", sd1, "cat", "猫", "--preserve", "dog", "-o", out, *FAST)
    assert (said.exit_code, said.stderr) == (0, "")
    assert "cat -> object" in said.stdout
    assert f"written    {out}   (holds the originals for undo; --no-undo before you publish)" in said.stdout
    shown = run("inspect", out)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout in said.stdout
    assert "kept       1 preserved, most moved: dog" in shown.stdout
    assert json.loads(run("inspect", out / UNET).stdout)["concepts"][1]["name"] == "猫"
    undone = run("undo", out, "-o", back)
    assert (undone.exit_code, undone.stdout, undone.stderr) == (0, f"restored   {back}\n", "")
    assert tensor_bytes(back / UNET) == tensor_bytes(sd1 / UNET) != tensor_bytes(out / UNET)
    assert tree(sd1) == before


def test_json_is_one_object_and_quiet_is_silent(sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("erase", sd1, "猫", "-o", out, "--json", *FAST)
    record = json.loads(said.stdout)
    assert said.stderr == ""
    assert record == json.loads((out / RECORD).read_text(encoding="utf-8"))
    assert json.loads(run("inspect", out, "--json").stdout) == {**record, "undo": True}
    assert json.loads(run("undo", out, "-o", tmp_path / "back", "--json").stdout) == {
        "restored": str(tmp_path / "back")
    }
    for args in (
        ("erase", sd1, "cat", "-o", out, "--force", "--no-undo", "--link", *FAST),
        ("erase", sd1, "cat", "-o", tmp_path / "two", *FAST),
        ("undo", tmp_path / "two", "-o", tmp_path / "back", "--force"),
    ):
        quiet = run(*args, "--quiet")
        assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert not (out / UNDO).exists()
    assert (sd1 / "vae" / "config.json").read_text() == (out / "vae" / "config.json").read_text()
    weight = "vae/diffusion_pytorch_model.safetensors"
    assert (sd1 / weight).samefile(out / weight)


def test_warnings_go_to_stderr_though_quiet(sd1: Path, tmp_path: Path) -> None:
    (sd1 / "old.ckpt").write_bytes(b"the model, unedited")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        said = run("erase", sd1, "cat", "-o", tmp_path / "out", "--quiet", *FAST)
    assert (said.exit_code, said.stdout) == (0, "")
    assert said.stderr == f"Warning: {sd1}: left out of the output, since they hold the model unedited: old.ckpt\n"


def test_a_terminal_that_knows_only_latin(sd1: Path, tmp_path: Path) -> None:
    run("erase", sd1, "猫", "-o", tmp_path / "out", *FAST)
    said = python("-m", "realera_edit", "inspect", str(tmp_path / "out"), PYTHONIOENCODING="latin-1")
    assert (said.returncode, said.stderr) == (0, "")
    assert "\\u732b -> object" in said.stdout


def test_the_real_model(emoji: Path, tmp_path: Path) -> None:
    before = tree(emoji)
    said = run("erase", emoji, "cat face", "-o", tmp_path / "out", "--json")
    record = json.loads(said.stdout)
    assert record["concepts"][0]["residual"]["cat face"] <= 1 - EditConfig().strength_for(1) + 0.2
    assert {key: record["projections"][key] for key in ("k_edited", "v_edited")} == {"k_edited": 7, "v_edited": 7}
    DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert tree(emoji) == before
    assert set(tree(tmp_path / "out")) == set(before) | {RECORD, UNDO}
