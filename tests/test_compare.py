"""The comparison's bookkeeping, on a tiny random model with a judge that only counts pixels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

from benchmarks import compare, pooling, residue, styles
from benchmarks.quality import PLAIN, Bench, Rate, Settings
from benchmarks.reference_model.pictures import Concept
from benchmarks.reference_model.sampler import PictureStore, load_pipeline
from benchmarks.reference_model.splits import Alias, split_of

SMALL = Settings(1, 2.0, (0,), (100,), 0.0, 0.0, ("noto",), aliases=1, split_aliases=False, neighbours=2, far=3)
STYLES = ("red", "small", "black", "round")


class StubJudge:
    """Sums pixels: the same picture gets the same answer, and another picture mostly another one."""

    styles = ("noto", "fluent")

    def __init__(self, labels: list[str]) -> None:
        self.labels, self.index = tuple(labels), {label: i for i, label in enumerate(labels)}

    def __call__(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        sums = torch.as_tensor(pictures).long().flatten(1).sum(1)
        return sums % len(self.labels), sums % 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bench over the words of a tiny model, made without a download; its folder is `bench.model`."""
    base = tmp_path_factory.mktemp("bench")
    model = tiny_models.build_folder("sd1", base / "sd1", base / "scratch")
    labels = [word for word in tiny_models.words() if split_of(word) == "development"][:24]
    made: Any = Bench.__new__(Bench)
    made.settings, made.judge, made.labels, made.model = SMALL, StubJudge(labels), labels, model
    made.concepts = {label: Concept(label, i % 3, i % 5) for i, label in enumerate(labels)}
    made.names = {label: (Alias(f"large {label}", False),) for label in labels}
    made.unseen = {(label, f"large {label}") for label in labels[::2]}
    made.known = {}
    made.pipe = load_pipeline(model)
    made.store = PictureStore(made.pipe, base / "pictures.sqlite", SMALL.steps, SMALL.guidance)
    made.similarity = made._similarity()
    yield made
    made.store.database.close()


