"""The last word of a name of several words, which other things share, is held by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from realera_edit import Concept, EditConfig, edit_model
from realera_edit.class_words import class_words

COMMON = ("face", "dog", "ball", "swift")


@pytest.mark.parametrize(
    ("concepts", "taken", "found"),
    [
        ([Concept("cat face")], (), ["face"]),
        ([Concept("face")], (), []),  # the name itself
        ([Concept("cat face"), Concept("pig face"), Concept("hot dog")], (), ["face", "dog"]),
        ([Concept("cat", aliases=("cat face",))], (), ["face"]),
        ([Concept("cat face")], ("face",), []),  # preserved or erased by name
        ([Concept("van gogh")], (), []),  # no frequent word
        ([Concept("Taylor Swift")], (), []),  # a proper name
        ([Concept("taylor swift", kind="person")], (), []),
    ],
)
def test_which_words(concepts: list[Concept], taken: tuple[str, ...], found: list[str]) -> None:
    assert class_words(concepts, "general", COMMON, taken) == found
    assert class_words(concepts, "person", COMMON, taken) == []
    assert class_words([replace(c, kind=c.kind or "object") for c in concepts], "style", COMMON, taken) == found


def test_others_of_the_class_stay_closer(emoji: Path) -> None:
    moved = {}
    for hold in (True, False):
        result = edit_model(emoji, ["wine glass"], config=EditConfig(hold_class=hold))
        record = result.to_dict()
        assert result.edit.residual[0] == pytest.approx(0.2, abs=0.05)  # as erased as without
        assert ("glass" in record["drift"]) is hold
        assert record["config"]["hold_class"] is hold
        assert record["preserve"] == []  # what the user named
        states = result.source.encoder.encode(["an emoji of a magnifying glass", "an emoji of a guitar"], 2)
        delta = result.edit.cross.factor.delta()
        moved[hold] = [float((e.states @ delta.T.float()).norm() / e.states.norm()) for e in states]
    assert moved[True][0] < 0.7 * moved[False][0]
    assert moved[True][1] < 1.5 * moved[False][1]  # the price: one more state is held, and others give way


def test_what_is_named_is_not_held(emoji: Path) -> None:
    for extra in ({"aliases": ("face",)}, {}):
        result = edit_model(emoji, [Concept("cat face", **extra)], preserve=[] if extra else ["face"])
        assert list(result.to_dict()["drift"]) == ([] if extra else ["face"])
