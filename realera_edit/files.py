"""Files that appear whole or not at all, and copies made inside the kernel. Standard library only."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import CheckpointError

# File systems share whole blocks of this size between files, where they can, in place of copying them.
BLOCK = 4096
_STEP = 2**26


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
    _copy_runs(source, target, [(0, size)], 0, threading.Event())


@contextlib.contextmanager
def copying(source: Path, target: Path, runs: Sequence[tuple[int, int]], shift: int) -> Iterator[None]:
    """Copy bytes [start, stop) of `source` to `shift` places later in `target`, while the block runs.

    All runs are there when the block has ended well. `target` exists; the block may write to other places of it. Where
    `shift` is a multiple of `BLOCK`, the file system may share the blocks in place of copying them. Raises `OSError`.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            copied = pool.submit(_copy_runs, source, target, runs, shift, stopped)
            yield
            copied.result()
        finally:
            stopped.set()


def _copy_runs(
    source: Path, target: Path, runs: Sequence[tuple[int, int]], shift: int, stopped: threading.Event
) -> None:
    with open(source, "rb", buffering=0) as src, open(target, "r+b", buffering=0) as dst:
        for start, stop in runs:
            at = start
            while at < stop and not stopped.is_set():
                step = BLOCK - at % BLOCK if at % BLOCK else _STEP  # only whole blocks can be shared
                count = _copy_some(src.fileno(), dst.fileno(), at, at + shift, min(stop - at, step))
                _write_back(dst.fileno(), at + shift, count)
                at += count


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