@pytest.fixture
def run(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`run(*arguments, results=NAME)`: the printed JSON of one comparison."""

    def call(*arguments: str, results: str = "rows.jsonl") -> Any:
        fixed = ["--model", str(bench.model), "--results", str(tmp_path / results), "--threads", "1", "--json"]
        compare.main([*fixed, *arguments], bench)
        return json.loads(capsys.readouterr().out)

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_rows_are_complete_and_a_run_resumes(
    bench: Any, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--editors", "ours", "uce", "speed+", "--concepts", "1", "2", "--draws", "1")
    first = run(*arguments)
    rows = lines(tmp_path / "rows.jsonl")
    assert [(row["concepts"], row["editor"]) for row in rows] == [
        (count, name) for count in (1, 2) for name in ("ours", "uce", "speed+")
    ]
    assert rows[3]["erased"][:1] == rows[0]["erased"]  # nested
    for row in rows:
        assert row["edit_seconds"] > 0
        assert not {*row["erased"]} & {*row["retain"], *row["far"]}
        assert not {*row["retain"]} & {*row["far"]}
        assert row["retain"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["command"].startswith("python -m benchmarks.compare --model")
        assert (row["threads"], row["seed"], row["device"]) == (1, 0, "cpu")
        assert row["edited"]["acc_e"]["count"] == 3 * row["concepts"]
        unseen = [label for label in row["erased"] if (label, f"large {label}") in bench.unseen]
        assert row["edited"]["acc_g_unseen"]["count"] == 2 * len(unseen) <= row["edited"]["acc_g"]["count"]
        for label, parts in row["by_concept"].items():
            assert (parts["H_4_unseen"] is None) == (label not in unseen)
            assert label not in unseen or parts["H_4_unseen"] == parts["H_4"]  # its only alias
    monkeypatch.setattr(compare, "measured", lambda *_: pytest.fail("a row was measured again"))
    again = run(*arguments)
    assert again["rows"] == first["rows"]
    assert len(lines(tmp_path / "rows.jsonl")) == 6


def test_each_editor_starts_from_the_unedited_model(run: Callable[..., Any], tmp_path: Path) -> None:
    """A row does not depend on who was before it."""
    run("--editors", "ours", "uce", "--concepts", "2", "--draws", "1", results="both.jsonl")
    run("--editors", "uce", "--concepts", "2", "--draws", "1", results="one.jsonl")
    both, one = lines(tmp_path / "both.jsonl")[1], lines(tmp_path / "one.jsonl")[0]
    assert both["key"] == one["key"]
    assert both["by_concept"] == one["by_concept"]
    assert both["drift"] == pytest.approx(one["drift"], abs=1e-9)
    assert both["drift"] > 0
    run("--editors", 'uce{"lamb": 1e9}', "--concepts", "2", "--draws", "1", results="one.jsonl")
    added = lines(tmp_path / "one.jsonl")[1]
    assert added["settings"]["lamb"] == 1e9
    assert added["drift"] < 0.1 * one["drift"]


def test_residue_is_of_words_that_draw_a_concept_and_never_name_it(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residue, "ALIKE", -1.0)  # a random model draws no two words alike
    results = tmp_path / "words.jsonl"
    fixed = [
        "--model",
        str(bench.model),
        "--results",
        str(results),
        "--threads",
        "1",
        "--concepts",
        "2",
        "--draws",
        "2",
    ]
    residue.main([*fixed, "--most", "3", "--editors", "ours", 'uce{"lamb": 1e9}'], bench)
    rows, shown = lines(results), capsys.readouterr().out
    assert [(row["draw"], row["editor"]) for row in rows] == [
        (draw, name) for draw in (0, 1) for name in ("ours", 'uce{"lamb": 1e9}')
    ]
    for ours, nothing in (rows[:2], rows[2:]):
        assert ours["words"] == nothing["words"]
        assert [name for name, _, _ in ours["words"]] == [name for name in ours["erased"] for _ in range(3)]
        assert not {word for _, word, _ in ours["words"]} & {*bench.labels}
        assert ours["all"]["count"] == ours["unedited"]["count"] == len(PLAIN) * len(ours["words"])
        assert ours["far"]["count"] == len(PLAIN) * sum(far for _, _, far in ours["words"])
        # an edit that changes next to nothing leaves them all
        assert nothing["all"] == nothing["unedited"]
        assert nothing["far"] == nothing["unedited far"]
    assert any(row["all"] != row["unedited"] for row in rows)
    assert "| 2 | unedited | 2 |" in shown
    monkeypatch.setattr(residue, "measured", lambda *_: pytest.fail("a row was measured again"))
    residue.main([*fixed, "--most", "3", "--editors", "ours", 'uce{"lamb": 1e9}'], bench)
    assert capsys.readouterr().out.splitlines()[:4] == shown.splitlines()[:4]
    residue.main([*fixed, "--table"], bench)
    assert capsys.readouterr().out.splitlines()[:4] == shown.splitlines()[:4]
    monkeypatch.undo()
    monkeypatch.setattr(residue, "ALIKE", 2.0)  # no word at all
    residue.main([*fixed, "--results", str(tmp_path / "none.jsonl"), "--editors", "ours"], bench)
    assert lines(tmp_path / "none.jsonl")[0]["all"] == {"hits": 0, "count": 0}


def test_words_that_the_judge_does_not_see_are_no_residue(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [name, *others] = bench.labels
    listed = ["near", "false", name, "far", others[0], "other"]
    alike = torch.tensor([[0.9, 0.95, 1.0, 0.85, 0.9, 0.5]])
    rank = torch.tensor([[1, 20, 0, 30, 2, 40]])
    words = residue.Words([name], listed, alike, rank)
    monkeypatch.setattr(bench, "accuracy", lambda pairs: [float(word != "false") for _, word in pairs])
    monkeypatch.setattr(bench, "settings", dataclasses.replace(SMALL, alias_threshold=0.5))
    assert words.of_concept(bench, name, 8) == [("far", True), (others[0], False), ("near", False)]
    assert words.of_concept(bench, name, 1) == [("far", True)]
    known = dataclasses.replace(words, labels=[name, others[0]], alike=alike.repeat(2, 1), rank=rank.repeat(2, 1))
    assert known.of_concept(bench, name, 8) == [("far", True), ("near", False)]  # another concept's name


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    compare.append_row(path, {"key": "a", "value": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    assert compare.read_rows(path) == {"a": {"key": "a", "value": 1}}
    compare.append_row(path, {"key": "c"})
    assert [*compare.read_rows(path)] == ["a", "c"]


def test_changed_settings_are_other_rows(bench: Any) -> None:
    one, two = compare.make_editor("uce", 1), compare.make_editor('uce{"lamb": 0.1, "contexts": ["a {}"]}', 1)
    assert two.described()["lamb"] == 0.1
    assert two.described()["contexts"] == ["a {}"]
    keys = {compare.key_of(bench, {"editor": e.name, "settings": e.described()}) for e in (one, two, one)}
    assert len(keys) == 2
    with pytest.raises(ValueError, match="'uce' has no such setting"):
        compare.make_editor('uce{"lambda": 1}', 1)
    with pytest.raises(ValueError, match="a JSON object"):
        compare.make_editor("uce{lamb=1}", 1)
    with pytest.raises(ValueError, match="editor 'ace'"):
        compare.make_editor("ace", 1)


def test_settings_by_the_number_of_concepts() -> None:
    assert compare.make_editor("speed", 1).described()["threshold"] == 1e-1
    assert compare.make_editor("speed", 10).described()["threshold"] == 1e-4
    assert compare.make_editor("mace", 1).prior
    assert not compare.make_editor("uce", 1).prior
    plus = compare.make_editor("uce+", 1)
    assert plus.prior
    assert plus.described()["tokens"] == "aligned"


def test_a_failed_edit_is_a_row(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise compare.RealEraError("no way")

    monkeypatch.setattr(compare.Editor, "__call__", fails)
    found = run("--editors", "uce", "--concepts", "1", "--draws", "1")
    assert lines(tmp_path / "rows.jsonl")[0]["error"] == "no way"
    assert found["rows"][0]["draws"] == 0
    assert "| 1 | uce | 0 | - |" in pooling.table(found["rows"])


def test_rows_are_pooled() -> None:
    def row(hits: int, h4: float | None) -> dict[str, Any]:
        rates = {name: {"hits": hits, "count": 10} for name in pooling.RATES}
        single = {"x": {"H_4": h4, "H_o": 0.5, "H_c": 0.5}}
        base = {"concepts": 1, "editor": "uce", "edited": rates, "original": rates, "by_concept": single}
        return {**base, "draw": hits, "drift": 0.1, "edit_seconds": 2.0}

    found = pooling.summary([row(2, 0.4), row(4, 0.8), row(9, None)])
    assert len(found) == 1
    assert found[0]["acc_e"]["mean"] == pytest.approx(0.5)
    assert found[0]["acc_e"]["count"] == 30
    assert found[0]["acc_e"]["ci"][0] == pytest.approx(0.3315, abs=1e-3)  # Wilson, 15 of 30
    assert found[0]["h4"]["mean"] == pytest.approx(0.6)
    assert found[0]["h4"]["count"] == 2
    assert (found[0]["draws"], found[0]["seconds"]) == (3, 2.0)
    assert "| 1 | unedited | - | 0.500 [0.332, 0.668] |" in pooling.table(found)
    # the curve has a point where there are enough far pictures, and none where two would decide it
    [line] = found
    many, few = ({**line, "concepts": n, "acc_s": {**line["acc_s"], "count": count}} for n, count in ((7, 20), (9, 2)))
    assert pooling.curves([many, few]) == pooling.curves([many])
    assert pooling.curves([many, few]) != pooling.curves([many, {**many, "concepts": 9}])


def test_named_neighbours_are_those_that_are_not_unseen() -> None:
    side = {"acc_n": {"hits": 7, "count": 10}, "acc_n_unseen": {"hits": 2, "count": 4}}
    assert pooling.part_of(side, "acc_n_retained") == {"hits": 5, "count": 6}
    assert pooling.part_of(side, "acc_n") == side["acc_n"]
    assert (
        pooling.part_of({"acc_n": side["acc_n"]}, "acc_n_retained") is None
    )  # a row of before the two were told apart


def test_the_lead_is_of_the_same_concepts_in_the_same_draws() -> None:
    """Where both have a figure; a concept of two draws is one concept of the interval."""

    def row(editor: str, draw: int, **h4: float | None) -> dict[str, Any]:
        parts = {name: {"H_4": value, "H_4_unseen": None, "H_o": 0.5, "H_c": 0.5} for name, value in h4.items()}
        rates = {name: {"hits": 1, "count": 2} for name in pooling.RATES}
        base = {"concepts": 2, "editor": editor, "draw": draw, "edited": rates, "original": rates}
        return {**base, "by_concept": parts, "drift": 0.1, "edit_seconds": 2.0}

    ours = [row("ours", 0, a=0.9, b=0.8), row("ours", 1, a=0.7, c=0.6)]
    other = [row("uce", 0, a=0.5, b=0.7), row("uce", 1, a=0.5, c=None)]
    first, second = pooling.summary([*ours, *other])
    assert "h4_lead" not in first
    lead = second["h4_lead"]
    assert lead["mean"] == pytest.approx((0.4 + 0.1 + 0.2) / 3)
    assert (lead["count"], lead["concepts"]) == (3, 2)
    assert lead["ci"] == [pytest.approx(0.1), pytest.approx(0.3)]  # b alone, a alone: never one draw of a
    assert second["h4_unseen_lead"]["mean"] is None
    assert f"{lead['mean']:.3f} [0.100, 0.300]" in pooling.table([first, second])


def test_a_set_without_enough_aliases_is_filled_up(bench: Any) -> None:
    """Those with an alias come first; fewer concepts than were asked for are an error."""
    few: Any = SimpleNamespace(qualified=lambda _: list("abcd"), drawn_aliases=lambda c: ("x",) * (c in "bd"))
    found = compare.nested_sets(few, "development", [2, 3], 0, 0)
    assert {*found[2]} == {"b", "d"}
    assert found[3][:2] == found[2]
    assert found[3][2] in "ac"
    with pytest.raises(ValueError, match="only 4 development concepts"):
        compare.nested_sets(few, "development", [5], 0, 0)


def test_aliases_of_one_split_or_all() -> None:
    """Those of the concept's own split, at most four; or up to eight of both. None that the model does not draw."""
    texts = [f"name {number}" for number in range(40)]
    drawn = {text for number, text in enumerate(texts) if number % 3}
    found = {}
    for flag in ((), ("--all-aliases",)):
        few: Any = SimpleNamespace(
            settings=compare.settings_of(compare.parse(["--model", "emoji", *flag])),
            names={"cat": tuple(Alias(text, False) for text in texts)},
            accuracy=lambda pairs: [float(name in drawn) for _, name in pairs],
        )
        found[flag] = Bench.drawn_aliases(few, "cat")
    halves = [{split_of(name) for name in names} for names in found.values()]
    assert halves == [{split_of("cat")}, {"development", "report"}]
    assert [len(names) for names in found.values()] == [4, 8]
    assert drawn.issuperset(name for names in found.values() for name in names)


def test_rows_with_another_target_are_not_pooled(run: Callable[..., Any]) -> None:
    """The results file holds both; each keeps a line of its own when the file is printed again."""
    few = ("--editors", "uce", "--concepts", "1", "--draws", "1")
    run(*few)
    run(*few, "--target", "thing")
    assert [line["editor"] for line in run("--table")["rows"]] == ["uce", "uce to 'thing'"]


def test_editors_may_be_told_of_all_that_stays(
    bench: Any, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures count the same half as retained."""
    told: list[set[str]] = []
    edit = compare.edit_model
    monkeypatch.setattr(compare, "edit_model", lambda *a, **k: (told.append({*k["preserve"]}), edit(*a, **k))[1])
    few = ("--editors", "ours", "--concepts", "2", "--draws", "1")
    run(*few)
    run(*few, "--tell-all")
    half, every = lines(tmp_path / "rows.jsonl")
    assert half["retain"] == every["retain"]
    assert half["edited"]["acc_n_unseen"]["count"] == every["edited"]["acc_n_unseen"]["count"]
    assert told == [{*half["retain"]}, {*bench.qualified("development")} - {*half["erased"]}]
    assert told[0] < told[1]
    assert [line["editor"] for line in run("--table")["rows"]] == ["ours", "ours, told of all"]


def test_styles_are_counted_where_they_belong(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the style is read on its own prompts, what stays on the others'; a second run draws nothing."""
    path = tmp_path / "styles.jsonl"
    monkeypatch.setattr(bench.judge, "styles", STYLES)  # words of the tiny model
    fixed = ["--model", str(bench.model), "--results", str(path), "--threads", "1", "--things", "2", "--json"]
    styles.main([*fixed, "--editors", "ours", "uce"], bench)
    first = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["erased"], row["editor"]) for row in first] == [
        (style, editor) for style in STYLES for editor in ("ours", "uce")
    ]
    for row in first:
        assert "error" not in row, row["error"]
        assert row["edited"]["style_left"]["count"] == 4  # two things, two templates
        assert row["edited"]["other_objects"]["count"] == 12
        assert [row["edited"][name]["count"] for name in ("retained_styles", "other_styles")] == [8, 4]
        assert row["settings"].get("kind") == ("style" if row["editor"] == "ours" else None)
    assert first[0]["original"] == first[1]["original"]
    styles.main([*fixed, "--kind", "object", "--editors", "ours"], bench)
    others = json.loads(capsys.readouterr().out)["rows"]
    assert {row["settings"]["kind"] for row in others} == {"object"}
    assert not {row["key"] for row in others} & {row["key"] for row in first}
    monkeypatch.setattr(styles, "generate", lambda *_, **__: pytest.fail("a row was drawn again"))
    styles.main([*fixed, "--editors", "ours", "uce"], bench)
    assert json.loads(capsys.readouterr().out)["rows"] == first


