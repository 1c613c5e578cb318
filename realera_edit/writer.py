"""Write an edited folder: beside its place first, synced, then renamed, so that OUT is absent or whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from .errors import CheckpointError, SolveError
from .files import copy_file
from .folder import walk
from .tensorfile import TensorFile, all_finite, to_bytes

if sys.platform != "win32":  # there, folders of killed runs are left for the user
    import fcntl

GROUP_ELEMENTS = 32 * 2**20
MARKS = ("model_index.json", "realera_edit.json")  # a folder with one of them is a model: --force may replace it


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(to_bytes(tensor)).hexdigest()


@contextlib.contextmanager
def staged(out: Path, *, force: bool, needed: int, source: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    `needed`: bytes that will be written, checked against the free space first. `source`: the folder that is read,
    which `out` may neither be, hold, nor lie in. A folder that a killed run left behind is removed: its lock is
    free. Raises `CheckpointError` where `out` exists (without `force`; with it, where it holds files but no model),
    cannot be written, or appears meanwhile.
    """
    parent = out.absolute().parent
    prefix = f".{out.name}.realera-"
    try:
        _check_place(out, parent, force, source)
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent, prefix, out)
        _check_space(parent, needed)
        with _own_folder(parent, prefix) as temporary:
            yield temporary
            _sync(temporary)
            _publish(temporary, out, force)
        _sync_folder(parent)
        with contextlib.suppress(OSError):  # OUT is whole: what a killed run had put aside is of no more use
            _remove_stale(parent, prefix, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {_explain(error)}") from error


@contextlib.contextmanager
def staged_file(
    out: Path, *, force: bool, needed: int, publish: Callable[[Path, Path, bool], None] | None = None
) -> Iterator[Path]:
    """A path in a temporary folder beside `out`; what is written there becomes the file `out` when the block ends well.

    As `staged`, for one file: OUT is absent, the old file, or the whole new one. `publish` (in place of `publish_file`)
    may put further files of the temporary folder beside it. Raises `CheckpointError`.
    """
    parent = out.absolute().parent
    prefix = f".{out.name}.realera-"
    try:
        if out.is_symlink() or (out.exists() and not out.is_file()):
            raise CheckpointError(f"{out}: exists and is not a file; choose another output")
        _check_free(out, parent, force)
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent, prefix, out)
        _check_space(parent, needed)
        with _own_folder(parent, prefix) as temporary:
            path = temporary / out.name
            yield path
            _sync(temporary)
            (publish or publish_file)(path, out, force)
        _sync_folder(parent)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {_explain(error)}") from error


def _check_place(out: Path, parent: Path, force: bool, source: Path | None) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out}: exists and is not a folder; choose another output")
    if source is not None:
        check_outside(out, source)
        here, there = out.absolute().resolve(), source.resolve()
        if here in there.parents and out.exists():
            raise CheckpointError(f"{out}: holds the input {source}, and cannot be replaced; choose another output")
    _check_free(out, parent, force)
    if out.is_dir() and any(out.iterdir()) and not any((out / mark).exists() for mark in MARKS):
        raise CheckpointError(
            f"{out}: holds files but no model ({MARKS[0]} or {MARKS[1]}), and --force replaces models alone; choose "
            "another output, or remove it yourself"
        )


def check_outside(out: Path, source: Path) -> None:
    """Raise `CheckpointError` where `out` is the input `source`, or lies in it."""
    here, there = out.absolute().resolve(), source.resolve()
    if here == there or there in here.parents:
        raise CheckpointError(f"{out}: is or lies in the input, which is never changed; choose another output")


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"{parent}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free; make room")


def _check_free(out: Path, parent: Path, force: bool) -> None:
    if out.exists() and not force:
        raise CheckpointError(f"{out}: already exists; choose another output, or replace it with --force")
    for folder in (parent, *parent.parents):
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{out}: {folder} is a file, not a folder; choose another output")


def _explain(error: OSError) -> str:
    hints = {
        errno.ENOSPC: "the disk is full; make room and run again",
        errno.EDQUOT: "the disk quota is used up; make room and run again",
        errno.EROFS: "the file system is read-only; choose another output",
        errno.EACCES: "permission denied; choose an output that you may write",
        errno.EPERM: "permission denied; choose an output that you may write",
        errno.ENOTEMPTY: "another run has just written it; choose another output, or use --force",
        errno.EEXIST: "another run has just written it; choose another output, or use --force",
    }
    return hints.get(error.errno or 0, f"{error.strerror or error} ({error.filename})")


