"""Run by `test_single_output.py` in a process of its own: saves of an edited single file, killed before each move.

    python forked_moves.py MODEL BASE

prints one JSON object: for a new OUT and for one over an old file, what lay there after each kill and after the next
save.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forking import child, prepare, wait
from helpers import tree
from single_models import erase

OUT = "out.safetensors"
MOVES = {"new": 3, "over": 5}


def interrupt_moves(number: int, by: Callable[[], object], patch: Callable[[Any, str, Any], None]) -> None:
    """Call `by` in place of the link or rename of this number, counted over all of them."""
    calls = iter(range(100))
    for name in ("link", "rename", "replace"):
        move = getattr(os, name)

        def counted(*paths: Any, move: Any = move) -> None:
            if next(calls) == number:
                by()
            move(*paths)

        patch(os, name, counted)


def killed(result: Any, old: Path, place: Path, number: int, force: bool) -> dict[str, Any]:
    """One save killed before move `number`, and the save after it."""
    if force:
        shutil.copytree(old, place)

    def work() -> None:
        interrupt_moves(number, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
        result.save(place / OUT, force=force)

    status = wait(child(work))
    after = tree(place)
    result.save(place / OUT, force=True)
    return {"status": status, "after": after, "next": tree(place)}


def main(model: Path, base: Path) -> None:
    prepare()
    result, other = erase(model), erase(model, concept="dog")
    result.save(base / "new" / OUT)
    other.save(base / "old" / OUT)
    found = {
        kind: [killed(result, base / "old", base / f"{kind}{n}", n, kind == "over") for n in range(moves)]
        for kind, moves in MOVES.items()
    }
    print(json.dumps({"result": tree(base / "new"), "other": tree(base / "old"), **found}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
