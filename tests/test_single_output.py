"""Where an edited single file goes, what lies beside it, and the way back: whole or not at all, to the bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_moves import MOVES, OUT, interrupt_moves
from forking import run_script
from helpers import header, split_file, tensor_bytes, tree, write_file
from single_models import SHAPES, erase

from realera_edit import RealEraWarning, inspect_path, undo_file
from realera_edit.errors import CheckpointError
from realera_edit.provenance import METADATA_KEY

Build = Callable[..., Path]
RECORD, UNDO = "out.realera_edit.json", "out.realera_edit_undo.safetensors"


@pytest.fixture(scope="module")
def result(pristine_single: Build) -> Any:
    """One edit of one file, to be saved in many ways."""
    return erase(pristine_single("tiny-sd15") / "model.safetensors")


@pytest.fixture(scope="module")
def other(pristine_single: Build) -> Any:
    return erase(pristine_single("tiny-sd15") / "model.safetensors", concept="dog")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written(result: Any, tmp_path: Path) -> None:
    assert result.save(tmp_path / OUT) == tmp_path / OUT
    assert names(tmp_path) == {OUT, RECORD, UNDO}
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert record == result.to_dict()
    assert inspect_path(tmp_path / OUT) == {**record, "undo": True}
    original = tensor_bytes(result.source.root)
    assert tensor_bytes(tmp_path / UNDO) == {
        f"model.safetensors::{n}": original[n] for n in record["tensors"][result.source.root.name]
    }
    result.save(tmp_path / "v1.5-b.safetensors", undo=False)
    assert names(tmp_path) == {OUT, RECORD, UNDO, "v1.5-b.safetensors", "v1.5-b.realera_edit.json"}
    assert tensor_bytes(tmp_path / "v1.5-b.safetensors") == tensor_bytes(tmp_path / OUT)


def test_without_its_record_the_header_tells(result: Any, other: Any, tmp_path: Path) -> None:
    result.save(tmp_path / OUT)
    (tmp_path / RECORD).unlink()
    assert [c["name"] for c in inspect_path(tmp_path / OUT)["concepts"]] == ["cat"]
    other.save(tmp_path / "b.safetensors")
    shutil.copy(tmp_path / "b.realera_edit.json", tmp_path / RECORD)
    with pytest.warns(RealEraWarning, match=rf"{RECORD}: is the record of another edit than that of {OUT}"):
        assert [c["name"] for c in inspect_path(tmp_path / OUT)["concepts"]] == ["cat"]
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{RECORD}: is damaged"):
        inspect_path(tmp_path / OUT)


def test_an_existing_output_needs_force_and_goes_with_all_that_is_its_own(
    result: Any, other: Any, tmp_path: Path
) -> None:
    other.save(tmp_path / OUT)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"out.*: already exists.*--force"):
        result.save(tmp_path / OUT)
    assert tree(tmp_path) == before
    result.save(tmp_path / OUT, force=True, undo=False)
    assert names(tmp_path) == {OUT, RECORD}
    assert inspect_path(tmp_path / OUT)["undo"] is False
    (tmp_path / OUT).unlink()
    with pytest.raises(CheckpointError, match=rf"{RECORD}: already exists, and belongs to another edit"):
        result.save(tmp_path / OUT)
    assert names(tmp_path) == {RECORD}


def test_places_that_are_refused(result: Any, single: Path, tmp_path: Path) -> None:
    mine = erase(single)
    os.link(single, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(single)
    (tmp_path / "there.safetensors").mkdir()
    before = tree(tmp_path)
    cases = {
        single: "model.safetensors: is the input, which is never changed",
        tmp_path / "folder" / ".." / "model.safetensors": "is the input",
        tmp_path / "hard.safetensors": "is the input",
        tmp_path / "soft.safetensors": "is the input",
        tmp_path / "there.safetensors": "exists and is not a file",
        tmp_path / "out": r"out: the output of a single file is one, too; give it a name that ends in \.safetensors",
        single / "a.safetensors": "is a file, not a folder",
    }
    for out, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            mine.save(out, force=True)
    with pytest.raises(CheckpointError, match="nothing can be hard-linked; leave --link out"):
        mine.save(tmp_path / OUT, link=True)
    shutil.copy(single, tmp_path / UNDO)
    with pytest.raises(CheckpointError, match=f"{UNDO}: is the input"):
        erase(tmp_path / UNDO, tokenizer=tmp_path / "folder").save(tmp_path / OUT, force=True)
    (tmp_path / UNDO).unlink()
    assert tree(tmp_path) == before


# Interruption


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_a_move_that_fails_leaves_all_as_it_was(
    number: int, force: bool, result: Any, other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        other.save(tmp_path / OUT)
    before = tree(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    interrupt_moves(number, interrupt, monkeypatch.setattr)
    if number >= MOVES["over" if force else "new"]:
        result.save(tmp_path / OUT, force=force)
        return
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / OUT, force=force)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def forked(pristine_single: Build, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = pristine_single("tiny-sd15") / "model.safetensors"
    return run_script("forked_moves.py", model, tmp_path_factory.mktemp("forked"))[0]


@pytest.mark.skipif(sys.platform == "win32", reason="forks and signals of a POSIX system")
@pytest.mark.parametrize("kind", MOVES)
def test_a_kill_before_each_move(kind: str, forked: Any) -> None:
    """OUT is absent, the old one or the new one; the next run with --force ends with the new one and nothing else."""
    assert len(forked[kind]) == MOVES[kind]
    assert forked["result"][OUT] != forked["other"][OUT]
    for run in forked[kind]:
        assert run["status"] == -signal.SIGKILL
        assert run["after"].get(OUT) == (forked["other"][OUT] if kind == "over" else None)
        # control: it was killed with the work done, before the file was in its place
        assert any(".realera-" in path for path in run["after"])
        assert run["next"] == forked["result"]


def test_a_disk_that_is_full_leaves_nothing(result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 990, 10))
        with pytest.raises(CheckpointError, match=r"0\.\d\d GB are needed and 0\.00 GB free; make room"):
            result.save(tmp_path / OUT)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("realera_edit.files._copy_some", "realera_edit.single_output.write_undo"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(CheckpointError, match=r"out\.safetensors: cannot be written: the disk is full"):
                result.save(tmp_path / OUT)
    assert not names(tmp_path)


def test_all_is_on_the_disk_before_it_is_in_its_place(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    at_first_move: list[list[int]] = []
    sync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(os, "link", lambda *paths: (at_first_move.append(list(done)), link(*paths)))
    result.save(tmp_path / OUT)
    assert {path.stat().st_ino for path in tmp_path.iterdir()} <= set(at_first_move[0])
    assert tmp_path.stat().st_ino in done  # the folder, for the names


def test_an_output_that_appears_meanwhile_is_not_replaced(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from realera_edit import single_output

    write = single_output.write_undo

    def late(*args: Any) -> None:
        write(*args)
        (tmp_path / OUT).write_text("mine")

    monkeypatch.setattr(single_output, "write_undo", late)
    with pytest.raises(CheckpointError, match="another run has just written it"):
        result.save(tmp_path / OUT)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {OUT: "mine"}


# The way back


@pytest.mark.parametrize("shape", SHAPES)
def test_undo_restores_each_byte_of_each_tensor(shape: str, pristine_single: Build, tmp_path: Path) -> None:
    model = pristine_single(shape) / "model.safetensors"
    erase(model, tmp_path / OUT)
    edited = tree(tmp_path)
    assert undo_file(tmp_path / OUT, tmp_path / "back.safetensors") == tmp_path / "back.safetensors"
    assert tensor_bytes(tmp_path / "back.safetensors") == tensor_bytes(model) != tensor_bytes(tmp_path / OUT)
    assert list(tensor_bytes(tmp_path / "back.safetensors")) == list(tensor_bytes(model))
    (tmp_path / "back.safetensors").rename(tmp_path / "b")
    assert {name: digest for name, digest in tree(tmp_path).items() if name != "b"} == edited
    metadata = header(tmp_path / "b")["__metadata__"]
    assert json.loads(metadata.pop(METADATA_KEY))["undone"] is True
    assert metadata == header(model)["__metadata__"]


def test_files_that_are_renamed_together_stay_together(result: Any, tmp_path: Path) -> None:
    result.save(tmp_path / OUT)
    for name in (OUT, RECORD, UNDO):
        (tmp_path / name).rename(tmp_path / name.replace("out.", "mine."))
    undo_file(tmp_path / "mine.safetensors", tmp_path / "back.safetensors")
    assert tensor_bytes(tmp_path / "back.safetensors") == tensor_bytes(result.source.root)


def test_undo_refuses_what_it_cannot_vouch_for(result: Any, other: Any, tmp_path: Path) -> None:
    result.save(tmp_path / OUT)
    other.save(tmp_path / "b.safetensors")
    back = tmp_path / "back.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            undo_file(tmp_path / OUT, back)
        assert not back.exists()

    sound = {name: (tmp_path / name).read_bytes() for name in (OUT, RECORD, UNDO)}
    for name in (RECORD, UNDO):
        (tmp_path / name).unlink()
        refused(rf"its {name} is not beside it: it was saved without \(--no-undo\), moved, or deleted")
        (tmp_path / name).write_bytes(sound[name])
    key = next(iter(result.tensors["model.safetensors"]))
    for name, stored in ((OUT, key), (UNDO, f"model.safetensors::{key}")):
        head, (_, data) = header(tmp_path / name), split_file(tmp_path / name)
        at = head[stored]["data_offsets"][0]
        write_file(tmp_path / name, head, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refused("is not as the edit left it" if name == OUT else "the original of .* is damaged")
        (tmp_path / name).write_bytes(sound[name])
    record = json.loads(sound[RECORD])
    for change, message in (
        ({"tensors": {}}, f"{RECORD}: is damaged: it tells of 0 files"),
        ({"tensors": {"../../etc": record["tensors"]["model.safetensors"]}}, "which is outside of its folder"),
        ({"tensors": {"model.safetensors": {}}}, f"{UNDO}: .* is not among the tensors that {RECORD} names"),
    ):
        (tmp_path / RECORD).write_text(json.dumps({**record, **change}))
        refused(message)
    (tmp_path / RECORD).write_bytes(sound[RECORD])
    shutil.copy(tmp_path / "b.realera_edit_undo.safetensors", tmp_path / UNDO)
    undo_file(tmp_path / OUT, back)  # of the same model, so the originals are the same
    with pytest.raises(CheckpointError, match=r"back\.safetensors: already exists"):
        undo_file(tmp_path / OUT, back)
    with pytest.raises(CheckpointError, match="is the input"):
        undo_file(tmp_path / OUT, tmp_path / OUT, force=True)
