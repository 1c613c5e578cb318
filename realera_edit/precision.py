"""Products in the precision of their operands, whatever the process has set. Imports torch only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def _backends() -> list[object]:
    """What holds `fp32_precision` for matrix products, since PyTorch 2.9."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no bfloat16 within a float32 product and no autocast meanwhile; then all is set as it was.

    Pipelines are often run with TF32 allowed, or within autocast. An edit is a small difference of large products, and
    a factor must be the same from the same file: TF32 alone would leave three of its digits.
    """
    backends, legacy = _backends(), ""
    before = [backend.fp32_precision for backend in backends]  # type: ignore[attr-defined]
    if not backends:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value  # type: ignore[attr-defined]
        if legacy:
            torch.set_float32_matmul_precision(legacy)
