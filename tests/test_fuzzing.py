"""Damage of every kind to every file that is read: one clear error, or a right edit; no crash, no hang, no half file.

Each case damages one file of a tiny model, runs one command on it, and looks at what is there afterwards. The default
suite takes a few cases of each kind, `-m slow` thousands; the same cases each time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_kinds import DONE, KINDS, SINGLE
from helpers import UNET, run, tensor_bytes, tree
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from realera_edit import EditFile, RealEraWarning
from realera_edit.apply import apply_factor
from realera_edit.front_matter import CARD
from realera_edit.history import sidecars
from realera_edit.provenance import RECORD, UNDO
from realera_edit.readme import has_section, without
from realera_edit.tensorfile import DTYPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time as Linux has them")
Build = Callable[..., Path]
# One case: far more than it takes on a busy machine, far less than a header may claim.
SECONDS, MORE_BYTES = 120, 2**30
SAMPLE, MANY = 4, 160


class Hang(BaseException):
    """No `Exception`, so that nothing takes it for a damaged file."""


@contextmanager
def limits() -> Iterator[None]:
    """Not much more memory than is taken, and not much time; warnings that are not ours are errors."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MORE_BYTES, old[1]))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RealEraWarning)
            yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module")
def sound(pristine: Build, pristine_single: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, edit files and edited models as they should be."""
    base = tmp_path_factory.mktemp("sound")
    shutil.copytree(pristine("sd1"), base / "folder")
    shutil.copytree(pristine("sd1", torch.float32, None, "400KB"), base / "sharded")
    for name in ("folder", "sharded"):
        (base / name / CARD).write_text("---\nlicense: mit\n---\n# A tiny model\n", encoding="utf-8")
    place = pristine_single("tiny-sd15")
    (base / "single").mkdir()
    (base / "done").mkdir()
    shutil.copy(place / "model.safetensors", base / SINGLE)
    shutil.copytree(place / "folder" / "tokenizer", base / "single" / "words")
    fast = KINDS["text encoder"].commands[1].partition("out ")[2].split()
    words = ("--tokenizer", base / "single" / "words")
    for command in (
        ("erase", base / "folder", "dog", "--save-edit", base / "other.safetensors", *fast),
        ("erase", base / "folder", "cat", "--save-edit", base / "edit.safetensors", "-o", base / "edited", *fast),
        (
            "erase",
            base / SINGLE,
            "cat",
            "--save-edit",
            base / "single/edit.safetensors",
            "-o",
            base / DONE,
            *words,
            *fast,
        ),
    ):
        assert run(*command).exit_code == 0
    return base


@pytest.fixture
def work(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, as the current folder. Nothing waits for the disk."""
    shutil.copytree(sound, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return tmp_path / "work"


def check(command: list[str], sound: Path) -> None:
    """What a command has written is whole and right, as far as the damage lets it be known."""
    out = Path(command[command.index("-o") + 1])
    name = command[0]
    if name in ("scale", "invert", "compose"):
        assert all(bool(tensor.isfinite().all()) for tensor in EditFile.load(out).tensors().values())
    elif name == "export-lora":
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(out).values())
    elif name == "undo":
        check_undone(Path(command[1]), out, sound)
    else:
        model = Path(command[2 if name == "apply" else 1])
        check_edited(model, out, EditFile.load(command[1]) if name == "apply" else None)


def check_edited(model: Path, out: Path, edit: EditFile | None) -> None:
    """The projections are multiplied by the edit, to the bit; every other byte is the model's."""
    record = json.loads((sidecars(out)[0] if out.is_file() else out / RECORD).read_text(encoding="utf-8"))
    assert record["tensors"]
    for relative, hashes in record["tensors"].items():
        source, target = (model, out) if model.is_file() else (model / relative, out / relative)
        old, new = tensor_bytes(source), tensor_bytes(target)
        assert list(old) == list(new)
        for key, (dtype, shape, data) in old.items():
            assert new[key][:2] == (dtype, shape)
            if key not in hashes:
                assert new[key][2] == data
                continue
            before, after = (
                torch.frombuffer(bytearray(b), dtype=DTYPES[dtype]).view(shape) for b in (data, new[key][2])
            )
            assert bool(after.isfinite().all())
            if edit is not None:
                assert torch.equal(after, apply_factor(edit.factor("k"), [before])[0])
        loads_alike(source, target)
    if model.is_dir():
        left, right = tree(model), tree(out)
        for relative in left.keys() - record["tensors"].keys() - {RECORD, UNDO, CARD}:
            assert right.get(relative, left[relative]) == left[relative]
        # of the card, our section is written anew, and the rest stays
        old_card, new_card = ((folder / CARD).read_text(encoding="utf-8") for folder in (model, out))
        assert has_section(new_card)
        assert without(new_card) == without(old_card)


def loads_alike(source: Path, target: Path) -> None:
    """What the format's own library reads before the edit, it reads after it."""
    try:
        before = load_file(source)
    except SafetensorError:
        return
    assert load_file(target).keys() == before.keys()


def check_undone(edited: Path, out: Path, sound: Path) -> None:
    """The projections are those before the edit, every other byte is the edited model's."""
    pairs = (
        ((edited, out, sound / SINGLE),)
        if edited.is_file()
        else ((edited / UNET, out / UNET, sound / "folder" / UNET),)
    )
    for source, target, original in pairs:
        old, new, first = tensor_bytes(source), tensor_bytes(target), tensor_bytes(original)
        edits = {key for key in first if tensor_bytes(sound / source)[key] != first[key]}
        assert list(old) == list(new)
        assert all(new[key] == (first if key in edits else old)[key] for key in old)


def meet(kind: str, data: st.DataObject, sound: Path, seen: Counter[str]) -> None:
    """One case."""
    name = data.draw(st.sampled_from(sorted(KINDS[kind].files)))
    content = Path(name).read_bytes()
    damaged = data.draw(KINDS[kind].files[name](content))
    command = data.draw(st.sampled_from(KINDS[kind].commands)).split()
    Path(name).write_bytes(damaged)
    try:
        before = tree(Path())
        with limits():
            result = run(*command)
        lines = result.stderr.splitlines()
        after = tree(Path())
        written = {path for path in after if path.startswith("out")}
        assert {path: after[path] for path in after.keys() - written} == before
        if result.exit_code == 0:
            assert all(line.startswith("Warning: ") for line in lines), lines
            assert written or "-o" not in command
            if written:
                check(command, sound)
        else:
            assert (result.exit_code, result.stdout, written) == (1, "", set()), (result.exit_code, lines)
            assert all(line.startswith("Warning: ") for line in lines[:-1]), lines
            assert lines[-1].startswith("Error: "), lines
        assert {path.name for path in Path().iterdir()} <= {path.name for path in sound.iterdir()} | {
            "out", "out.safetensors", "out.realera_edit.json", "out.realera_edit_undo.safetensors"
        }  # fmt: skip
        seen["done" if result.exit_code == 0 else "error"] += 1
    finally:
        Path(name).write_bytes(content)
        for path in Path().glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def cases(kind: str, count: int, sound: Path) -> Counter[str]:
    """Run so many cases; how they went."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def every(data: st.DataObject) -> None:
        meet(kind, data, sound, seen)

    every()
    assert seen.total() >= count, seen
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases_of_each_kind(kind: str, work: Path, sound: Path) -> None:
    cases(kind, SAMPLE, sound)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_cases_of_each_kind(kind: str, work: Path, sound: Path) -> None:
    seen = cases(kind, MANY, sound)
    # control: there was something to find, and something sound left
    assert seen["error"] > MANY // 10, seen
    assert seen["done"] > 0, seen


def test_there_are_as_many_cases_as_the_documentation_says() -> None:
    assert MANY * len(KINDS) >= 2000
    assert SAMPLE * len(KINDS) >= 50
