"""The defaults that depend on how much is erased at once: the average thing as the target, and the strength."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import QUICK
from tiny_models import words

from realera_edit import Concept, EditConfig, edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.concepts import resolve_concepts
from realera_edit.contexts import AVERAGE, MANY
from realera_edit.recipe import recipe_of
from realera_edit.targets import FEWEST, INSTEAD, THINGS, average_targets, average_words

NAMES = [f"name {number}" for number in range(MANY)]


def test_many_names_become_the_average_thing_and_few_an_object() -> None:
    assert {c.target for c in resolve_concepts(NAMES[1:])} == {"object"}
    assert {c.target for c in resolve_concepts(NAMES)} == {AVERAGE}
    aliases = resolve_concepts([Concept(NAMES[0], aliases=tuple(NAMES[1:])), Concept("shape", target="a circle")])
    assert [c.target for c in aliases] == [AVERAGE, "a circle"]  # every name counts; a target that was named stays
    assert {c.target for c in resolve_concepts(NAMES, target="object")} == {"object"}
    assert {c.target for c in resolve_concepts(NAMES, kind="person")} == {"a person"}


def test_a_style_becomes_the_average() -> None:
    """A text as the target takes the drawn thing along (docs/comparison.md, Styles)."""

    def targets(*items: object, kind: str = "style") -> list[str | None]:
        return [c.target for c in resolve_concepts(items, kind=kind)]

    assert targets("Van Gogh", Concept("Goya", target="ink")) == [AVERAGE, "ink"]
    assert targets("Van Gogh", Concept("cat", kind="object")) == [AVERAGE, "object"]
    assert targets("Van Gogh", kind="general") == ["object"]


@pytest.mark.parametrize(
    ("items", "preserve", "advice"),
    [
        ([Concept("cat", kind="style")], [], "Preserve two styles or more, or name one"),
        ([Concept("cat", kind="style")], ["sky", "cat in a hat on a mat"], "Preserve two styles"),  # a prompt is none
        ([Concept("cat", kind="style"), "dog"], ["sky", "sea"], "Name one"),
        ([Concept("cat", kind="style")], ["sky", "sea"], None),
        ([Concept("cat", target="sea", kind="style"), "dog"], [], None),
        (["cat"], [], None),
    ],
)
def test_a_style_among_things_is_warned_of(
    sd1: Path, items: list[Concept | str], preserve: list[str], advice: str | None
) -> None:
    """Where the average is of things, not of styles; whoever can mend it is told how."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit_model(sd1, items, preserve=preserve, config=QUICK)
    told = [str(one.message) for one in caught if "becomes the average of things" in str(one.message)]
    assert len(told) == (advice is not None)
    assert all(text.startswith("cat: ") and advice is not None and advice in text for text in told)


@pytest.mark.filterwarnings("ignore:.* names keep more than was asked")  # of random weights
@pytest.mark.filterwarnings("ignore:.* becomes the average of things")
def test_the_average_is_of_styles_only_beside_styles_alone(sd1: Path) -> None:
    """Of two or more names; prompts are none, and where things go too nobody knows which names are styles."""
    one, two, style = [word for word in words() if word not in ("cat", "art")][:3]
    prompt = f"a long prompt about a {one} by the sea"

    def factor(*concepts: Concept, preserve: list[str]) -> torch.Tensor:
        config = replace(QUICK, strength=0.8, overshoot=0, preserve_weight=0.0)
        return edit_model(sd1, concepts, preserve=preserve, config=config).edit.cross.factor.delta()

    gone, thing = Concept(style, kind="style"), Concept("cat", kind="object")
    plain = factor(gone, preserve=[])
    assert torch.equal(factor(gone, preserve=[one, prompt]), plain)
    assert not torch.allclose(factor(gone, preserve=[one, two]), plain)
    assert torch.equal(factor(gone, thing, preserve=[one, two]), factor(gone, thing, preserve=[]))


def test_styles_are_averaged_whatever_their_length(sd1: Path) -> None:
    """Names of one and of two tokens: the last ones are averaged, and so is all that follows."""
    encoder = open_checkpoint(sd1).encoder
    one = next(word for word in words() if len(encoder.tokenize([word])[0]) == 3)
    two = f"{one} {one}"
    assert average_words(encoder, {"gone"}, [one, two, "gone"], styles=True) == [one, two]
    assert average_words(encoder, set(), [one], styles=True) == average_words(encoder, set(), [one])
    (found,) = average_targets(encoder, ["art by {}"], [one, two], 1).values()
    short, long = (e.states for e in encoder.encode([f"art by {one}", f"art by {two}"], 1))
    start = len(short) - 3  # of the name; the end token and one of padding follow it
    assert torch.allclose(found.states[:start], short[:start], atol=1e-5)  # causal: the same before the name
    assert torch.allclose(found.states[start:], (short[start:] + long[start + 1 :]) / 2, atol=1e-5)
    assert not torch.allclose(long[start + 1 :], long[start:-1], atol=1e-3)