def _publish(temporary: Path, out: Path, force: bool) -> None:
    os.chmod(temporary, 0o777 & ~_umask())
    if force and out.exists():
        # the old folder steps aside under our own prefix, where the next run finds it should we be killed here
        aside = Path(tempfile.mkdtemp(prefix=temporary.name, dir=temporary.parent))
        old = aside / "old"
        try:
            os.rename(out, old)
            os.rename(temporary, out)
        except BaseException:  # an interrupt, too
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
        finally:
            if out.exists() or not old.exists():
                shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, out)


def publish_file(path: Path, out: Path, force: bool) -> None:
    """Move the whole file `path` to `out`; without `force` never over a file that is there."""
    if not force:
        try:
            os.link(path, out)  # unlike a rename, this never replaces a file that has appeared meanwhile
            return
        except FileExistsError:
            raise
        except OSError:  # the file system has no hard links
            if out.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out)) from None
    os.replace(path, out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _own_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new temporary folder, gone after the block; locked meanwhile, so that no other run takes it for a stale one."""
    folder: Path | None = None
    handle = None
    try:
        while handle is None:
            # named before it is made: a signal that comes between the two must not leave it behind
            folder = parent / f"{prefix}{secrets.token_hex(4)}"
            try:
                folder.mkdir(0o700)
            except FileExistsError:  # another run's, by chance
                folder = None
                continue
            if sys.platform == "win32":
                break
            handle = _lock(folder)  # None: a run that started just now found it before it was locked
        assert folder is not None
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """The handle that holds the lock of `folder`, or None where another process has removed it meanwhile."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # not every network file system has locks; nobody then removes anything
        fcntl.flock(handle, fcntl.LOCK_EX)
    if folder.exists():
        return handle
    os.close(handle)
    return None


def _remove_stale(parent: Path, prefix: str, out: Path) -> None:
    if sys.platform == "win32":
        return
    # one random name, or two for a folder that stepped aside: never another OUT's, whatever its name
    ours = re.compile(re.escape(prefix) + "([a-z0-9_]{8}){1,2}")
    for folder in parent.iterdir():
        if not ours.fullmatch(folder.name):
            continue
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run killed between two renames leaves the only copy of the old folder here
            if out.exists() or not (folder / "old").exists():
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its writer is alive
            pass
        finally:
            os.close(handle)


def _sync(folder: Path) -> None:
    for path, _ in walk(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for current, _, _ in os.walk(folder):
        _sync_folder(Path(current))


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # folders cannot be opened there
        return
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder, some folders cannot be listed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_size(root: Path, out: Path, skip: set[Path], link: bool) -> int:
    """Bytes that `copy_rest` will write; what it will refuse to copy counts for nothing."""
    near = next(folder for folder in out.absolute().parents if folder.exists())
    disk = near.stat().st_dev
    stats = ((path, path.stat()) for path, _ in walk(root) if path not in skip and path.is_file())
    return sum(s.st_size for path, s in stats if not (link and path.suffix == ".safetensors" and s.st_dev == disk))


def copy_rest(root: Path, out: Path, skip: set[Path], link: bool, progress: bool) -> None:
    """Copy every file below `root` but those in `skip` (absolute), following links; with `link`, hard-link weights.

    Small files are always copied: an editor that saves a linked file in place would change the original too.
    """
    files = [(path, relative) for path, relative in walk(root) if path not in skip]
    for path, relative in tqdm(files, desc="copying", unit="file", delay=1, leave=False, disable=not progress):
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if link and path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), target)
                continue
            except OSError:  # another file system
                pass
        copy_file(path, target)


def edited_tensors(
    file: TensorFile,
    names: Sequence[str],
    product: Callable[[list[str], list[Tensor]], list[Tensor]],
    hashes: dict[str, dict[str, str]],
) -> Iterator[tuple[str, Tensor]]:
    """Read the named tensors of `file` in groups, edit each group at once, and yield (name, new tensor).

    `hashes` receives name -> {"before": ..., "after": ...}. Raises `SolveError` where a result overflows its dtype.
    """
    start = 0
    while start < len(names):
        stop, size = start, 0
        while stop < len(names) and (stop == start or size < GROUP_ELEMENTS):
            shape = file.entries[names[stop]].shape
            size += shape[0] * shape[1]
            stop += 1
        group = list(names[start:stop])
        weights = [file.read(name) for name in group]
        for name, old, new in zip(group, weights, product(group, weights), strict=True):
            if not all_finite(new):
                raise SolveError(f"{file.path}: the edited {name} overflows {new.dtype}; raise ridge or lower strength")
            hashes[name] = {"before": digest(old), "after": digest(new)}
            yield name, new
        start = stop
