"""Kills, full and read-only disks, and two writers: the input is untouched, OUT is absent or whole, nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forking import run_script
from helpers import QUICK, tree

from realera_edit import edit_model
from realera_edit.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, mounts and forks of a POSIX system")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def add_ballast(model: Path) -> None:
    """Files that make a save slow enough to be hit in the middle."""
    (model / "extra").mkdir()
    for number in range(20):
        (model / "extra" / f"{number}.txt").write_text("x" * 1000)
    (model / "extra" / "large.dat").write_bytes(os.urandom(2**20) * 4)


class Forked(NamedTuple):
    """What `forked_saves.py` found, what it said on stderr, and the input before and after."""

    found: dict[str, Any]
    errors: str
    before: dict[str, str]
    after: dict[str, str]

    @property
    def whole(self) -> dict[str, Any]:
        """The state after a save that nothing disturbed."""
        return {"out": self.found["whole"], "beside": []}


@pytest.fixture(scope="module")
def forked(pristine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Forked:
    base = tmp_path_factory.mktemp("forked")
    model = shutil.copytree(pristine("sd1"), base / "model")
    add_ballast(model)
    before = tree(model)
    found, errors = run_script("forked_saves.py", model, base / "saves")
    return Forked(found, errors, before, tree(model))


def test_the_input_is_untouched_by_all_that_follows(forked: Forked) -> None:
    assert forked.after == forked.before
    assert set(forked.before) < set(forked.found["whole"])


def test_a_kill_at_20_random_moments(forked: Forked) -> None:
    runs = forked.found["kills"]
    for run in runs:
        assert run["after"]["out"] in (None, forked.found["whole"])
        assert run["next"] == forked.whole
    # control: many of the kills came in the middle, and left a half-written folder behind
    assert len(runs) == 20
    assert sum(run["status"] == -signal.SIGKILL and len(run["after"]["beside"]) == 1 for run in runs) >= 5


def test_a_kill_before_and_after_each_rename_over_an_old_folder(forked: Forked) -> None:
    seen = []
    for run in forked.found["renames"]:
        assert run["status"] == -signal.SIGKILL
        assert run["next"] == forked.whole
        out = run["after"]["out"]
        assert out in (None, forked.found["whole"]) or set(out) == {"model_index.json"}
        seen.append((out and len(out), len(run["after"]["beside"])))
    # out of the way, old one kept beside; in its place
    assert seen == [(1, 2), (None, 2), (None, 2), (len(forked.found["whole"]), 1)]


def test_two_writers_of_one_folder(forked: Forked) -> None:
    runs = forked.found["race"]
    assert [run["statuses"] for run in runs] == [[0, 1]] * 4
    assert all(run["after"] == forked.whole for run in runs)
    lines = [line for line in forked.errors.splitlines() if "/race/" in line]
    assert len(lines) == len(runs)
    assert all("another run has just written it" in line or "already exists" in line for line in lines)
    # control: they did meet in the middle
    assert any("another run has just written it" in line for line in lines)


def test_a_write_that_the_system_refuses_leaves_nothing(forked: Forked) -> None:
    assert forked.found["limited"] == [{"status": 1, "after": {"out": None, "beside": []}}]
    assert "out: cannot be written: File too large" in forked.errors


class Disk(NamedTuple):
    """A small file system of its own."""

    folder: Path
    remount: Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)

    if not ROOT or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        mount("size=24m")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no tmpfs here: {error.stderr.decode()}")
    yield Disk(folder, lambda options: mount(f"remount,{options}"))
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_too_small_is_seen_before_anything_is_written(sd1: Path, disk: Disk) -> None:
    result = edit_model(sd1, ["cat"], config=QUICK)
    disk.remount("size=1m")
    with pytest.raises(CheckpointError, match=r"disk: 0\.\d\d GB are needed and 0\.00 GB free; make room"):
        result.save(disk.folder / "out")
    assert not list(disk.folder.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(sd1: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    result = edit_model(sd1, ["cat"], config=QUICK)
    result.save(disk.folder / "out")
    before = tree(disk.folder)
    disk.remount(f"size={sum(p.stat().st_size for p in (disk.folder / 'out').rglob('*')) * 3 // 2 // 4096 * 4096}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
    for force in (False, True):
        with pytest.raises(CheckpointError, match="cannot be written: the disk is full; make room and run again"):
            result.save(disk.folder / ("out" if force else "other"), force=force)
        assert tree(disk.folder) == before
        assert [path.name for path in disk.folder.iterdir()] == ["out"]


def test_links_to_another_disk_are_copies(sd1: Path, disk: Disk) -> None:
    edit_model(sd1, ["cat"], config=QUICK).save(disk.folder / "out", link=True)
    assert {name: disk_hash for name, disk_hash in tree(disk.folder / "out").items() if name.startswith("vae")} == {
        f"vae/{name}": digest for name, digest in tree(sd1 / "vae").items()
    }


def test_a_read_only_disk_is_named(sd1: Path, disk: Disk) -> None:
    """As the place of the output it is an error; as the place of the input it is all the same to the edit."""
    shutil.copytree(sd1, disk.folder / "model")
    disk.remount("ro")
    result = edit_model(disk.folder / "model", ["cat"], config=QUICK)
    with pytest.raises(CheckpointError, match="out: cannot be written: the file system is read-only; choose another"):
        result.save(disk.folder / "out")
    result.save(sd1.parent / "out")
    assert tree(disk.folder / "model") == tree(sd1)
    disk.remount("rw")


@pytest.mark.skipif(ROOT, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="out: cannot be written: permission denied; choose an output"):
        edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "closed" / "out")


def test_sigterm_leaves_nothing(sd1: Path, tmp_path: Path) -> None:
    add_ballast(sd1)
    with open(sd1 / "extra" / "sparse.dat", "wb") as file:
        file.truncate(2**28)
    before = tree(sd1)
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-m", "realera_edit", "erase", str(sd1), "cat", "-o", str(place / "out"), "--quiet"]
    process = subprocess.Popen([*command, "--words", "0", "--prior-words", "60"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(place.iterdir()):
        time.sleep(0.002)
    assert any(".realera-" in path.name for path in place.iterdir())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors == ""
    assert not list(place.iterdir())
    assert tree(sd1) == before
