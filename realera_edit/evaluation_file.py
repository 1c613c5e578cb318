"""An evaluation folder as it is read: `evaluation.json`, checked part by part, and the pictures that it names.

Nothing in the file is trusted. Every access names the place of what is wrong; no picture outside the folder is opened.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import ReportError
from .files import write_atomically

NAME = "evaluation.json"
FORMAT = "realera-edit evaluation 1"
MAX_PICTURE = 64 * 2**20
_AGAIN = "run the evaluation again to write it anew"


class Part:
    """One object of the file. What is missing or null reads as empty; what has the wrong type is a `ReportError`."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        """`where`: file and key, for messages."""
        self.data, self.where = data, where

    def __bool__(self) -> bool:
        return bool(self.data)

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.data.get(key)
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
            return value
        raise ReportError(f"{self.where}: {key!r} is not {expected}; {_AGAIN}")

    def text(self, key: str) -> str:
        """Text on one line; a number is written out."""
        value = self._get(key, (str, int, float), "text")
        return "" if value is None else " ".join(str(value).split())

    def number(self, key: str) -> float | None:
        """A finite number, or None."""
        value = self._get(key, (int, float), "a number")
        try:
            return float(value) if value is not None and math.isfinite(value) else None
        except OverflowError:  # an integer beyond floats
            return None

    def part(self, key: str) -> Part:
        """The object `key`, or an empty one."""
        return Part(self._get(key, (dict,), "an object") or {}, f"{self.where}: {key}")

    def parts(self, key: str) -> Iterator[Part]:
        """Each object of the list `key`."""
        for i, item in enumerate(self._get(key, (list,), "a list") or []):
            if not isinstance(item, dict):
                raise ReportError(f"{self.where}: {key}[{i}] is not an object; {_AGAIN}")
            yield Part(item, f"{self.where}: {key}[{i}]")

    def texts(self, key: str) -> list[str]:
        """The list of texts `key`."""
        items = self._get(key, (list,), "a list") or []
        return [Part({key: item}, self.where).text(key) for item in items]


def read(folder: Path) -> Part:
    """The whole of `folder/evaluation.json`. Raises `ReportError`."""
    path = folder / NAME
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ReportError(f"{path}: no such file; run the evaluation with {folder} as its output first") from error
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not valid JSON ({error}); {_AGAIN}") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ReportError(f"{path}: its format is {found!r:.80}, not {FORMAT!r}; name the folder of an evaluation")
    return Part(data, str(path))


@dataclass(frozen=True)
class Pair:
    """One prompt and seed before and after the edit. `first`: it is the first seed of its prompt."""

    index: int
    kind: str
    owner: str
    prompt: str
    truth: str
    seed: str
    before: Path
    after: Path
    before_verdict: str
    after_verdict: str
    first: bool


def pairs(folder: Path, data: Part) -> list[Pair]:
    """Every pair that the file names, each path checked by `picture_path`; no picture is opened yet."""
    found: list[Pair] = []
    for prompt in data.parts("prompts"):
        for i, picture in enumerate(prompt.parts("pictures")):
            before, after = (picture_path(folder, picture, side) for side in ("original", "edited"))
            found.append(
                Pair(
                    index=len(found),
                    kind=prompt.text("kind"),
                    owner=prompt.text("owner"),
                    prompt=prompt.text("prompt"),
                    truth=prompt.text("truth"),
                    seed=picture.text("seed"),
                    before=before,
                    after=after,
                    before_verdict=picture.text("original_verdict"),
                    after_verdict=picture.text("edited_verdict"),
                    first=i == 0,
                )
            )
    return found


def picture_path(folder: Path, part: Part, key: str) -> Path:
    """The file that `key` names: relative, `.png`, and in `folder` after every link is followed; else `ReportError`."""
    name = part.data.get(key)
    where = f"{part.where}: {key} {name!r:.200}"
    if not isinstance(name, str) or not name.endswith(".png") or "\0" in name:
        raise ReportError(f"{where}: not the path of a .png file; {_AGAIN}")
    # both kinds of path, so that a file is judged alike on every system
    outside = PureWindowsPath(name).anchor or PurePosixPath(name).anchor
    if outside or "\\" in name or ".." in PurePosixPath(name).parts:
        raise ReportError(f"{where}: leads out of the folder; name pictures relative to {folder}, without '..'")
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, RuntimeError, UnicodeError) as error:  # a loop of links, a name too long or not text
        raise ReportError(f"{where}: cannot be opened ({error}); {_AGAIN}") from error
    if not inside:
        raise ReportError(f"{where}: a link leads out of the folder; put the picture itself into {folder}")
    if not there:
        raise ReportError(f"{where}: no such picture in {folder}; restore it, or {_AGAIN}")
    return path


def read_png(path: Path) -> tuple[bytes, int, int]:
    """Bytes, width and height of a PNG file. Raises `ReportError` where it is not one."""
    try:
        size = path.stat().st_size
        if size > MAX_PICTURE:
            raise ReportError(
                f"{path}: {size / 2**20:.0f} MiB, and at most {MAX_PICTURE // 2**20} are read; draw smaller"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 33:
        raise ReportError(f"{path}: not a PNG picture; restore it, or {_AGAIN}")
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= 2**14 and 0 < height <= 2**14):
        raise ReportError(f"{path}: {width} x {height} pixels; draw smaller")
    return data, width, height


def replaced(path: Path, content: bytes) -> Path:
    """`path`, written whole. Raises `ReportError`."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written: {error.strerror}; make the folder writable") from error
    return path
