"""Copies inside the kernel: every byte in its place, shared blocks where the file system has them, stopped at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import QUICK
from safetensors.torch import load_file, save_file

from realera_edit import edit_model, files
from realera_edit.errors import CheckpointError
from realera_edit.files import BLOCK, Run, ahead, copy_file, copying
from realera_edit.tensorfile import open_tensors, rewrite

DATA = os.urandom(5 * BLOCK + 123)
RUNS = [(0, 10), (100, BLOCK), (BLOCK + 1, BLOCK + 1), (BLOCK + 7, 3 * BLOCK - 1), (4 * BLOCK, len(DATA))]


@pytest.fixture(params=["kernel", "refused", "absent"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel's own copying, one that refuses, and a system that has none, nor advice."""
    if request.param == "refused":

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "across file systems")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
        monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    if request.param == "absent":
        for name in ("copy_file_range", "posix_fadvise"):
            monkeypatch.delattr(os, name, raising=False)
    return str(request.param)


@pytest.mark.parametrize("shift", [0, 3, BLOCK])
def test_runs_are_copied_and_nothing_else(
    kernel: str, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_STEP", 2 * BLOCK)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(DATA)
    target.write_bytes(b"h" * shift)
    with (
        copying(source, target, [Run(start, stop, start + shift) for start, stop in RUNS]),
        open(target, "r+b") as file,
    ):
        file.seek(shift + 3 * BLOCK)
        file.write(b"mine")
    wanted = bytearray(len(DATA))
    wanted[3 * BLOCK : 3 * BLOCK + 4] = b"mine"
    for start, stop in RUNS:
        wanted[start:stop] = DATA[start:stop]
    assert target.read_bytes() == b"h" * shift + wanted
    assert source.read_bytes() == DATA


def test_a_file_is_copied_whole_and_never_over_another(kernel: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    copy_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA
    (tmp_path / "empty").touch()
    copy_file(tmp_path / "empty", tmp_path / "nothing")
    assert (tmp_path / "nothing").read_bytes() == b""
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "empty", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA


def test_what_goes_wrong_in_the_thread_is_raised(kernel: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    (tmp_path / "target").touch()
    with (
        pytest.raises(OSError, match="the file ended while it was copied"),
        copying(tmp_path / "source", tmp_path / "target", [Run(0, len(DATA) + 1, 0)]),
    ):
        pass


def test_an_interrupt_stops_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def slow(*args: int) -> int:
        copied.append(args[-1])
        time.sleep(0.02)
        return 1

    monkeypatch.setattr(files, "_copy_some", slow)
    for name in ("source", "target"):
        (tmp_path / name).touch()
    with pytest.raises(KeyboardInterrupt), copying(tmp_path / "source", tmp_path / "target", [Run(0, 10**6, 0)]):
        raise KeyboardInterrupt
    count = len(copied)
    assert count < 10
    time.sleep(0.1)
    assert len(copied) == count  # the thread has ended, and holds no file that is to be removed


@pytest.fixture
def sharing_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system that shares blocks between files."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None:
        pytest.skip("needs mkfs.btrfs and the right to mount its file system")
    with open(image, "wb") as file:
        file.truncate(2**28)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no btrfs here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_where_the_file_system_shares_blocks_an_edit_takes_no_room(single: Path, sharing_disk: Path) -> None:
    ballast = {"ballast": torch.randint(2**62, (5 * 2**20,))}  # 40 MiB that no edit touches
    save_file(load_file(single) | ballast, sharing_disk / "model.safetensors")
    os.sync()
    before = shutil.disk_usage(sharing_disk).free
    result = edit_model(sharing_disk / "model.safetensors", ["cat"], tokenizer=single.parent / "folder", config=QUICK)
    result.save(sharing_disk / "out.safetensors")
    os.sync()
    assert before - shutil.disk_usage(sharing_disk).free < 2**23
    assert torch.equal(load_file(sharing_disk / "out.safetensors")["ballast"], ballast["ballast"])
    (sharing_disk / "copy").write_bytes((sharing_disk / "out.safetensors").read_bytes())
    os.sync()
    assert before - shutil.disk_usage(sharing_disk).free > 40 * 2**20  # control: a plain copy does take room


@pytest.mark.parametrize("names", [[], ["b"], ["c", "a"], ["a", "b", "c", "none"]])
def test_a_rewritten_file_differs_in_the_tensors_that_were_named(names: list[str], tmp_path: Path) -> None:
    tensors = {name: torch.randn(size) for name, size in (("a", 1000), ("b", 3), ("c", 5000), ("none", 0))}
    save_file(tensors, tmp_path / "source", {"of": "old"})
    file = open_tensors(tmp_path / "source")
    rewrite(file, tmp_path / "target", {"x": "y" * 5000}, names, ((name, -tensors[name]) for name in names))
    new = open_tensors(tmp_path / "target")
    assert new.metadata == {"of": "old", "x": "y" * 5000}
    assert new.entries == file.entries
    assert new.offset % BLOCK == file.offset % BLOCK  # so that blocks can be shared
    assert {name for name in tensors if not torch.equal(new.read(name), tensors[name])} == set(names) - {"none"}
    assert all(torch.equal(new.read(name), -tensors[name]) for name in names)


def test_a_tensor_that_is_not_given_or_does_not_fit_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "source")
    file = open_tensors(tmp_path / "source")
    with pytest.raises(CheckpointError, match="one: b was to be replaced, and nothing was given for it"):
        rewrite(file, tmp_path / "one", {}, ["a", "b"], iter([("a", torch.ones(3))]))
    with pytest.raises(CheckpointError, match="two: a is F32"):
        rewrite(file, tmp_path / "two", {}, ["a"], iter([("a", torch.ones(4))]))


def test_items_are_made_ahead_in_order_and_errors_come_in_their_place() -> None:
    made: list[int] = []

    def numbers(stop: int) -> Iterator[int]:
        for number in range(stop):
            made.append(number)
            yield number
        if stop == 3:
            raise CheckpointError("damaged")

    assert list(ahead(numbers(50))) == list(range(50))
    assert list(ahead(numbers(0))) == []
    made.clear()
    items = ahead(numbers(3))
    assert [next(items) for _ in range(3)] == made == [0, 1, 2]
    with pytest.raises(CheckpointError, match="damaged"):
        next(items)
