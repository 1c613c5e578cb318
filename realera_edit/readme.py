"""One README.md of two authors: our section, written anew each time, and everything else, which stays as it is.

Our section stands first, between two comments. The front matter that was there before us is kept in it, word for word,
so that `without` gives back the card as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import front_matter

BEGIN = "<!-- realera_edit: begin. Up to its end this is written by realera-edit, and replaced when it runs again. -->"
END = "<!-- realera_edit: end -->"
_BEFORE = "<!-- realera_edit: front matter before the edit -->"
_SECTION = re.compile(rf"\s*{re.escape(BEGIN)}\r?\n(?P<text>.*?){re.escape(END)}(?:\r?\n|\Z)", re.DOTALL)
_KEPT = re.compile(rf"{re.escape(_BEFORE)}\s+(?P<fence>`{{3,}})yaml\r?\n(?P<block>.*?)(?P=fence)", re.DOTALL)


@dataclass(frozen=True)
class Fields:
    """Changes of a front matter: `new` is set, `weak` only where nothing is there, `tags` are added, `drop` goes."""

    new: Mapping[str, Any]
    weak: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


def has_section(text: str) -> bool:
    """Whether a card has a section of ours."""
    return _SECTION.search(front_matter.split(text)[1]) is not None


def joined(existing: str, section: str, fields: Fields) -> str:
    """A card of `section`, then of what else `existing` holds; an older section of ours is replaced."""
    block, _ = front_matter.split(existing)
    before, rest = _parts(existing)
    have = front_matter.read(block)
    weak = {key: value for key, value in fields.weak.items() if key not in have}
    head = front_matter.changed(block, {**weak, **fields.new}, fields.tags, fields.drop)
    return f"{head}{BEGIN}\n{section.strip()}\n{_earlier(before, rest)}{END}\n{rest}"


def without(text: str) -> str:
    """A card without our section, as it was before; empty where there was none. A card without one stays."""
    return "".join(_parts(text))


def _parts(text: str) -> tuple[str, str]:
    """(front matter before us, body without us)."""
    block, body = front_matter.split(text)
    match = _SECTION.search(body)
    if match is None:
        return block, body
    kept = _KEPT.search(match["text"])
    return kept["block"] if kept else "", body[: match.start()] + body[match.end() :]


def _earlier(before: str, rest: str) -> str:
    """The end of our section: what follows it is another card, whose front matter is kept here."""
    if not before and not rest.strip():
        return ""
    heading = "\n## The card of the unedited model\n"
    if not before or END in before:
        return heading
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", before)), default=0))
    whole = before if before.endswith("\n") else f"{before}\n"
    details = f"{_BEFORE}\n\n{fence}yaml\n{whole}{fence}\n\n"
    return f"{heading}\n<details>\n<summary>Its front matter</summary>\n\n{details}</details>\n"
