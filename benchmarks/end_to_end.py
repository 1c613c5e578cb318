"""`realera-edit erase` on a folder: wall time and peak memory, beside a copy of the folder and the text encoding.

`python -m benchmarks.end_to_end --model DIR --concepts 10 --json`; the last line is one JSON object.

* wall: the command as a process of its own, imports included, once with an empty cache of the prior and once with the
  cache that this left. Peak memory is the process's largest resident size, as the system reports it (`os.wait4`).
* copy: `cp -r` of the folder, then fsync of every file and folder, as the edit does it too.
* encoding: the prompts that such an edit encodes (recorded from one), encoded again by a fresh `PromptEncoder` in a
  process of its own; loading the model is not counted.
* torch: the peak of an interpreter that only imports torch.

Files are read once before, so that all of it runs from the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.clip_tokenizer import invented_names


def copy_folder(source: Path, target: Path) -> float:
    """Seconds of `cp -r` with every file and folder synced; the copy is removed again."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    common.sync(target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def encode_alone(model: Path, names: Sequence[str]) -> dict[str, Any]:
    """Seconds and prompts of the text encoding of an edit of `names`, with the cache as it is. Needs torch."""
    from collections.abc import Sequence as Prompts

    import torch

    from realera_edit.checkpoint import open_checkpoint
    from realera_edit.compute import compute_edit
    from realera_edit.concepts import resolve_concepts
    from realera_edit.config import EditConfig
    from realera_edit.embeddings import Encoded, PromptEncoder

    calls: list[tuple[list[str], int]] = []

    class Recorder(PromptEncoder):
        def encode(self, prompts: Prompts[str], padding: int = 0, label: str = "encoding") -> list[Encoded]:
            calls.append((list(prompts), padding))
            return super().encode(prompts, padding, label)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = open_checkpoint(model, device=device).encoder
    compute_edit(Recorder(encoder.pairs, encoder.penultimate), resolve_concepts(names), EditConfig())
    again = PromptEncoder(encoder.pairs, encoder.penultimate)
    seconds, _ = common.timed(lambda: [again.encode(prompts, padding) for prompts, padding in calls], device)
    return {"seconds": seconds, "prompts": len({(p, padding) for prompts, padding in calls for p in prompts})}


def round_of(model: Path, names: Sequence[str], work: Path, cache: Path) -> dict[str, Any]:
    """One copy, one text encoding and one erase, with the cache as it is (and left as `erase` leaves it)."""
    out, scratch = work / "out", work / "cache-of-encoding"
    shutil.copytree(cache, scratch)
    program = [sys.executable, "-m", "benchmarks.end_to_end", "--model", str(model), "--names", *names]
    encoding = json.loads(common.spawn(program, scratch)["line"])
    copied = copy_folder(model, work / "copy")
    command = [sys.executable, "-m", "realera_edit", "erase", str(model), *names, "-o", str(out), "--json"]
    erased = common.spawn(command, cache)
    shutil.rmtree(out)
    shutil.rmtree(scratch)
    return {
        "seconds": {"wall": erased["seconds"], "copy": copied, "encode": encoding["seconds"]},
        "prompts": encoding["prompts"],
        "ratio": erased["seconds"] / (copied + encoding["seconds"]),
        "peak_bytes": erased["peak"],
    }


def measure(model: Path, names: Sequence[str], work: Path) -> dict[str, Any]:
    """The record of a cold and a warm run."""
    cache = work / "cache"
    cache.mkdir()
    bare = common.spawn([sys.executable, "-c", "import torch"], cache)
    copy_folder(model, work / "copy")  # reads every file once
    common.spawn([sys.executable, "-m", "realera_edit", "erase", "--help"], cache)
    found: dict[str, Any] = {"torch_bytes": bare["peak"], "torch_seconds": bare["seconds"]}
    for name in ("cold", "warm"):
        found[name] = round_of(model, names, work, cache)
        found[f"ratio_{name}"] = found[name]["ratio"]
        found[f"peak_over_torch_bytes_{name}"] = found[name]["peak_bytes"] - bare["peak"]
    return found


def record(options: argparse.Namespace, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with the circumstances that they were taken in."""
    size = sum(path.stat().st_size for path in options.model.rglob("*") if path.is_file())
    return {
        "command": "python -m benchmarks.end_to_end " + " ".join(sys.argv[1:]),
        "model": options.model.name,
        "model_bytes": size,
        "concepts": options.concepts,
        "machine": common.machine(),
        "versions": common.versions(),
        "copy_is": "cp -r, then fsync of every file and folder",
        **found,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="a diffusers folder, such as benchmarks.shapes writes"
    )
    parser.add_argument("--concepts", type=int, default=10)
    parser.add_argument("--work", type=Path, help="where copies are made and removed  [default: beside the model]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)  # the text encoding alone, in its own process
    options = parser.parse_args()
    if options.names:
        print(json.dumps(encode_alone(options.model, options.names)))
        return
    options.model = options.model.resolve()
    with tempfile.TemporaryDirectory(prefix="end-to-end-", dir=options.work or options.model.parent) as work:
        found = measure(options.model, invented_names(options.concepts), Path(work))
    common.show(record(options, found), options.json)


if __name__ == "__main__":
    main()