def test_a_style_becomes_the_first_retained_one(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str | None, str]] = []

    def erase(editor: Any, pipe: Any, concepts: Any, retain: Any) -> None:
        told.extend((concept.name, concept.target, retain[0]) for concept in concepts)

    monkeypatch.setattr(bench.judge, "styles", STYLES)
    monkeypatch.setattr(compare.Editor, "__call__", erase)
    fixed = ["--model", str(bench.model), "--results", str(tmp_path / "rows.jsonl"), "--threads", "1", "--json"]
    styles.main([*fixed, "--things", "1", "--editors", "ours", "--target", styles.RETAINED], bench)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["erased"], row["target"]) for row in rows] == [(name, target) for name, target, _ in told]
    assert all(name != target == first for name, target, first in told)
    assert len(told) == len(STYLES)


@pytest.mark.parametrize("named", [2, 0])
def test_a_style_and_things_go_in_one_edit(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, named: int
) -> None:
    """The things beside it are none of those that are drawn in styles; half of the other things are retained."""
    told: list[Any] = []
    monkeypatch.setattr(bench.judge, "styles", STYLES)
    monkeypatch.setattr(compare.Editor, "__call__", lambda _, pipe, concepts, retain: told.append((concepts, retain)))
    fixed = ["--model", str(bench.model), "--results", str(tmp_path / "rows.jsonl"), "--threads", "1", "--json"]
    styles.main([*fixed, "--things", "1", "--beside", "1", "--retain", str(named), "--editors", "ours"], bench)
    rows = json.loads(capsys.readouterr().out)["rows"]
    drawn = {name for names in rows[0]["things"].values() for name in names}
    for row, (concepts, retain) in zip(rows, told, strict=True):
        assert [(c.name, c.kind) for c in concepts] == [(row["erased"], "style"), (row["beside"][0], None)]
        assert row["settings"]["kind"] == "general"
        assert row["beside"][0] not in drawn
        assert retain == row["retain"]
        assert row["erased"] not in retain
        assert {*retain[:named]} < {*STYLES}
        assert row["edited"]["retained_styles"]["count"] == named * len(styles.TEMPLATES)
        assert set(retain[named:]) == set(compare.retained(bench, "development", row["beside"]))
        assert row["edited"]["beside_left"]["count"] == len(PLAIN)
        assert row["edited"]["beside_left"] == row["original"]["beside_left"]  # nothing was edited
    told.clear()
    fixed += ["--things", "1", "--beside", "1", "--retain", str(named), "--editors", "ours", "--kind", "person"]
    styles.main(fixed, bench)
    others = json.loads(capsys.readouterr().out)["rows"]
    assert [concepts[0].kind for concepts, _ in told] == ["person"] * len(rows)
    assert not {row["key"] for row in others} & {row["key"] for row in rows}


