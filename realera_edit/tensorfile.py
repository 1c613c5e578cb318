"""Safetensors files by byte range: checked headers, single tensors, and rewriting a few tensors of a large file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import BLOCK, Run, copy_runs, copying

_MAX_HEADER = 100 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype name, shape, and byte range relative to the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """The checked header of a safetensors file: tensors in file order, metadata, and where the data begins."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    offset: int
    raw: Mapping[str, Any]

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype. Raises `CheckpointError` for a dtype that is not floating point, NaN or inf."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is {entry.dtype}; only fp64, fp32, fp16 and bf16 weights can be edited. "
                "Use the unquantised checkpoint"
            )
        data = self.read_bytes(name)
        if not data:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        if not all_finite(tensor):
            raise CheckpointError(
                f"{self.path}: {name} contains NaN or inf: the checkpoint is damaged; take a sound copy"
            )
        return tensor

    def read_bytes(self, name: str) -> memoryview:
        """The bytes of one tensor."""
        entry = self.entries[name]
        data = to_bytes(torch.empty(entry.stop - entry.start, dtype=torch.uint8))  # unlike a bytearray, not zeroed
        with open(self.path, "rb") as file:
            file.seek(self.offset + entry.start)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{self.path}: ends inside {name}; the file changed or is truncated")
        return data


def open_tensors(path: Path) -> TensorFile:
    """Read and check a header: its size, JSON, dtypes, shapes, and byte ranges that fill the file without gaps.

    Raises `CheckpointError`, before anything as large as the header claims is allocated.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            lead = file.read(8)
            length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: not a whole safetensors file (header of {length} bytes, file of {size})"
                )
            header = json.loads(file.read(length).decode("utf-8"))
            json.dumps(header, ensure_ascii=False).encode("utf-8")  # names with half a surrogate pair fail here
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is not valid JSON ({error}); take a sound copy"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a mapping; take a sound copy")
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a mapping of strings; take a sound copy")
    entries = {name: _entry(path, name, value) for name, value in header.items() if name != "__metadata__"}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise CheckpointError(f"{path}: {name} starts at byte {entry.start}, expected {at}: damaged offsets")
        at = entry.stop
    if at != size - 8 - length:
        raise CheckpointError(
            f"{path}: the header describes {at} bytes of tensors, the file holds {size - 8 - length}: truncated"
        )
    return TensorFile(path, entries, metadata, 8 + length, header)


def _entry(path: Path, name: str, value: Any) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
        sound = all(type(n) is int and 0 <= n < 2**62 for n in numbers) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header entry of {name} is malformed; take a sound copy")
    count = 1
    for n in shape:
        count *= n
    # dtypes that we do not know (new quantisations) are carried along unread, whatever their size
    if stop < start or (dtype in _SIZES and stop - start != count * _SIZES[dtype]):
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)} but spans {stop - start} bytes: damaged header")
    return Entry(dtype, tuple(shape), start, stop)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or inf; `torch.isfinite(...).all()` at a tenth of the time, as nothing is allocated."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def rewrite(
    source: TensorFile,
    target: Path,
    metadata: Mapping[str, str | None],
    names: Collection[str],
    edited: Iterator[tuple[str, Tensor]],
) -> None:
    """Write `target` as `source` with the tensors `names` replaced and `metadata` added (a key of None: taken out).

    Every other tensor is byte-identical, and so are the order of the keys and the layout of the data section. They are
    copied in a thread of their own while `edited` yields (name, tensor of the stored dtype and shape) for each name.
    """
    told = {key: value for key, value in {**source.metadata, **metadata}.items() if value is not None}
    header: dict[str, Any] = {"__metadata__": told}
    header |= {name: value for name, value in source.raw.items() if name != "__metadata__"}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # the data begins at the same place of a block, so that a file system which can shares blocks in place of copying
    unit, place = (8, 0) if source.offset % 8 else (BLOCK, source.offset)
    text += b" " * ((place - 8 - len(text)) % unit)
    offset = 8 + len(text)
    with open(target, "xb") as dst:
        dst.write(struct.pack("<Q", len(text)) + text)
        dst.flush()
        left = set(names)
        with copying(source.path, target, _runs(source, left, offset)):
            for name, tensor in edited:
                entry = source.entries[name]
                if DTYPES.get(entry.dtype) != tensor.dtype or entry.shape != tuple(tensor.shape):
                    raise CheckpointError(
                        f"{target}: {name} is {entry.dtype} {entry.shape}, not {tensor.dtype} {tuple(tensor.shape)}"
                    )
                dst.seek(offset + entry.start)
                dst.write(to_bytes(tensor))
                left.remove(name)
            dst.flush()
        if left:
            raise CheckpointError(f"{target}: {min(left)} was to be replaced, and nothing was given for it")


def _runs(file: TensorFile, names: Collection[str], offset: int) -> list[Run]:
    """The data section of a file without the tensors `names`, to be copied to one that begins at `offset`."""
    runs, at = [], 0
    for start, stop in sorted((file.entries[name].start, file.entries[name].stop) for name in names):
        runs.append((at, start))
        at = stop
    runs.append((at, max((entry.stop for entry in file.entries.values()), default=0)))
    return [Run(file.offset + start, file.offset + stop, offset + start) for start, stop in runs if start < stop]


def copy_tensors(path: Path, tensors: Mapping[str, tuple[TensorFile, str]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of tensors that other files hold, to the bit: name -> (file, name there)."""
    entries = {name: file.entries[stored] for name, (file, stored) in tensors.items()}
    lead, places = _lead(
        {name: (one.dtype, one.shape, one.stop - one.start) for name, one in entries.items()}, metadata
    )
    with open(path, "xb") as target:
        target.write(lead)
    for name, (file, _) in tensors.items():
        start, stop = (file.offset + end for end in (entries[name].start, entries[name].stop))
        copy_runs(file.path, path, [Run(start, stop, len(lead) + places[name])])


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    most: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Callable[[], Mapping[str, str]],
    slack: int = 0,
) -> None:
    """Write a safetensors file tensor by tensor, as they come, so that only one of them is in memory.

    `most`: name -> (dtype name, the largest shape that it can turn out to have), in the order of `tensors`; the header
    gets the room that it may need, filled with spaces. `metadata` is called first for its length, and again after the
    last tensor: then it may say otherwise, by up to `slack` bytes more.
    """
    sizes = {name: (dtype, shape, math.prod(shape) * _SIZES[dtype]) for name, (dtype, shape) in most.items()}
    room = len(_lead(sizes, metadata())[0]) + slack
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    with open(path, "xb") as file:
        file.seek(room)
        for name, tensor in tensors:
            data = to_bytes(tensor)
            found[name] = (most[name][0], tuple(tensor.shape), len(data))
            file.write(data)
        lead = _lead(found, metadata(), room)[0]
        if list(found) != list(most) or len(lead) != room:  # a longer header would lie over the first tensor
            raise RuntimeError(f"{path}: other tensors or more metadata came than were announced")
        file.seek(0)
        file.write(lead)
        file.flush()


def _lead(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str], room: int = 0
) -> tuple[bytes, dict[str, int]]:
    """What a file of these tensors (dtype name, shape, bytes) begins with, and where each is in what follows.

    `room`: the bytes that it takes, where it could be less.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((room - 8 - len(text)) if room else -len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places
