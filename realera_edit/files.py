"""Files that appear whole or not at all, and copies made inside the kernel. Standard library only."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from .errors import CheckpointError

# File systems share whole blocks of this size between files, where they can, in place of copying them.
BLOCK = 4096
_STEP = 2**26
T = TypeVar("T")


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, sync, rename: `path` is absent, the old file, or the whole new one. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, inside the kernel (and by reference where the file system can)."""
    if not source.is_file():
        raise CheckpointError(f"{source}: not a regular file, or a broken link; remove or mend it")
    try:
        size = source.stat().st_size
        with open(source, "rb"):
            pass
    except OSError as error:  # an error in reading is not one in writing
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
    target.touch(exist_ok=False)
    copy_runs(source, target, [Run(0, size, 0)])


class Run(NamedTuple):
    """Bytes [start, stop) of one file, which go to place `at` of another."""

    start: int
    stop: int
    at: int


@contextlib.contextmanager
def copying(source: Path, target: Path, runs: Sequence[Run]) -> Iterator[None]:
    """`copy_runs` in a thread of its own while the block runs, which may write to other places of `target`.

    All runs are there when the block has ended well; when it ends with an error, the copying stops. Raises `OSError`.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            copied = pool.submit(copy_runs, source, target, runs, stopped)
            yield
            copied.result()
        finally:
            stopped.set()


def copy_runs(source: Path, target: Path, runs: Sequence[Run], stopped: threading.Event | None = None) -> None:
    """Copy byte ranges of `source` to places of `target`, which exists, until `stopped`.

    Where both ends of a run are the same number of bytes from a whole `BLOCK`, the file system may share blocks in
    place of copying them. Raises `OSError`.
    """
    with open(source, "rb", buffering=0) as src, open(target, "r+b", buffering=0) as dst:
        for run in runs:
            start = run.start
            while start < run.stop and not (stopped and stopped.is_set()):
                step = BLOCK - start % BLOCK if start % BLOCK else _STEP  # only whole blocks can be shared
                at = run.at + start - run.start
                count = _copy_some(src.fileno(), dst.fileno(), start, at, min(run.stop - start, step))
                _write_back(dst.fileno(), at, count)
                start += count


def _copy_some(src: int, dst: int, start: int, at: int, count: int) -> int:
    """Copy up to `count` bytes from place `start` of `src` to place `at` of `dst`; how many it were."""
    done = 0
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # across file systems on old kernels; a full disk shows again in write()
            done = os.copy_file_range(src, dst, count, start, at)
    if done == 0:
        os.lseek(src, start, os.SEEK_SET)
        os.lseek(dst, at, os.SEEK_SET)
        data = os.read(src, min(count, 2**22))
        if not data:
            raise OSError("the file ended while it was copied")
        view = memoryview(data)
        while view:
            view = view[os.write(dst, view) :]
        done = len(data)
    return done


def _write_back(handle: int, start: int, count: int) -> None:
    """Let the disk begin with what was just written, so that the last sync has little left to wait for."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice, which not every file system takes
            os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each of which is made in a thread of its own while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        last = object()
        waiting = pool.submit(next, items, last)
        while (item := waiting.result()) is not last:
            waiting = pool.submit(next, items, last)
            yield item  # type: ignore[misc]  # no item is `last`
