"""Contexts: the prompts a concept is erased in, and which positions of concept and target belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# "{}" is the phrase as given, "{a}" the phrase with its indefinite article.
CONTEXTS: dict[str, tuple[str, ...]] = {
    "general": (
        "{}",
        "{a}",
        "a photo of {}",
        "a picture of {a}",
        "a drawing of {a}",
        "an icon of {a}",
        "{}, simple style",
    ),
    "object": (
        "{}",
        "{a}",
        "a photo of {a}",
        "a picture of {a}",
        "a drawing of {a}",
        "an icon of {a}",
        "{a} on a table",
    ),
    "person": (
        "{}",
        "a photo of {}",
        "a portrait of {}",
        "a picture of {}",
        "a drawing of {}",
        "{} smiling",
        "{} at an event",
    ),
    "style": (
        "{}",
        "a painting by {}",
        "art by {}",
        "a picture in the style of {}",
        "in {} style",
        "a drawing in {} style",
        "a house, {} style",
    ),
}

# What a concept becomes when the user names no target; chosen by measurement, see docs/defaults.md.
AVERAGE = "<average>"  # the mean of many things, see `targets`
DEFAULT_TARGETS = {"general": "object", "object": "object", "person": "a person", "style": AVERAGE}
MANY = 25  # from so many names on, "object" gives way to the average
FEWEST_STYLES = 2  # where so many styles are preserved beside erased styles alone, the average is theirs
LONGEST_NAME = 4  # words of the longest preserved entry that is taken for a name; a longer one is a prompt
FALLBACK_TARGET = "thing"

_ARTICLES = ("a ", "an ", "the ")


@dataclass(frozen=True)
class Filled:
    """A template filled with a phrase. `head` is the text before the phrase, `tail` the text after it."""

    head: str
    phrase: str
    tail: str

    @property
    def prompt(self) -> str:
        return " ".join(f"{self.head}{self.phrase}{self.tail}".split())


def article(phrase: str) -> str:
    """The indefinite article that English spelling suggests for `phrase`, with its space; "" where it has one."""
    lowered = phrase.lower()
    if not phrase or lowered.startswith(_ARTICLES):
        return ""
    return "an " if lowered[0] in "aeiou" else "a "


def fill(template: str, phrase: str) -> Filled:
    """`template` with `phrase` in place of "{}" or "{a}"."""
    if "{a}" in template:
        head, tail = template.split("{a}")
        return Filled(head + article(phrase), phrase, tail)
    head, tail = template.split("{}")
    return Filled(head, phrase, tail)


def is_text(text: str) -> bool:
    """Whether it holds no half of a surrogate pair: what a command line makes of bytes that are no UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def is_name(entry: str) -> bool:
    """Whether a preserved entry is a name, to be held in contexts, and not a whole prompt."""
    return len(entry.split()) <= LONGEST_NAME


@dataclass(frozen=True)
class Span:
    """Token positions of one prompt: the phrase is [start, stop), the end token stands at `end`."""

    start: int
    stop: int
    end: int


def find_span(prompt: Sequence[int], head: Sequence[int], tail: Sequence[int]) -> Span:
    """The phrase's positions in `prompt`, from the tokens of the text before and after it.

    All three are token ids with the start token first and the end token last. The phrase is what is left of the
    common beginning with `head` and the common ending with `tail`, so that a token merged across the border counts
    as part of the phrase.
    """
    start = 0
    while start < len(head) - 1 and start < len(prompt) - 1 and prompt[start] == head[start]:
        start += 1
    common = 0
    while common < len(tail) - 1 and len(prompt) - common > start and prompt[-1 - common] == tail[-1 - common]:
        common += 1
    return Span(start, len(prompt) - common, len(prompt) - 1)


def align(concept: Span, target: Span, last: int) -> list[tuple[int, int]]:
    """Pairs (position in the concept's prompt, position in the target's prompt) to erase.

    Phrase tokens are spread over the target's phrase, last on last (an empty target lends its next position); the
    text after it, the end token and padding up to `last` positions after the end token follow one to one.
    """
    size, other = concept.stop - concept.start, target.stop - target.start
    pairs = []
    for index in range(size):
        place = -(-(index + 1) * other // size) - 1  # rounded up: the identity for equal lengths
        pairs.append((concept.start + index, target.start + max(place, 0)))
    for offset in range(concept.end - concept.stop + 1 + last):
        pairs.append((concept.stop + offset, target.stop + offset))
    return pairs
