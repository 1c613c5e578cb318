"""Forks that cannot hang, and the processes that make them.

A fork of a process with threads may wait for ever for a lock that one of them held. So the forks are made by scripts
that are kept at one thread: `run_script` sets the environment before any import, and `single_thread` does the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tqdm

from realera_edit import RealEraError

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_PATIENCE = 60  # seconds, of work that takes a fraction of one


def run_script(name: str, *arguments: Path) -> tuple[Any, str]:
    """The JSON object that a script beside this file prints, and what it and its children said on stderr."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / name), *map(str, arguments)]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Timeout (" not in done.stderr, done.stderr
    return json.loads(done.stdout), done.stderr


def single_thread() -> None:
    """What of the libraries would start a thread and is not set by the environment."""
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0


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
