"""Attacks in closed form: optimal, within their budget, and what they say about weights anybody edited; the defence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUICK, run

from realera_edit import EditConfig, attack_model, edit_model
from realera_edit.attack import attack, embedding_attack, factor_of, inverse_attack, nearest_words, score
from realera_edit.checkpoint import open_checkpoint
from realera_edit.edit import EditResult
from realera_edit.errors import ConceptError, ConfigError, ProjectionError
from realera_edit.layers import Layers, compare, metric, text_weights
from realera_edit.robust import BUDGET, RIDGE, harden
from realera_edit.solve import Factor, Solution
from realera_edit.statistics import Pairs

D = 12


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W = normal(40, D, seed=1)  # all layers, stacked
M = torch.eye(D, dtype=torch.float64) - 0.3 * torch.outer(normal(D, seed=2), normal(D, seed=3))
NEW = W @ M
LAYERS = Layers(NEW.T @ NEW, NEW.T @ W, W.T @ W, 1)
C = normal(3, D, seed=4)
BUDGETS = (0.05, 0.3, 1.0)


def objective(rows: torch.Tensor, ridge: float) -> torch.Tensor:
    """The loss of each row of the attack [n, d] against C, from the weights themselves."""
    lam = ridge * float((NEW.T @ NEW).trace()) / D
    return (rows @ NEW.T - C @ W.T).square().sum(1) + lam * rows.square().sum(1)


def test_without_a_budget_it_is_the_ridge_solution_of_all_layers() -> None:
    (found,) = embedding_attack(LAYERS, C, (None,), ridge=0.1)
    lam = 0.1 * float((NEW.T @ NEW).trace()) / D
    design = np.concatenate([NEW.numpy(), lam**0.5 * np.eye(D)])
    goal = np.concatenate([(C @ W.T).numpy().T, np.zeros((D, len(C)))])
    np.testing.assert_allclose(found.numpy().T, np.linalg.lstsq(design, goal, rcond=None)[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_within_a_budget_nothing_beats_it(ridge: float) -> None:
    for budget, rows in zip(BUDGETS, embedding_attack(LAYERS, C, BUDGETS, ridge), strict=True):
        limit = budget * C.norm(dim=1)
        assert bool(((rows - C).norm(dim=1) <= limit * (1 + 1e-12)).all())
        best = objective(rows, ridge)
        for seed in range(300):
            step = normal(*C.shape, seed=seed)
            step *= (limit / step.norm(dim=1))[:, None]
            near = rows - C + 0.05 * step  # the neighbourhood of the optimum, pulled back into the ball
            near *= (limit / near.norm(dim=1)).clamp_max(1)[:, None]
            for other in (C + step, C + near):
                assert bool((objective(other, ridge) >= best * (1 - 1e-9)).all())
    # control: an attack that may go further does beat it
    (free,) = embedding_attack(LAYERS, C, (None,), ridge)
    assert bool((objective(free, ridge) <= best * (1 + 1e-9)).all())


def test_the_inverse_reads_like_the_concept_and_its_budget_binds() -> None:
    *limited, free = inverse_attack(M, C, (*BUDGETS, None))
    torch.testing.assert_close(free @ NEW.T, C @ W.T)
    assert score(LAYERS, free, C).success == pytest.approx(1, abs=1e-6)
    assert score(LAYERS, free, C).cosine == pytest.approx(1)
    misses = []
    for budget, rows in zip(BUDGETS, limited, strict=True):
        assert bool(((rows - C).norm(dim=1) <= budget * C.norm(dim=1) * (1 + 1e-12)).all())
        miss = (rows @ M.T - C).norm(dim=1)
        misses.append(float(miss.norm()))
        for seed in range(50):  # nothing near it within the budget is nearer to the concept
            near = rows - C + 0.05 * budget * normal(*C.shape, seed=seed)
            near *= (budget * C.norm(dim=1) / near.norm(dim=1)).clamp_max(1)[:, None]
            assert bool((((C + near) @ M.T - C).norm(dim=1) >= miss * (1 - 1e-9)).all())
    assert misses == sorted(misses, reverse=True)
    assert misses[0] > 1e-3
    singular = torch.eye(D, dtype=torch.float64)
    singular[0, 0] = 0
    assert inverse_attack(singular, C, (None,)) == [None]
    assert inverse_attack(singular, C, (0.1,))[0] is not None


def test_scores_are_those_of_the_outputs() -> None:
    rows = C + 0.2 * normal(*C.shape, seed=9)
    goal, start, got = C @ W.T, C @ NEW.T, rows @ NEW.T
    scored = score(LAYERS, rows, C)
    distance = float((got - goal).norm() / goal.norm())
    assert scored.distance == pytest.approx(distance)
    assert scored.success == pytest.approx(1 - distance / float((start - goal).norm() / goal.norm()))
    assert scored.cosine == pytest.approx(float((got * goal).sum() / (got.norm() * goal.norm())))
    assert score(LAYERS, C, C).success == 0
    untouched = Layers(LAYERS.original, LAYERS.original, LAYERS.original, 1)
    assert score(untouched, rows, C).success == 0  # nothing was taken, nothing to regain


def test_the_nearest_words_are_the_nearest() -> None:
    bank, words = normal(50, D, seed=8), [f"w{i}" for i in range(50)]
    goal = W @ C[0]
    after = (NEW @ bank.T - goal[:, None]).norm(dim=0) / goal.norm()
    before = (W @ bank.T - goal[:, None]).norm(dim=0) / goal.norm()
    found = nearest_words(LAYERS, words, bank, C[0], 5)
    order = after.argsort()[:5].tolist()
    assert [w.word for w in found] == [words[i] for i in order]
    assert [w.scored.distance for w in found] == pytest.approx(after[order].tolist())
    assert [w.before for w in found] == pytest.approx(before[order].tolist())
    assert words[order[0]] not in [
        w.word for w in nearest_words(LAYERS, words, bank, C[0], 5, skip=words[order[0]].upper())
    ]


def test_the_factor_is_read_off_the_weights() -> None:
    torch.testing.assert_close(factor_of(LAYERS), M)
    # fewer rows than the width: what no layer reads is taken as unchanged, and the weights still agree
    few = W[:5]
    some = factor_of(Layers((few @ M).T @ few @ M, (few @ M).T @ few, few.T @ few, 1))
    torch.testing.assert_close(few @ some, few @ M)
    unseen = torch.linalg.svd(few)[2][5:]
    torch.testing.assert_close(unseen @ some, unseen)


def test_more_budget_is_never_less_success() -> None:
    report = attack(LAYERS, "c", C, budgets=BUDGETS, ridge=0)
    for kind in ("embedding", "inverse"):
        mine = [a.scored.success for a in report.attacks if a.kind == kind]
        assert len(mine) == len(BUDGETS) + 1
        assert kind == "inverse" or mine == sorted(mine)
        assert mine[-1] == pytest.approx(1, abs=1e-5)


# On models


def test_two_folders_are_compared_by_their_weights(sd1: Path, tmp_path: Path) -> None:
    result = edit_model(sd1, ["cat"], target="person", config=QUICK)
    result.save(tmp_path / "out", undo=False)
    edited = open_checkpoint(tmp_path / "out")
    layers = compare(result.source, edited)
    matrix = torch.eye(96, dtype=torch.float64) + result.edit.cross.factor.delta()
    known = Layers.of_factor(matrix, metric(result.source))
    assert layers.count == sum(1 for _ in text_weights(result.source))
    for name in ("edited", "mixed", "original"):
        torch.testing.assert_close(getattr(layers, name), getattr(known, name), rtol=1e-4, atol=1e-4)
    (report,) = attack_model(sd1, tmp_path / "out", "cat", words=60, top=3)
    by_kind = {(a.kind, a.budget): a for a in report.attacks}
    assert by_kind["inverse", None].scored.success == pytest.approx(1, abs=1e-2)
    assert 0 < by_kind["embedding", 0.1].scored.success < by_kind["embedding", 0.5].scored.success < 1
    assert len(report.words) == 3
    with pytest.raises(ConceptError, match="is empty"):
        attack_model(sd1, sd1, [""])
    with pytest.raises(ConfigError, match="positive"):
        attack_model(sd1, sd1, ["cat"], budgets=(-1.0,))


def test_an_edit_of_another_model_is_refused(sd1: Path, sdxl: Path) -> None:
    with pytest.raises(ProjectionError):
        compare(open_checkpoint(sd1), open_checkpoint(sdxl))


def test_the_command(sd1: Path, tmp_path: Path) -> None:
    edit_model(sd1, ["cat"], target="person", config=QUICK).save(tmp_path / "out", undo=False)
    said = run("attack", sd1, "--edited", tmp_path / "out", "cat", "dog", "--words", "60", "--budget", "0.2")
    assert said.exit_code == 0
    assert "concept    cat: erased to distance" in said.stdout
    assert "inverse    comes back" in said.stdout
    data = json.loads(run("attack", sd1, "--edited", tmp_path / "out", "cat", "--words", "0", "--json").stdout)
    (one,) = data["concepts"]
    assert one["concept"] == "cat"
    assert one["words"] == []
    assert {a["budget"] for a in one["attacks"]} == {0.1, 0.25, 0.5, 1.0, None}
    missing = run("attack", sd1, "--edited", tmp_path / "gone", "cat")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)


# The defence


def test_each_round_attacks_the_edit_of_the_round_before() -> None:
    target, group = normal(3, D, seed=5), torch.tensor([0, 0, 1])
    weight = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
    extra = torch.tensor([False, False, True])
    pairs, calls, metric_ = Pairs(C, target, weight, group, extra), [], W.T @ W
    factors = [Factor(0.3 * normal(D, D, seed=20 + k) / D**0.5, None) for k in range(4)]
    first = Solution(factors[0], torch.tensor([2.0, 3.0]), torch.tensor([5.0, 6.0]), 1.0, 0.0, 0.1)

    def again(grown: Pairs, group_weight: torch.Tensor) -> Solution:
        assert torch.equal(group_weight, first.group_weight)
        calls.append(grown)
        return replace(first, factor=factors[len(calls)], leverage=torch.full((2,), torch.nan))

    last = harden(first, pairs, again, 3, metric_)
    assert last.factor is factors[3]
    assert torch.equal(last.leverage, first.leverage)
    assert [len(grown.x) for grown in calls] == [5, 7, 9]  # two own rows; the exact moments of a cloud are no prompt
    eye = torch.eye(D, dtype=torch.float64)
    for k, grown in enumerate(calls):
        (wanted,) = embedding_attack(Layers.of_factor(eye + factors[k].left, metric_), C[:2], (BUDGET,))
        torch.testing.assert_close(grown.x[-2:], wanted)
        assert torch.equal(grown.x[: len(pairs.x)], C)
        assert torch.equal(grown.y[-2:], target[:2])
        torch.testing.assert_close(grown.weight[-2:], weight[:2] / (k + 3))
        torch.testing.assert_close(grown.weight[:2], weight[:2] * 2 / (k + 3))
        assert grown.weight[2] == weight[2]
        assert torch.equal(grown.group[-2:], group[:2])
        assert bool(grown.extra[3:].all())
        total = torch.zeros(2, dtype=torch.float64).index_add_(0, grown.group, grown.weight)
        torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


def attacked(result: EditResult, name: str) -> dict[str, float]:
    """Success of the embedding attack and of the inverse within 0.5, on all layers."""
    matrix = torch.eye(result.edit.cross.factor.width, dtype=torch.float64) + result.edit.cross.factor.delta()
    layers = Layers.of_factor(matrix, metric(result.source))
    states = result.source.encoder.encode([name], 2)[0].states[1:]
    report = attack(layers, name, states, budgets=(0.5,))
    return {a.kind: a.scored.success for a in report.attacks if a.budget is not None}


def test_robust_rounds_lower_the_attack_that_they_saw_and_another_at_a_cost_in_drift(emoji: Path) -> None:
    plain_too = EditConfig(strength=0.8, overshoot=0)  # which robust has no use for
    results = [edit_model(emoji, ["pizza"], preserve=["guitar"], config=replace(plain_too, robust=n)) for n in (0, 2)]
    plain, robust = (attacked(result, "pizza") for result in results)
    assert robust["embedding"] < plain["embedding"] - 0.3
    assert robust["inverse"] < plain["inverse"] - 0.3
    one, two = (result.geometry() for result in results)
    # the price, which the documentation states
    assert one.typical < two.typical < 3 * one.typical
    assert one.preserved[0].moved < two.preserved[0].moved
    # the name itself is about as erased as was asked, although attacks share its weight
    assert two.names[0].residual == pytest.approx(one.names[0].residual, abs=0.05)
    # the worst neighbour in text space comes back less far, too
    assert two.names[0].regained < one.names[0].regained - 0.1


@pytest.mark.filterwarnings("ignore:1 of 1 names keep more")  # as states of random weights share most of themselves
def test_robust_on_a_tiny_model_with_a_pooled_path(sdxl: Path) -> None:
    plain = edit_model(sdxl, ["cat"], config=QUICK).edit
    again = edit_model(sdxl, ["cat"], config=replace(QUICK, robust=0)).edit
    robust = edit_model(sdxl, ["cat"], config=replace(QUICK, robust=2)).edit
    assert torch.equal(plain.cross.factor.delta(), again.cross.factor.delta())
    for one, two in ((plain.cross, robust.cross), (plain.pooled, robust.pooled)):
        assert one is not None
        assert two is not None
        assert not torch.equal(one.factor.delta(), two.factor.delta())
        assert two.ridge == pytest.approx(RIDGE / QUICK.ridge * one.ridge)


@pytest.mark.filterwarnings("ignore:1 of 1 names keep more")  # as states of random weights share most of themselves
def test_nothing_is_encoded_for_a_robust_round(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rounds in (0, 3):
        calls: list[int] = []
        encoder = open_checkpoint(sd1).encoder
        original = type(encoder)._forward
        with monkeypatch.context() as patch:
            patch.setattr(
                type(encoder), "_forward", lambda self, *a, o=original, c=calls: (c.append(1), o(self, *a))[1]
            )
            edit_model(sd1, ["cat"], config=replace(QUICK, robust=rounds))
        counts.append(len(calls))
    # the second finds the prior in the cache
    assert counts[1] <= counts[0]
    assert counts[1] > 0
