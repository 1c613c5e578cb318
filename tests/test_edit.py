"""The library call as a whole: what an edit does to the projections of the text."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUICK

from realera_edit import Concept, EditConfig, RealEraWarning, edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.compute import overshot
from realera_edit.errors import CheckpointError, ConceptError, ConfigError, EncodingError
from realera_edit.pairs import build_pairs, list_groups
from realera_edit.solve import drift, residuals


def states(encoder: Any, prompt: str, positions: int = 2) -> torch.Tensor:
    """States of the last word, the end token and the padding of a prompt."""
    encoded = encoder.encode([prompt], positions)[0]
    rows: torch.Tensor = encoded.states[len(encoded.ids) - 2 :]
    return rows.double()


def moved(factor: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """|M x - y| / |x - y|: 1 before an edit, 0 when x is mapped like y."""
    return float((factor.map(x) - y).norm() / (x - y).norm())


def test_the_concept_reads_like_its_target_and_the_kept_like_themselves(emoji: Path) -> None:
    """On the real model, in a context that the edit has not seen."""
    config = EditConfig(strength=0.9, overshoot=0)
    result = edit_model(emoji, ["pizza"], preserve=["guitar"], config=config)
    encoder, factor = result.source.encoder, result.edit.cross.factor
    erased = states(encoder, "an emoji of a pizza")
    assert moved(factor, erased, states(encoder, "an emoji of a object")) < 0.5
    for kept in ("an emoji of a guitar", "an emoji of a rocket"):
        assert float(drift(factor, states(encoder, kept)).mean()) < 0.35 * float(drift(factor, erased).mean())
    empty = encoder.encode([""], encoder.max_length)[0].states.double()
    assert float(drift(factor, empty).max()) < 1e-5
    assert result.edit.residual.tolist()[0] == pytest.approx(0.1, abs=0.03)


def test_an_alias_and_a_word_go_with_the_concept(emoji: Path) -> None:
    alone = edit_model(emoji, ["automobile"], config=EditConfig(words=0))
    encoder = alone.source.encoder
    x, y = states(encoder, "an icon of a motorcar"), states(encoder, "an icon of a object")
    joined = edit_model(emoji, [Concept("automobile", aliases=("motorcar",))], config=EditConfig(words=0))
    assert moved(joined.edit.cross.factor, x, y) < moved(alone.edit.cross.factor, x, y) - 0.05


def test_strength_is_a_dial(emoji: Path) -> None:
    left = [
        float(edit_model(emoji, ["pizza"], config=EditConfig(strength=strength, overshoot=0)).edit.residual[0])
        for strength in (0.0, 0.3, 0.6, 0.9)
    ]
    assert left == pytest.approx([1.0, 0.7, 0.4, 0.1], abs=1e-5)


def test_an_overshoot_moves_the_rest_less_for_the_same_concept(emoji: Path) -> None:
    """Its leading direction goes as far, in fewer others; what was asked is asked of the target further off."""
    plain, beyond = (
        edit_model(emoji, ["pizza"], config=EditConfig(strength=0.8, overshoot=o)).edit for o in (0.0, 0.5)
    )
    assert plain.rows is not None
    assert beyond.rows is not None
    pairs = overshot(beyond.rows.cross, 0.5)
    assert torch.equal(beyond.rows.cross.y, plain.rows.cross.y)  # what it becomes stays what it was
    torch.testing.assert_close(pairs.y - pairs.x, 1.5 * (plain.rows.cross.y - plain.rows.cross.x))
    asked = 1 - 0.8 / 1.5
    assert residuals(beyond.cross.factor, pairs).tolist() == pytest.approx([asked], abs=1e-5)
    assert beyond.missed.tolist() == pytest.approx([0.0], abs=1e-5)
    gap = plain.rows.cross.y - plain.rows.cross.x
    _, _, leading = torch.linalg.svd(gap.double(), full_matrices=False)
    along = [
        float(((e.cross.factor.map(plain.rows.cross.x) - plain.rows.cross.x) @ leading[0]).norm())
        for e in (plain, beyond)
    ]
    assert along[1] == pytest.approx(along[0], rel=0.1)
    assert beyond.prior is not None
    words = drift(plain.cross.factor, beyond.prior.last), drift(beyond.cross.factor, beyond.prior.last)
    assert float(words[1].mean()) < 0.9 * float(words[0].mean())


def test_a_robust_edit_does_not_overshoot(emoji: Path) -> None:
    one, two = (
        edit_model(emoji, ["pizza"], config=EditConfig(robust=1, strength=0.7, overshoot=o)).edit for o in (0.0, 0.5)
    )
    assert torch.equal(one.cross.factor.delta(), two.cross.factor.delta())


def test_a_concept_s_own_strength_wins(emoji: Path) -> None:
    result = edit_model(
        emoji, [Concept("pizza", strength=0.4), Concept("guitar")], config=EditConfig(strength=0.8, overshoot=0)
    )
    left = result.edit.residual.tolist()
    assert left[0] == pytest.approx(0.6, abs=0.05)
    assert left[1] == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("perturbation", "samples"), [("isotropic", 0), ("isotropic", 40), ("covariance", 0), ("covariance", 40)]
)
def test_every_perturbation_erases_and_depends_on_the_seed_only_when_drawn(
    emoji: Path, perturbation: str, samples: int
) -> None:
    config = EditConfig(perturbation=perturbation, samples=samples, words=2)
    plain = edit_model(emoji, ["pizza"], config=replace(config, perturbation="none")).edit.cross.factor.delta()
    first, again, other = (
        edit_model(emoji, ["pizza"], config=replace(config, seed=seed)).edit.cross.factor.delta() for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) is (samples == 0)
    assert not torch.equal(first, plain)


def test_sampled_neighbours_converge_to_the_analytic_edit(emoji: Path) -> None:
    for perturbation in ("isotropic", "covariance"):
        config = EditConfig(perturbation=perturbation, words=0)
        exact = edit_model(emoji, ["pizza"], config=config).edit.cross.factor.delta()
        errors = []
        for samples in (50, 5000):
            drawn = edit_model(emoji, ["pizza"], config=replace(config, samples=samples)).edit.cross.factor.delta()
            errors.append(float((drawn - exact).norm() / exact.norm()))
        assert errors[1] < errors[0] / 3, perturbation


def test_a_concept_with_the_states_of_its_target_is_refused(sd1: Path) -> None:
    """Whatever the check of the texts let through: equal states are a no-op edit."""
    encoder = open_checkpoint(sd1).encoder
    concepts = (Concept("cat", target="dog"), Concept("horse", target="horse"))
    groups = list_groups(concepts, ((), ()))
    with pytest.raises(ConceptError, match=r"'horse' and its target 'horse'.*change nothing"):
        build_pairs(encoder, concepts, groups, QUICK)


def test_the_user_is_told_when_a_concept_stays(sd1: Path) -> None:
    """Two concepts share the prompt "a cat" and contradict each other about what it becomes."""
    concepts = [Concept("cat", target="dog"), Concept("a cat", target="river")]
    config = replace(QUICK, strength=0.99, contexts=("{}", "a {}"))
    with pytest.warns(RealEraWarning, match="keep more than was asked"):
        edit_model(sd1, concepts, config=config)


def test_words_taken_with_the_concept_are_listed(emoji: Path) -> None:
    result = edit_model(emoji, ["pizza"], config=EditConfig(words=3, word_similarity=0.2))
    words = [group.name for group in result.edit.groups if group.role == "word"]
    assert len(words) == 3
    assert all(word in result.report() for word in words)


def test_the_pooled_path_has_a_factor_of_its_own(sdxl: Path) -> None:
    result = edit_model(sdxl, ["cat"], config=QUICK)
    assert result.edit.pooled is not None
    assert result.edit.pooled.factor.width == 72
    assert result.edit.cross.factor.width == 144
    assert result.counts()["pooled_edited"] == 1
    off = edit_model(sdxl, ["cat"], config=replace(QUICK, pooled=False))
    assert off.edit.pooled is None
    assert off.counts()["pooled_edited"] == 0


def test_a_thousand_concepts_in_one_call(emoji: Path) -> None:
    names = [f"{word} number {i}" for i, word in enumerate(["pizza", "guitar", "rocket", "owl"] * 250)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RealEraWarning)
        result = edit_model(emoji, names, config=EditConfig(words=0, contexts=("{}",)))
    assert len(result.to_dict()["concepts"]) == 1000
    assert bool(torch.isfinite(result.edit.cross.factor.delta()).all())


def test_one_preserved_name_is_not_split_into_letters(sd1: Path) -> None:
    assert edit_model(sd1, "cat", preserve="dog", prior="a red house", config=QUICK).preserve == ("dog",)


def test_bad_calls_are_our_errors(emoji: Path) -> None:
    with pytest.raises(CheckpointError, match="has no U-Net"):
        edit_model(object(), ["cat"])
    with pytest.raises(EncodingError, match="Shorten the name"):
        edit_model(emoji, ["cat " * 500])
    with pytest.raises(ConfigError, match="no neighbour has cosine"):
        edit_model(emoji, ["cat"], config=EditConfig(perturbation="isotropic", radius=0.1, cos_min=0.0, cos_max=0.5))
    with pytest.raises(ConfigError, match=r"strength = 1.5: expected 0 to"):
        EditConfig(strength=1.5)
    with pytest.raises(ConfigError, match=r"write \{\} once"):
        EditConfig(contexts=("a photo",))
    with pytest.raises(CheckpointError, match="was not changed"):
        edit_model(emoji, ["pizza"]).undo()


def test_encoder_is_the_only_model_that_is_loaded(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The U-Net of a folder is never built."""
    import diffusers

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "__init__", refuse)
    edit_model(emoji, ["pizza"])
    open_checkpoint(emoji)
