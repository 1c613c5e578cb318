"""What the speed benchmarks share: clocks that wait for the device, peak memory, and the record of where they ran.

Imports neither torch nor numpy at the top, so that a process that measures others stays small.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
CACHE = "REALERA_EDIT_CACHE"
PACKAGES = ("torch", "transformers", "diffusers", "tokenizers", "safetensors", "numpy", "realera-edit")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and the load when the run began."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor(), "cores": usable, "load": round(os.getloadavg()[0], 2)}


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: str = "cpu") -> tuple[float, T]:
    """(seconds, result) of a call, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result


def peak_memory(device: str = "cpu") -> dict[str, int]:
    """Bytes: the largest resident size of this process so far, and the most that torch held on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.startswith("cuda"):
        import torch

        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def sync(path: Path) -> None:
    """Wait until a file, or every file and folder below a folder, is on the disk; and the folder that it is in."""
    found = [path.parent, path, *path.rglob("*")]
    for one in found:
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def spawn(command: Sequence[str], cache: Path) -> dict[str, Any]:
    """Run a command: seconds, peak resident bytes, and the last line that it printed. `SystemExit` where it fails."""
    environment = {**os.environ, CACHE: str(cache), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        # this process is small, so what the child inherits for a moment does not count in its peak
        process = subprocess.Popen(command, stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode().strip().splitlines()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command[:6])} ... failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak": usage.ru_maxrss * unit, "line": lines[-1] if lines else ""}


def median(values: list[float]) -> float:
    """The median of measured seconds or ratios."""
    return statistics.median(values)


def largest(values: list[float]) -> float:
    """The largest value; NaN where any is NaN, which `max` would pass over."""
    return next((value for value in values if math.isnan(value)), max(values))


def show(record: Mapping[str, Any], as_json: bool) -> None:
    """Print a record: one JSON object on one line, or a line for each entry."""
    if as_json:
        print(json.dumps(record), flush=True)
        return
    width = max(map(len, record)) + 2
    for name, value in record.items():
        text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else value
        print(f"{name:<{width}}{text}", flush=True)
