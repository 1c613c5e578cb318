"""What a concept becomes when no text was named: the average thing, one state for each context and position.

The damage that an edit does to another prompt r is a sum over the erased rows of c_i(r) (y_i - x_i). A text as the
target gives all these differences a common part (the text's state less the mean), so with many concepts the small
coefficients add up in one direction. The mean of many words has no such part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from .contexts import AVERAGE, FEWEST_STYLES, align, fill, is_name
from .embeddings import Encoded, PromptEncoder

__all__ = ["AVERAGE", "average_targets", "average_words", "style_names"]

# Everyday things of many kinds; what is being erased is left out of the average.
THINGS = """
    apple bag ball bed bird boat book bottle bowl box bread bridge bus button cake camera candle car chair clock
    cloud coat cup door drum fish flower glass hammer hat horse house key kite knife ladder lamp leaf map mirror
    pen phone plate ring road rock rope shell ship shoe spoon star stone table tent tool tower train tree truck
    umbrella wheel window
"""
INSTEAD = "object"  # where the tokenizer has too few of them as one token
FEWEST, MOST = 16, 64


def style_names(erased: Collection[str], preserve: Sequence[str]) -> list[str]:
    """The preserved names that styles become the average of: none where they are too few to be a middle.

    `erased` in lower case. Only where all that is erased are styles; no thing stands for one.
    """
    named = [entry for entry in preserve if is_name(entry) and entry.lower() not in erased]
    return named[:MOST] if len(named) >= FEWEST_STYLES else []


def average_words(
    encoder: PromptEncoder, erased: Collection[str], preserve: Sequence[str], styles: bool = False
) -> list[str]:
    """What the average is taken over: preserved names, or else `THINGS`, of one token each and not in `erased`.

    `erased` in lower case. The user's own preserved names, if there are enough of them, are the better middle: they
    are of the kind that the edit is about. `styles`: all that is erased are styles, and so, then, are the preserved
    names; the average is theirs, of whatever length, since no thing stands for a style.
    """
    if styles:
        named = [entry for entry in preserve if is_name(entry) and entry.lower() not in erased]
        if len(named) >= FEWEST_STYLES:
            return named[:MOST]
    for listed in (preserve, THINGS.split()):
        words = [word for word in listed if word.isalpha() and word.lower() not in erased]
        single = [word for word, ids in zip(words, encoder.tokenize(words), strict=True) if len(ids) == 3]
        if len(single) >= FEWEST:
            return single[:MOST]
    return [INSTEAD]


def average_targets(
    encoder: PromptEncoder, templates: Iterable[str], words: list[str], padding: int
) -> dict[str, Encoded]:
    """Template -> the mean state at each position over the template filled with each word; `ids` are the first's.

    A name of another length lends the states that `contexts.align` puts beside those of the first.
    """
    averages = {}
    for template in dict.fromkeys(templates):
        filled = [fill(template, word) for word in words]
        first, *others = encoder.spans(filled)
        encoded = encoder.encode([f.prompt for f in filled], padding, label="targets")
        places = [[*range(first.start), *(j for _, j in align(first, other, padding))] for other in (first, *others)]
        length = min(sum(j < len(e.states) for j in row) for row, e in zip(places, encoded, strict=True))
        pooled = [e.pooled for e in encoded if e.pooled is not None]
        averages[template] = Encoded(
            encoded[0].ids,
            torch.stack([e.states[row[:length]] for row, e in zip(places, encoded, strict=True)]).mean(0),
            torch.stack(pooled).mean(0) if pooled else None,
        )
    return averages
