"""The last word of a name of several words, which other things share, is held by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from realera_edit import Concept, EditConfig, compute, edit_model
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
        ([Concept("Taylor swift")], (), []),
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
        result = edit_model(emoji, ["wine glass"], config=EditConfig(hold_class=hold, overshoot=0))
        record = result.to_dict()
        assert abs(float(result.edit.missed[0])) < 0.05  # as erased as without
        assert ("glass" in record["drift"]) is hold
        assert record["config"]["hold_class"] is hold
        assert record["preserve"] == []  # what the user named
        states = result.source.encoder.encode(["an emoji of a magnifying glass", "an emoji of a guitar"], 2)
        delta = result.edit.cross.factor.delta()
        moved[hold] = [float((e.states @ delta.T.float()).norm() / e.states.norm()) for e in states]
    assert moved[True][0] < 0.7 * moved[False][0]
    assert moved[True][1] < 1.5 * moved[False][1]  # the price: one more state is held, and others give way


def test_all_concepts_share_the_weight(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[dict[str, float]] = []
    original = compute.build_anchors

    def recorded(encoder: object, prior: object, preserve: dict[str, float], *others: object) -> object:
        held.append(dict(preserve))
        return original(encoder, prior, preserve, *others)

    monkeypatch.setattr(compute, "build_anchors", recorded)
    config = EditConfig(preserve_weight=60.0)
    edit_model(emoji, [Concept("wine glass", aliases=("goblet",))], preserve=["guitar"], config=config)
    edit_model(emoji, ["wine glass", "soccer ball", "pizza"], preserve=["guitar"], config=config)
    # an alias is no concept of its own, and what the user names keeps its weight
    assert held == [{"guitar": 60.0, "glass": 60.0}, {"guitar": 60.0, "glass": 20.0, "ball": 20.0}]


def test_what_is_named_is_not_held(emoji: Path) -> None:
    for extra in ({"aliases": ("face",)}, {}):
        result = edit_model(emoji, [Concept("cat face", **extra)], preserve=[] if extra else ["face"])
        assert list(result.to_dict()["drift"]) == ([] if extra else ["face"])
