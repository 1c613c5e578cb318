"""Run by `test_interruption.py` in a process of its own: one edit, then many saves of it in forked children.

    python forked_saves.py MODEL BASE

prints one JSON object. A fork per save, since importing the libraries takes seconds and a save a fraction of one.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import tqdm
from forking import child, prepare, wait
from helpers import QUICK, tree

from realera_edit import edit_model

KILLS = 20
ROUNDS = 4


def state(out: Path) -> dict[str, Any]:
    """What lies at OUT, and what beside it."""
    parent = out.parent
    beside = sorted(path.name for path in parent.iterdir() if path != out) if parent.exists() else []
    return {"out": tree(out) if out.exists() else None, "beside": beside}


def kills(result: Any, base: Path) -> list[dict[str, Any]]:
    """Saves killed at random moments, what each left behind, and what the next save makes of it."""
    start = time.perf_counter()
    result.save(base / "timed" / "out")
    duration = time.perf_counter() - start
    dice = random.Random(0)
    found = []
    wait(child(lambda: (tqdm.tqdm.get_lock().acquire(), os.kill(os.getpid(), signal.SIGKILL))))  # at the worst moment
    for number in range(KILLS):
        out = base / str(number) / "out"
        process = child(lambda out=out: result.save(out))
        time.sleep(dice.uniform(0, 1.1 * duration))
        os.kill(process, signal.SIGKILL)
        status = wait(process)
        after = state(out)
        result.save(out, force=True)
        found.append({"status": status, "after": after, "next": state(out)})
    return found


def renames(result: Any, base: Path) -> list[dict[str, Any]]:
    """Saves over an existing OUT, killed just before and just after each rename."""
    found = []
    for number in range(4):
        out = base / str(number) / "out"
        out.mkdir(parents=True)
        (out / "model_index.json").write_text("old")
        process = child(lambda n=number, out=out: (_kill_at_rename(n), result.save(out, force=True)))
        status = wait(process)
        after = state(out)
        result.save(out, force=True)
        found.append({"status": status, "after": after, "next": state(out)})
    return found


def _kill_at_rename(number: int) -> None:
    rename, calls = os.rename, iter(range(100))

    def fatal(*paths: Any) -> None:
        if next(calls) < number // 2:
            rename(*paths)
            return
        if number % 2:
            rename(*paths)
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = fatal


def race(result: Any, base: Path) -> list[dict[str, Any]]:
    """Two saves to one OUT that start at the same time."""
    found = []
    for number in range(ROUNDS):
        out = base / str(number) / "out"
        ready, go = os.pipe()
        processes = [child(lambda out=out, ready=ready: (os.read(ready, 1), result.save(out))) for _ in range(2)]
        os.write(go, b"!!")
        statuses = sorted(wait(process) for process in processes)
        os.close(ready)
        os.close(go)
        found.append({"statuses": statuses, "after": state(out)})
    return found


def limited(result: Any, base: Path) -> list[dict[str, Any]]:
    """A save that may write no file of more than a megabyte: the system refuses in the middle of a weight file."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        result.save(base / "out")

    status = wait(child(work))
    return [{"status": status, "after": state(base / "out")}]


def main(model: str, base: str) -> None:
    prepare()
    result = edit_model(model, ["cat"], config=QUICK)
    Path(base).mkdir(exist_ok=True)
    result.save(Path(base) / "whole")
    found = {work.__name__: work(result, Path(base) / work.__name__) for work in (kills, renames, race, limited)}
    print(json.dumps({"whole": tree(Path(base) / "whole"), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
