"""The class that a name of several words belongs to: "face" of "cat face", which every other face shares."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .concepts import Concept

# Kinds whose names are no compounds: "taylor swift" is no swift, and "Swift" alone must go as well.
PROPER = ("person", "style")


def class_words(concepts: Sequence[Concept], kind: str, common: Collection[str], taken: Collection[str]) -> list[str]:
    """The last word of each name or alias of several words, where it is one of the `common` words; in order, once.

    Left out: words in `taken` (erased or preserved already, in lower case), names with a capital, which are taken
    for proper names, and concepts of a kind in `PROPER`. `kind`: of concepts without one of their own.
    """
    known, found = set(common) - set(taken), dict[str, None]()
    for concept in concepts:
        if (concept.kind or kind) in PROPER:
            continue
        for name in concept.names:
            *first, last = name.split()
            if first and name == name.lower() and last in known:
                found[last] = None
    return list(found)
