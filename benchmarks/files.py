"""Wall time and peak memory of `erase`, `apply` and `export-lora`, beside `cp` of the same model in the same run.

`python -m benchmarks.files --shape sdxl --work DIR --json RESULT.json` builds the model from random weights if DIR does
not hold it yet (without DIR: in a temporary folder, and removes it), prints a table, and last one JSON object.

Every row is a process of its own, and the rows follow one another `--rounds` times:

* startup: an interpreter that imports what `apply` imports, torch above all. It is part of the rows of our commands.
* cp: `cp -r`. synced: the same, then fsync of every file and folder of it, as our commands do before they end.
* apply, export-lora: of an edit file that was made before.
* solve: `erase --save-edit`, which encodes and solves, and writes no model. erase: all of it.

Seconds are medians over the rounds, ratios are medians of each round's ratio; peaks are the largest resident sizes, as
the system reports them (`os.wait4`). The model is read once before, so that it lies in the page cache, memory allowing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.clip_tokenizer import invented_names

# Bytes of the float16 models, for a look at the disk before anything is built.
SIZES = {"sd15": 2.2e9, "sdxl": 7.0e9}
STARTUP = "import realera_edit.transfer"
Row = Mapping[str, float]


def build(shape: str, single: bool, seed: int, work: Path, cache: Path) -> tuple[Path, list[str]]:
    """The model, built unless it is there, and the options that `erase` needs to read its prompts."""
    tokenizer = work / f"{shape}-tokenizer"
    model = work / (f"{shape}.safetensors" if single else shape)
    module = "benchmarks.single_file" if single else "benchmarks.shapes"
    command = [sys.executable, "-m", module, "--shape", shape, "--out", str(model), "--seed", str(seed)]
    words = ["--tokenizer", str(tokenizer)] if single else []
    if not model.exists():
        print(common.spawn([*command, *words], cache)["line"], flush=True)
    return model, words


def remove(path: Path) -> None:
    """Remove an output with what lies beside it."""
    for found in path.parent.glob(f"{path.stem}*"):
        shutil.rmtree(found) if found.is_dir() else found.unlink()


def copied(model: Path, target: Path, cache: Path) -> dict[str, Row]:
    """The rows of one copy."""
    plain = common.spawn(["cp", "-r", str(model), str(target)], cache)
    seconds, _ = common.timed(lambda: common.sync(target))
    return {"cp": plain, "synced": {**plain, "seconds": plain["seconds"] + seconds}}


def round_of(model: Path, words: Sequence[str], names: Sequence[str], work: Path, cache: Path) -> dict[str, Row]:
    """One row of each kind: seconds and peak bytes."""
    out = work / f"out{model.suffix}"
    edit, again, lora = (work / f"{name}.safetensors" for name in ("edit", "again", "lora"))
    ours = [sys.executable, "-m", "realera_edit"]
    erase = [*ours, "erase", str(model), *names, *words, "--quiet"]
    commands: dict[str, tuple[list[str], Path]] = {
        "startup": ([sys.executable, "-c", STARTUP], out),
        "apply": ([*ours, "apply", str(edit), str(model), "-o", str(out), "--quiet"], out),
        "export-lora": ([*ours, "export-lora", str(edit), str(model), "-o", str(lora), "--quiet"], lora),
        "solve": ([*erase, "--save-edit", str(again)], again),
        "erase": ([*erase, "-o", str(out)], out),
    }
    rows = copied(model, out, cache)
    remove(out)
    for name, (command, written) in commands.items():
        rows[name] = common.spawn(command, cache)
        remove(written)
    return rows


def ratios(rows: Mapping[str, Row]) -> dict[str, float]:
    """What one round says about the cost of an edit, in copies; `writing`: what the model adds to `solve`."""
    seconds = {name: row["seconds"] for name, row in rows.items()}
    found = {}
    for base in ("cp", "synced"):
        found[f"apply / {base}"] = seconds["apply"] / seconds[base]
        found[f"(apply - startup) / {base}"] = (seconds["apply"] - seconds["startup"]) / seconds[base]
        found[f"(erase - solve) / {base}"] = (seconds["erase"] - seconds["solve"]) / seconds[base]
    return found


def over(rounds: Sequence[Mapping[str, Any]], reduce: Callable[[list[float]], float]) -> dict[str, float]:
    """Each entry, reduced over the rounds."""
    return {name: reduce([one[name] for one in rounds]) for name in rounds[0]}


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build, make the edit file (which reads the model and fills the cache of the prior), and take all rounds."""
    free = shutil.disk_usage(work).free
    if free < 3 * SIZES[options.shape]:
        sys.exit(f"{work}: {3 * SIZES[options.shape] / 1e9:.0f} GB are needed and {free / 1e9:.0f} GB free; --work DIR")
    with tempfile.TemporaryDirectory(prefix="files-", dir=work) as scratch:
        place, cache = Path(scratch), Path(scratch) / "cache"
        cache.mkdir()
        model, words = build(options.shape, options.format == "single", options.seed, work, cache)
        names = invented_names(options.concepts)
        if options.prior_words is not None:
            words = [*words, "--prior-words", str(options.prior_words)]
        erase = [sys.executable, "-m", "realera_edit", "erase", str(model), *names, *words]
        common.spawn([*erase, "--save-edit", str(place / "edit.safetensors"), "--quiet"], cache)
        taken = [round_of(model, words, names, place, cache) for _ in range(options.rounds)]
    seconds = [{name: row["seconds"] for name, row in one.items()} for one in taken]
    peaks = [{name: row["peak"] for name, row in one.items()} for one in taken]
    return {
        "model_bytes": sum(p.stat().st_size for p in ([model] if model.is_file() else model.rglob("*")) if p.is_file()),
        "seconds": over(seconds, common.median),
        "peak_bytes": over(peaks, max),
        "ratios": over([ratios(one) for one in taken], common.median),
        "rounds": seconds,
    }


def table(found: Mapping[str, Any]) -> str:
    """The medians and peaks, and the ratios, as text."""
    lines = [f"{found['shape']} as a {found['format']}, {found['model_bytes'] / 1e9:.2f} GB"]
    lines += [f"{name:<28}{s:8.2f} s {found['peak_bytes'][name] / 1e6:8.0f} MB" for name, s in found["seconds"].items()]
    return "\n".join([*lines, *(f"{name:<28}{value:8.2f}" for name, value in found["ratios"].items())])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, required=True)
    parser.add_argument("--format", choices=("single", "folder"), default="single")
    parser.add_argument("--work", type=Path, help="where the model is kept, and copies are made  [default: temporary]")
    parser.add_argument("--concepts", type=int, default=10)
    parser.add_argument(
        "--prior-words", type=int, help="of the edit; fewer are sooner encoded, once  [default: `erase`'s]"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "command": "python -m benchmarks.files " + " ".join(sys.argv[1:]),
        **{name: getattr(options, name) for name in ("shape", "format", "concepts", "seed")},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "machine": common.machine(),
        "versions": common.versions(),
    }
    with tempfile.TemporaryDirectory(prefix="files-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found |= measure(options, work)
    print(table(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    common.show(found, True)


if __name__ == "__main__":
    main()
