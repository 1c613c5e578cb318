"""The geometry report: every number against the states and weights it stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import QUICK, run

from realera_edit import EditConfig, RealEraWarning, edit_model
from realera_edit.apply import apply_factor
from realera_edit.attack import embedding_attack, score
from realera_edit.edit import EditResult
from realera_edit.errors import CheckpointError
from realera_edit.geometry import DAMAGING, Geometry, Moved
from realera_edit.layers import Layers, metric, text_weights
from realera_edit.neighbours import Region
from realera_edit.solve import drift
from realera_edit.transfer import apply_edit

ONE = replace(QUICK, contexts=("{}",), padding=1)


@pytest.fixture
def result(sd1: Path) -> EditResult:
    kept = ["dog", "a small house by the river"]
    prior = ["dog", "cat", "horse", "lake", "simple", "ember"]
    return edit_model(sd1, ["cat", "red bird"], target="person", preserve=kept, prior=prior, config=ONE)


def ends(result: EditResult, *prompts: str) -> torch.Tensor:
    """End-token states."""
    encoded = result.source.encoder.encode(list(prompts), 1)
    return torch.stack([e.states[len(e.ids) - 1] for e in encoded]).double()


def test_residuals_by_name_and_by_position(result: EditResult) -> None:
    geometry, factor = result.geometry(), result.edit.cross.factor
    assert [name.residual for name in geometry.names] == pytest.approx(result.edit.residual.tolist(), rel=1e-9)
    assert list(geometry.names[0].places) == ["token 1", "end", "padding"]
    assert list(geometry.names[1].places) == ["token 1", "token 2", "end", "padding"]
    for name, text in zip(geometry.names, ("cat", "red bird"), strict=True):
        x, y = ends(result, text), ends(result, "person")
        left = float((factor.map(x) - y).norm() / (x - y).norm())
        assert name.places["end"] == pytest.approx(left, rel=1e-6)
        assert name.moved == pytest.approx(float(drift(factor, x)), rel=1e-6)
    assert [name.leverage for name in geometry.names] == result.edit.cross.leverage.tolist()
    assert geometry.condition == result.edit.cross.condition


def test_the_most_moved_words_come_first_by_name_and_erased_ones_are_left_out(result: EditResult) -> None:
    geometry = result.geometry()
    words = [word.name for word in geometry.words]
    assert "cat" not in words
    assert "dog" in words
    assert len(words) == 5
    moved = drift(result.edit.cross.factor, ends(result, *words))
    assert [word.moved for word in geometry.words] == pytest.approx(moved.tolist(), rel=1e-5)
    assert all(one.moved >= two.moved for one, two in zip(geometry.words, geometry.words[1:], strict=False))
    expected = {name: (mean, worst) for name, mean, worst in result.edit.drift}
    assert {p.name: (pytest.approx(p.moved), pytest.approx(p.worst)) for p in geometry.preserved} == expected


def test_weighted_norms_are_those_of_all_layers(result: EditResult) -> None:
    weights = [w for _, p, w in text_weights(result.source) if p.role in "kv"]
    new = apply_factor(result.edit.cross.factor, [w.double() for w in weights])
    stacked, edited = torch.cat([w.double() for w in weights]), torch.cat(new)
    geometry, plain = result.geometry(weighted=True), result.geometry()
    assert geometry.weighted
    for word in geometry.words[:5]:
        r = ends(result, word.name)[0]
        assert word.moved == pytest.approx(float((edited @ r - stacked @ r).norm() / (stacked @ r).norm()), rel=1e-5)
    x, y = ends(result, "cat")[0], ends(result, "person")[0]
    left = (edited @ x - stacked @ y).norm() / (stacked @ (x - y)).norm()
    assert geometry.names[0].places["end"] == pytest.approx(float(left), rel=1e-5)
    # control: the text space's own norms are others
    assert plain.names[0].places["end"] != pytest.approx(float(left), rel=1e-3)


@pytest.mark.parametrize("cosines", [(0.0, 1.0), (0.93, 0.99)])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_neighbour_passes_the_worst_case(result: EditResult, cosines: tuple[float, float], weighted: bool) -> None:
    result.config = replace(result.config, cos_min=cosines[0], cos_max=cosines[1])
    geometry, factor = result.geometry(weighted=weighted), result.edit.cross.factor
    weights = [w.double() for _, p, w in text_weights(result.source) if p.role in "kv"]
    layers = torch.cat(weights) if weighted else torch.eye(96, dtype=torch.float64)
    x, y = ends(result, "cat"), ends(result, "person")
    region = Region(96, result.config.radius, *cosines)
    z = region.around(x.expand(2000, -1), torch.Generator().manual_seed(0))
    # samples that head for the concept and away from its target, too
    z = torch.cat([z, x + torch.linspace(0, 1, 50, dtype=torch.float64)[:, None] * 0.5 * (x - y)])
    z = z[(z - x).norm(dim=1) <= result.config.radius * x.norm()]
    cosine = torch.nn.functional.cosine_similarity(z, x)
    z = z[(cosine >= cosines[0]) & (cosine <= cosines[1])]
    mapped = factor.map(z)
    start = (layers @ (factor.map(x) - x).T).norm()
    regained = 1 - (layers @ (mapped - x).T).norm(dim=0) / start
    farthest = (layers @ (mapped - y).T).norm(dim=0) / (layers @ (x - y).T).norm()
    cat = geometry.names[0]
    assert len(z) > 500
    assert float(regained.max()) <= cat.regained <= 1
    assert float(farthest.max()) <= cat.farthest
    ball = result.geometry(weighted=weighted, quick=True).names[0]
    assert (ball.regained >= cat.regained - 1e-9) & (ball.farthest >= cat.farthest * (1 - 1e-5))
    if cosines[0] == 0:
        assert (ball.regained, ball.farthest) == pytest.approx((cat.regained, cat.farthest))
    else:  # the cap cuts the ball, and the bound is tighter
        assert ball.farthest > cat.farthest * 1.01


@pytest.mark.parametrize("weighted", [False, True])
def test_the_worst_neighbour_over_the_ball_is_attained(result: EditResult, weighted: bool) -> None:
    """The attack without ridge, within the same radius, comes back exactly as far as the report says."""
    matrix = torch.eye(96, dtype=torch.float64) + result.edit.cross.factor.delta()
    layers = Layers.of_factor(matrix, metric(result.source) if weighted else torch.eye(96, dtype=torch.float64))
    for name in result.geometry(weighted=weighted, quick=True).names:
        x = ends(result, name.name)
        (found,) = embedding_attack(layers, x, (result.config.radius,), ridge=0)
        assert score(layers, found, x).success == pytest.approx(name.regained, rel=1e-6)
        assert 0.05 < name.regained < 1


def test_as_plain_types_and_as_text(result: EditResult) -> None:
    geometry = result.geometry()
    data = json.loads(json.dumps(geometry.to_dict(), allow_nan=False))
    assert data["words_measured"] == 5
    assert data["names"][0]["places"].keys() == {"token 1", "end", "padding"}
    text = geometry.report()
    assert all(word.name in text for word in geometry.words[:3])
    assert "a small house by the river" in text
    assert "way back to" in text


def test_a_warning_names_what_moved_too_far(result: EditResult) -> None:
    def moved(name: str, share: float) -> Moved:
        return Moved(name, share, share)

    words = (moved("bird", 0.9), moved("lake", DAMAGING + 0.1), moved("sea", DAMAGING - 0.1))
    geometry: Geometry = replace(result.geometry(), words=words, preserved=(moved("dog", 0.7),), typical=0.1)
    with pytest.warns(RealEraWarning, match=r"^2 preserved entries or frequent words .* dog \(0.70\), lake \(0.60\)\."):
        geometry.warn()
    # "bird" is a part of the erased "red bird"; where all words move, none stands out; a warning would be an error here
    replace(geometry, preserved=(), typical=0.3).warn()
    replace(geometry, preserved=(moved("dog", 0.4),), words=words[::2]).warn()


def test_erase_prints_the_summary(sd1: Path, tmp_path: Path) -> None:
    said = run("erase", sd1, "cat", "-o", tmp_path / "out", "--prior-words", "60", "--beyond", "0")
    assert said.exit_code == 0
    (moved,) = [line for line in said.stdout.splitlines() if line.startswith("moved ")]
    assert "of 60 words most:" in moved
    assert "way back to cat" in said.stdout


def test_a_stored_edit_has_no_states_to_measure(result: EditResult, sd1: Path, tmp_path: Path) -> None:
    path = result.save_edit(tmp_path / "edit.safetensors")
    with pytest.raises(CheckpointError, match="compute the edit anew"):
        apply_edit(path, sd1).geometry()


def test_a_radius_of_nothing_is_the_state_itself(sd1: Path) -> None:
    (name,) = edit_model(sd1, ["cat"], config=replace(ONE, radius=0.0)).geometry(quick=True).names
    assert name.regained == pytest.approx(0, abs=1e-6)
    assert name.farthest == pytest.approx(name.places["end"], rel=1e-6)


def test_without_a_prior_there_are_no_words(sd1: Path) -> None:
    geometry = edit_model(sd1, ["cat"], config=EditConfig(prior_words=0, beyond=0)).geometry()
    assert geometry.words == ()
    assert len(geometry.summary()) == 1
