"""Where the output goes: never over anything, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK, UNET, tree

from realera_edit import edit_model, writer
from realera_edit.errors import CheckpointError
from realera_edit.provenance import RECORD, UNDO
from realera_edit.writer import staged


def save(model: Path, out: Path, **options: Any) -> Any:
    result = edit_model(model, ["cat"], config=QUICK)
    result.save(out, **options)
    return result


def stage(out: Path, write: Callable[[Path], object], force: bool = False, source: Path | None = None) -> None:
    """What `save` does, with `write` in place of the weights."""
    with staged(out, force=force, needed=0, source=source) as folder:
        write(folder)


def nothing_left(folder: Path) -> bool:
    return not any(".realera-" in path.name for path in folder.iterdir())


def test_an_existing_folder_needs_force(sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "model_index.json").touch()
    with pytest.raises(CheckpointError, match="out: already exists; choose another output, or replace it with --force"):
        save(sd1, out)
    assert tree(out).keys() == {"mine.txt", "model_index.json"}
    save(sd1, out, force=True)
    assert tree(out).keys() == tree(sd1).keys() | {RECORD, UNDO}
    assert nothing_left(tmp_path)


def test_force_replaces_models_alone(sd1: Path, tmp_path: Path) -> None:
    """A mistyped OUT must not cost a folder of something else; an empty one holds nothing to lose."""
    for name in ("photos", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"photos: holds files but no model .*--force replaces models alone"):
        save(sd1, tmp_path / "photos", force=True)
    assert tree(tmp_path / "photos").keys() == {"mine.txt"}
    save(sd1, tmp_path / "empty", force=True)
    save(sd1, tmp_path / "empty", force=True)
    assert nothing_left(tmp_path)


def test_a_failed_run_leaves_what_it_would_replace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "model_index.json").touch()

    def half(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage(out, half, force=True)
    assert tree(out).keys() == {"mine.txt", "model_index.json"}
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(5, "Input/output error", "out")])
@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupt_while_replacing_puts_the_old_folder_back(
    error: BaseException, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "model_index.json").touch()
    rename, calls = os.rename, iter(range(100))

    def failing(*paths: Any) -> None:
        if next(calls) == number:
            raise error
        rename(*paths)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((KeyboardInterrupt, SystemExit, CheckpointError)):
        stage(out, lambda folder: (folder / "new.txt").touch(), force=True)
    assert tree(out).keys() == {"mine.txt", "model_index.json"}
    assert nothing_left(tmp_path)


def test_an_old_folder_that_cannot_be_put_back_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "model_index.json").touch()
    rename, calls = os.rename, iter(range(100))

    def failing(*paths: Any) -> None:
        if next(calls) > 0:
            raise OSError(5, "Input/output error", "out")
        rename(*paths)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
        stage(out, lambda folder: (folder / "new.txt").touch(), force=True)
    assert [path.read_text() for path in tmp_path.rglob("mine.txt")] == ["mine"]


def test_a_file_or_a_link_is_never_replaced(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match=f"{name}: exists and is not a folder"):
            save(sd1, tmp_path / name, force=True)
    with pytest.raises(CheckpointError, match="file is a file, not a folder"):
        save(sd1, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()
    assert not tree(tmp_path / "elsewhere")


def test_the_input_is_never_the_output(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(tmp_path)
    monkeypatch.chdir(sd1)
    for out in (sd1, Path("."), Path("..") / "sd1", sd1 / "unet" / ".."):
        with pytest.raises(CheckpointError, match=r"is the input|is or lies in the input"):
            save(sd1, out, force=True)
    assert tree(tmp_path) == before


def test_the_output_neither_lies_in_the_input_nor_holds_it(sd1: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="lies in the input, which is never changed"):
        stage(sd1 / "new" / "out", pytest.fail, source=sd1)
    with pytest.raises(CheckpointError, match=r"holds the input .*, and cannot be replaced"):
        stage(tmp_path, pytest.fail, force=True, source=sd1)
    assert tree(tmp_path) == before
    assert not (sd1 / "new").exists()


def test_an_edit_neither_writes_into_its_input_nor_replaces_what_holds_it(sd1: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for out in (sd1 / "out", tmp_path):
        with pytest.raises(CheckpointError, match=r"lies in the input|holds the input"):
            save(sd1, out, force=True)
    assert tree(tmp_path) == before


def test_a_name_too_long_for_a_file(sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        save(sd1, tmp_path / ("a" * 300))


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def theirs(_: Path) -> None:
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")

    with pytest.raises(CheckpointError, match="another run has just written it"):
        stage(out, theirs)
    assert tree(out).keys() == {"theirs.txt"}
    assert nothing_left(tmp_path)


def test_new_parents_and_permissions(sd1: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(sd1, tmp_path / "deep" / "er" / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "deep" / "er" / "out").stat().st_mode & 0o777 == 0o750


def test_folders_of_killed_runs_are_removed_and_no_others(tmp_path: Path) -> None:
    stale = {".out.realera-abcd1234", ".out.realera-abcd1234efgh_678"}
    others = {".out.realera-notes", ".out.b.realera-abcd1234", ".out.realera-abcd1234.bak", "out.realera-abcd1234"}
    for name in stale | others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    stage(tmp_path / "out", lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == others | {"out"}


def test_the_folder_of_a_living_run_stays(tmp_path: Path) -> None:
    def second(alive: Path) -> None:
        stage(tmp_path / "out", lambda folder: (folder / "second.txt").write_text("second"))
        assert alive.exists()

    with pytest.raises(CheckpointError, match="another run has just written it"):
        stage(tmp_path / "out", second)
    assert tree(tmp_path / "out").keys() == {"second.txt"}
    assert nothing_left(tmp_path)


def test_what_a_killed_run_put_aside_stays_until_out_is_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.realera-abcd1234efgh5678"
    (aside / "old").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        stage(tmp_path / "out", lambda _: 1 / 0)
    assert (aside / "old").exists()
    stage(tmp_path / "out", lambda _: None)
    assert not aside.exists()


def test_links_save_space_and_never_share_a_small_file(sd1: Path, tmp_path: Path) -> None:
    save(sd1, tmp_path / "copy")
    save(sd1, tmp_path / "link", link=True)
    assert tree(tmp_path / "copy") == tree(tmp_path / "link")
    shared = {name for name in tree(sd1) if (sd1 / name).samefile(tmp_path / "link" / name)}
    assert shared == {name for name in tree(sd1) if name.endswith(".safetensors")} - {UNET}
    assert not any((sd1 / name).samefile(tmp_path / "copy" / name) for name in tree(sd1))


@pytest.mark.parametrize("moment", ["mkdir", "_lock"])
def test_a_signal_while_the_folder_is_made_leaves_nothing(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line's SIGTERM is a `SystemExit` wherever it comes; here, just after the folder has appeared."""
    own = os.mkdir

    def then_stop(path: Any, *rest: Any, **options: Any) -> None:
        if moment == "mkdir":
            own(path, *rest, **options)
        raise SystemExit(143)

    monkeypatch.setattr(*((os, "mkdir", then_stop) if moment == "mkdir" else (writer, "_lock", then_stop)))
    for staging in (writer.staged, writer.staged_file):
        with pytest.raises(SystemExit), staging(tmp_path / "out", force=False, needed=0):
            raise AssertionError("the block ran")
        assert not list(tmp_path.iterdir())


def test_links_need_no_room(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space that is asked for is what will be written, the originals for undo with it."""
    unet, vae = (sum(p.stat().st_size for p in (sd1 / part).iterdir()) for part in ("unet", "vae"))
    others = sum(p.stat().st_size for p in sd1.rglob("*") if p.is_file()) - unet - vae
    result = edit_model(sd1, ["cat"], config=QUICK)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 0, size))

    free(unet + others)
    result.save(tmp_path / "linked", link=True, undo=False)
    with pytest.raises(CheckpointError, match="GB are needed"):
        result.save(tmp_path / "copied", undo=False)
    free(unet + vae + others)
    result.save(tmp_path / "copied", undo=False)
    with pytest.raises(CheckpointError, match="GB are needed"):
        result.save(tmp_path / "undoable")