def test_a_style_is_solved_towards_the_styles_that_stay(sd1: Path) -> None:
    kept = [word for word in words() if word not in ("cat", "art")][:2]
    config = replace(QUICK, strength=0.8, overshoot=0, kind="style")
    found = edit_model(sd1, ["cat"], preserve=kept, config=config)
    assert found.edit.concepts[0].target == AVERAGE
    assert found.edit.residual[0] < 0.3
    again = edit_model(sd1, ["cat"], target=AVERAGE, preserve=kept, config=config)
    assert torch.equal(found.edit.cross.factor.delta(), again.edit.cross.factor.delta())


def test_the_average_is_the_mean_of_its_words(sd1: Path) -> None:
    encoder = open_checkpoint(sd1).encoder
    chosen = [word for word in words() if len(encoder.tokenize([word])[0]) == 3][:4]
    (found,) = average_targets(encoder, ["a picture of {}", "a picture of {}"], chosen, 2).values()
    each = [one.states for one in encoder.encode([f"a picture of {word}" for word in chosen], 2)]
    assert torch.allclose(found.states, torch.stack(each).mean(0))
    assert not any(torch.allclose(found.states, one, atol=1e-3) for one in each)


def test_what_is_erased_is_not_in_the_average(sd1: Path) -> None:
    """The preserved names if there are enough of one token, else everyday things, else one word."""
    encoder = open_checkpoint(sd1).encoder
    single = [word for word in words() if len(encoder.tokenize([word])[0]) == 3]
    assert len(single) > FEWEST + 1
    assert average_words(encoder, {single[0]}, ["two words", *single[: FEWEST + 1]]) == single[1 : FEWEST + 1]
    few = average_words(encoder, set(), single[: FEWEST - 1])
    assert few == [INSTEAD] or set(few) <= set(THINGS.split())
    assert average_words(encoder, set(THINGS.split()), []) == [INSTEAD]


def test_an_average_target_is_solved_for(sd1: Path) -> None:
    """What is left, measured from the average itself, is what was asked for; and it is not the edit to "object"."""
    single = [word for word in words() if word not in ("cat", "object")][:40]
    config = replace(QUICK, strength=0.8, overshoot=0)
    average = edit_model(sd1, ["cat"], target=AVERAGE, preserve=single, config=config)
    assert average.edit.residual[0] == pytest.approx(0.2, abs=0.05)
    other = edit_model(sd1, ["cat"], target="object", preserve=single, config=config)
    assert (average.edit.cross.factor.delta() - other.edit.cross.factor.delta()).norm() > 0.1
    assert average.to_dict()["concepts"][0]["target"] == AVERAGE


@pytest.mark.filterwarnings("ignore:.* names keep more than was asked")  # of random weights
def test_a_recipe_leaves_the_default_strength_out(sd1: Path) -> None:
    for robust in (0, 1):
        for strength, said in ((None, False), (0.5, True)):
            concepts = [Concept("cat", strength=strength), "dog"]
            data = edit_model(sd1, concepts, config=replace(QUICK, strength=None, robust=robust)).to_dict()
            found = recipe_of(data)
            assert found is not None
            written = "".join((*found.commands, *found.files.values()))
            assert ('"strength"' in written) is said, (robust, written)


def test_the_default_strength_falls_with_the_number_of_names(sd1: Path) -> None:
    for overshoot, wanted in ((0.5, (0.8, 0.8, 0.8, 0.7, 0.65, 0.65)), (0, (0.8, 0.752, 0.7, 0.65, 0.6, 0.6))):
        config = EditConfig(overshoot=overshoot)
        found = [round(config.strength_for(count), 3) for count in (1, 3, 10, 50, 100, 10_000)]
        assert found == [*wanted], overshoot
    assert EditConfig(strength=0.3).strength_for(50) == 0.3
    assert EditConfig(robust=2).strength_for(1) == pytest.approx(0.7)
    assert EditConfig(robust=2).strength_for(10) == pytest.approx(0.6)
    assert EditConfig(robust=2, strength=0.8).strength_for(1) == 0.8
    quick = replace(QUICK, strength=None, overshoot=0)
    both = edit_model(sd1, ["cat", Concept("dog", strength=0.4)], config=quick).edit
    assert [c.strength for c in both.concepts] == [quick.strength_for(2), 0.4]
    assert both.residual.tolist() == pytest.approx([1 - quick.strength_for(2), 0.6], abs=0.1)
