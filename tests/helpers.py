"""What several tests need: hashes of folders, tensors by their bytes, one quick edit, and one command."""

from __future__ import annotations

import hashlib
import json
import signal
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from realera_edit import EditConfig, EditFile, edit_model
from realera_edit.cli import cli

# Small in every respect that costs time; strong enough that each projection changes in half precision too.
QUICK = EditConfig(strength=0.8, words=0, beyond=0, prior_words=60, ridge=1e-3)
DENSE = replace(QUICK, perturbation="isotropic", radius=0.5)
UNET = "unet/diffusion_pytorch_model.safetensors"


def made(model: Path, *names: str, **changes: Any) -> EditFile:
    """A quick edit of `model` as an edit file; it erases "cat" unless told."""
    return EditFile.of(edit_model(model, list(names) or ["cat"], config=replace(QUICK, **changes)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The U-Net's weights in float64."""
    return {name: tensor.double() for name, tensor in load_file(folder / UNET).items()}


def gap(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """|one - two| / |two| over all weights that an edit changes."""
    names = [name for name in one if ".attn2.to_k." in name or ".attn2.to_v." in name or name.startswith("add_embedd")]
    return float(sum((one[n] - two[n]).norm() ** 2 for n in names) / sum(two[n].norm() ** 2 for n in names)) ** 0.5


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> hash of the bytes, for every file below `folder`; links are followed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, read by hand."""
    data = path.read_bytes()
    result: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return result


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes) of each tensor in file order, read without the package or safetensors."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entries = {name: entry for name, entry in header(path).items() if name != "__metadata__"}
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*(start + at for at in entry["data_offsets"]))])
        for name, entry in entries.items()
    }


def write_file(path: Path, head: dict[str, Any] | bytes, data: bytes) -> None:
    """A safetensors file with this header (as JSON, or as it is) and this data section."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def split_file(path: Path) -> tuple[bytes, bytes]:
    """The header text and the data section of a safetensors file."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:start], data[start:]


def run(*args: str | Path) -> Result:
    """One command in this process; an exception that is not the command's own way to exit is raised here."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
    finally:
        signal.signal(signal.SIGTERM, handler)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