def test_styles_go_together(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each style is erased as often as there are styles in a group, and none of a group is retained beside it."""
    told: list[Any] = []
    monkeypatch.setattr(bench.judge, "styles", STYLES)
    monkeypatch.setattr(compare.Editor, "__call__", lambda _, pipe, concepts, retain: told.append((concepts, retain)))
    fixed = ["--model", str(bench.model), "--results", str(tmp_path / "rows.jsonl"), "--threads", "1", "--json"]
    fixed += ["--things", "1", "--editors", "ours", "--together", "2"]
    styles.main([*fixed, "--retain", "1"], bench)
    rows = json.loads(capsys.readouterr().out)["rows"]
    groups = [[concept.name for concept in concepts] for concepts, _ in told]
    assert [row["erased"] for row in rows] == [", ".join(group) for group in groups]
    assert sorted(name for group in groups for name in group) == sorted(2 * list(STYLES))
    for group, (_, retain), row in zip(groups, told, rows, strict=True):
        assert len(retain) == 1
        assert not {*group} & {*retain}
        figures = row["edited"]
        counts = [figures[name]["count"] for name in ("style_left", "retained_styles", "other_styles")]
        assert counts == [len(styles.TEMPLATES) * n for n in (2, 1, len(STYLES) - 3)]
    with pytest.raises(ValueError, match=f"there are {len(STYLES)}"):
        styles.main([*fixed, "--retain", str(len(STYLES) - 1)], bench)


def test_no_more_things_are_drawn_than_are_wanted(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.judge, "styles", STYLES)
    drawn: list[str] = []
    get = bench.store.get
    monkeypatch.setattr(bench.store, "get", lambda prompts, seeds: drawn.extend(prompts) or get(prompts, seeds))
    everything = styles.chosen(bench, "development", 99)
    drawn.clear()
    some = styles.chosen(bench, "development", 1)
    assert {style: found[:1] for style, found in everything.items()} == some
    mine = [prompt for prompt in drawn if STYLES[0] in prompt]
    assert len(mine) == min(2, len(bench.qualified("development"))) * len(styles.TEMPLATES)


def test_rates_of_styles() -> None:
    cases = styles.cases_of(["a", "b", "c"], {"a": ["x"], "b": ["x"], "c": ["x", "y"]})
    hits = torch.tensor([[c.style == "c"] for c in cases])
    found = styles.rates(cases, ~hits, hits, ["a"], ["b"])
    assert {name: (rate.hits, rate.count) for name, rate in found.items()} == {
        "style_left": (0, 2),
        "object_kept": (2, 2),
        "retained_styles": (0, 2),
        "other_styles": (4, 4),
        "other_objects": (2, 6),
        "beside_left": (0, 0),
    }
    beside = [*cases, styles.Case("y", styles.BESIDE, "y")]
    more = styles.rates(beside, torch.cat([~hits, hits[-1:]]), torch.cat([hits, ~hits[-1:]]), ["a"], ["b"])
    assert more.pop("beside_left") == Rate(1, 1)
    assert more == {name: rate for name, rate in found.items() if name != "beside_left"}
    together = styles.rates(cases, ~hits, hits, ["a", "c"], ["b"])
    assert together["style_left"] == Rate(4, 6)
    assert together["other_objects"] == Rate(2, 2)
    assert together["other_styles"] == Rate(0, 0)
