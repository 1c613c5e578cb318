"""Which prompts take part: chosen by what the unedited model draws, or read from a user's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realera_edit.errors import ConceptError, RealEraWarning
from realera_edit.evaluation_config import EvaluationConfig
from realera_edit.evaluation_plan import Erased, Known, Planner, read_prompts

CONFIG = EvaluationConfig(seeds=(0, 1), far=3, neighbours=4, alias_count=2, residue=1)

NEAR = {"car": 0.9, "dog": 0.8, "wolf": 0.7, "fox": 0.6, "bus": 0.5, "jeep": 0.4, "oak": 0.3, "elm": 0.2}


def plan(
    rates: dict[str, float],
    erased: str = "cat",
    preserved: tuple[str, ...] = (),
    alike: tuple[str, ...] = (),
    **changes: Any,
) -> Planner:
    """A plan over nine concepts in three groups; `rates`: what the unedited model falls short on."""
    groups = {"cat": 0, "dog": 0, "wolf": 0, "fox": 0, "car": 1, "bus": 1, "jeep": 1, "oak": 2, "elm": 2}
    tags = {
        "cat": ("kitty", "Cat", "house cat", "pet", "woof", "puss toy", "c4t"),
        "dog": ("pet", "woof", "puss toy", "hound"),
    }
    known = [Known(label, group, group, tags.get(label, ())) for label, group in groups.items()]
    return Planner(
        [Erased(name, name, ("puss",) if name == "cat" else ()) for name in erased.split()],
        known,
        lambda pairs: [rates.get(name, 1.0) for _, name in pairs],
        lambda names, others: np.array([[NEAR.get(other, 0.0) for other in others] for _ in names]),
        replace(CONFIG, **changes),
        preserved,
        lambda name: list(alike),
    )


def test_neighbours_are_half_kin_and_the_nearest_that_are_drawn() -> None:
    assert plan({}).near == {"cat": ("dog", "wolf", "car", "fox")}
    assert plan({"dog": 0.5}).near == {"cat": ("wolf", "fox", "car", "bus")}
    assert plan({}, far=2).far != ()


def test_far_concepts_share_no_group_and_were_not_preserved() -> None:
    assert set(plan({}, far=2).far) <= {"bus", "jeep", "oak", "elm"}
    assert set(plan({}, preserved=("oak", "elm"), far=4).far) == {"bus", "jeep"}
    assert set(plan({"bus": 0.1, "jeep": 0.2}, far=2).far) == {"oak", "elm"}


def test_concepts_that_the_unedited_model_does_not_draw_take_no_part() -> None:
    with pytest.warns(
        RealEraWarning, match=r"draws 1 of 2 erased concepts in less than 0.95 .*: cat \(0.90\). They do"
    ):
        assert [one.name for one in plan({"cat": 0.9}, "cat dog", far=0).erased] == ["dog"]
    with pytest.warns(RealEraWarning, match="The best takes part"):
        assert [one.name for one in plan({"cat": 0.9, "dog": 0.6}, "cat dog", far=0).erased] == ["cat"]


def test_the_best_fill_in_with_a_warning() -> None:
    few = dict.fromkeys(("dog", "wolf", "fox", "car", "bus", "jeep"), 0.7) | {"oak": 0.0, "wolf": 0.8}
    with pytest.warns(
        RealEraWarning, match=r"1 of 4 neighbours of cat reach 0.95 .*; 3 more take part, the least at 0.70"
    ):
        assert plan(few, far=0).near == {"cat": ("elm", "wolf", "car", "dog")}


def test_other_names_and_keywords() -> None:
    """Keywords of the concept alone are other names; what others have too is residue; neither names it outright."""
    made = plan({}, far=0, alias_count=5, residue=9)
    (cat,) = made.erased
    assert made.others(cat) == ("puss", "kitty")
    assert made.keywords(cat, made.others(cat)) == ("pet", "woof", "pet woof")
    assert plan({"kitty": 0.4}, far=0).others(cat) == ("puss",)
    assert plan({"pet": 0.4, "woof": 0.0}, far=0).keywords(cat, ()) == ("pet woof",)


def test_words_that_are_drawn_alike_fill_up_the_residue() -> None:
    """None that names the concept, another name or another concept; those that the model does not draw are left out."""
    alike = ("pet", "kitty", "Dog", "cats eye", "the cat", "whisker", "purr", "claw", "paw")
    made = plan({"whisker": 0.4}, far=0, residue=6, alike=alike)
    (cat,) = made.erased
    assert made.keywords(cat, ("kitty",)) == ("pet", "woof", "pet woof", "cats eye", "purr", "claw")
    # enough keywords: no word is asked for
    assert plan({}, far=0, residue=3, alike=alike).keywords(cat, ()) == ("pet", "woof", "pet woof")
    # two are tried for each that is missing
    few = plan(dict.fromkeys(("pet", "woof", "pet woof", "cats eye", "whisker"), 0.0), far=0, residue=1, alike=alike)
    assert few.keywords(cat, ("kitty",)) == ()
    assert plan({}, "oak", far=0, residue=2, alike=("acorn", "elm", "leaf")).keywords(Erased("oak", "oak"), ()) == (
        "acorn",
        "leaf",
    )


def test_names_are_drawn_once() -> None:
    asked: list[tuple[str, str]] = []
    made = plan({}, far=0)
    made._accuracy = lambda pairs: asked.extend(pairs) or [1.0 for _ in pairs]  # type: ignore[func-returns-value]
    made.rates([("cat", "puss"), ("cat", "puss"), ("dog", "dog")])
    assert asked == [("cat", "puss")]  # the dog was asked for as a neighbour


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no prompt"),
        ("kind,prompt,truth\n", "lists no prompt"),
        ("kind,prompt\ne,cat\n", "row 1: expected the columns kind,prompt,truth"),
        ("kind,prompt,truth,colour\ne,cat,cat,red\n", "row 1: expected the columns"),
        ("kind,prompt,truth\ne,cat,cat\nx,dog,dog\n", "row 2: kind 'x': expected one of e"),
        ("kind,prompt,truth\ne,cat,\n", "row 1: has no truth"),
        ("kind,prompt,truth\ne,cat,cat,more\n", "row 1: expected the columns"),
    ],
)
def test_prompt_files_at_fault(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ConceptError, match=message):
        read_prompts(tmp_path / "p.csv")
    with pytest.raises(ConceptError, match="no such file"):
        read_prompts(tmp_path / "gone.csv")
