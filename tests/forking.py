"""Forks that cannot hang, and the processes that make them.

A fork of a process with threads may wait for ever for a lock that one of them held. So the forks are made by scripts
that are kept at one thread: `run_script` sets the environment before any import, and `prepare` does the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tqdm

from realera_edit import RealEraError

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_PATIENCE = 60  # seconds, of work that takes a fraction of one
_LIMIT = 300  # seconds, for a whole script, of work that takes ten


def run_script(name: str, *arguments: Path) -> tuple[Any, str]:
    """The JSON object that a script beside this file prints, and what it and its children said on stderr."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / name), *map(str, arguments)]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(here.parent)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            printed, errors = process.communicate(timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # on which it prints where it stands: see `prepare`
            printed, errors = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 0, errors
    assert "Timeout (" not in errors, errors
    return json.loads(printed), errors


def prepare() -> None:
    """One thread, no lock that a killed child can keep, no wait for the disk, and a traceback for a script that hangs.

    By default the children share the lock of tqdm's bars with their parent: who was killed while it held the lock made
    everybody else wait for ever. Of two thousand syncs nothing is lost, as what a killed process has written is there
    for the others whether it was synced or not.
    """
    faulthandler.enable()
    torch.set_num_threads(1)  # as the environment does not reach all that would start one
    tqdm.tqdm.monitor_interval = 0
    tqdm.tqdm.set_lock(threading.RLock())
    os.fsync = lambda _: None


def child(work: Callable[[], object]) -> int:
    """Start `work` in a child; exit status 0 when it ends, 1 for one of our own errors, 2 for any other.

    A child that hangs ends after a minute and prints where it stood.
    """
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) != 1:
        raise RuntimeError(f"a fork of {len(list(tasks.iterdir()))} threads")
    process = os.fork()
    if process:
        return process
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    code = 2
    try:
        work()
        code = 0
    except RealEraError as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """0, 1 or 2 as `child` says; negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
