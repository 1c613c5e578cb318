"""What several tests need: hashes of folders, tensors by their bytes, one quick edit, and one command."""

from __future__ import annotations

import hashlib
import json
import signal
import struct
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from realera_edit import EditConfig
from realera_edit.cli import cli

# Small in every respect that costs time; strong enough that each projection changes in half precision too.
QUICK = EditConfig(strength=0.8, words=0, beyond=0, prior_words=60, ridge=1e-3)
UNET = "unet/diffusion_pytorch_model.safetensors"


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
