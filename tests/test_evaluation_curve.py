"""The curve over the number of concepts: each point is what an edit of so many concepts alone gives."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import QUICK, run

from realera_edit import edit_model
from realera_edit.errors import ConfigError
from realera_edit.evaluation import evaluate
from realera_edit.evaluation_config import EvaluationConfig
from realera_edit.evaluation_curve import recipe_of
from realera_edit.judges import FunctionJudge

CONFIG = EvaluationConfig(seeds=(0, 1), steps=2, guidance=3.0, far=0, neighbours=0, residue=0, threshold=0)
NAMES = ("cat", "car", "dog")
LABELS = (*NAMES, "bird", "boat")
PROMPTS = "kind,prompt,truth,style,owner\n" + "".join(
    f"e,a picture of a {name},{name},,\ng,some {name},{name},,\nn,a {name} bird,bird,,{name}\n" for name in NAMES
)
# strength by default: it depends on the number of names
RECIPE = replace(QUICK, strength=None)


def erased(model: Path, names: tuple[str, ...], out: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return edit_model(model, names, preserve=["bird"], config=RECIPE).save(out, undo=False)


@pytest.fixture(scope="module")
def place(pristine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`all`: three concepts erased; `first`: one of them, by the same recipe; and the prompts."""
    base = tmp_path_factory.mktemp("curve")
    erased(pristine("sd1"), NAMES, base / "all")
    erased(pristine("sd1"), NAMES[:1], base / "first")
    (base / "prompts.csv").write_text(PROMPTS + "s,a boat,boat,,\ns,boat,boat,,\n")
    return base


@pytest.fixture
def judge() -> FunctionJudge:
    """Any verdict will do that depends on every pixel."""
    return FunctionJudge(lambda pictures: pictures.reshape(len(pictures), -1).sum(1, dtype=np.int64) % 3, LABELS)


def measured(pristine: Any, place: Path, judge: Any, edited: str, out: Path, **options: Any) -> dict[str, Any]:
    found = evaluate(
        pristine("sd1"), place / edited, out=out, judge=judge, prompts=place / "prompts.csv", config=CONFIG, **options
    )
    return found.to_dict()


def point(data: dict[str, Any], metric: str, count: int, name: str = "edited") -> Any:
    (line,) = [line for line in data["curves"] if (line["metric"], line["name"]) == (metric, name)]
    (found,) = [one for one in line["points"] if one["count"] == count]
    return found


def test_a_point_is_what_an_edit_of_so_many_gives(pristine: Any, place: Path, judge: Any, tmp_path: Path) -> None:
    data = measured(pristine, place, judge, "all", tmp_path / "all", curve=(3, 1))
    alone = measured(pristine, place, judge, "first", tmp_path / "first", concepts=NAMES[:1])
    assert {line["metric"] for line in data["curves"]} == {"H_4", "acc_e", "acc_g", "acc_s", "acc_n"}
    # the same pictures, by hash: one concept erased alone
    own, first = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}
        for name in ("first/pictures/edited", "all/pictures/first-1")
    )
    assert len(first) == 10  # of the concept's own prompts, and of those of all
    assert first.items() <= own.items()
    every = {path.name: path.read_bytes() for path in (tmp_path / "all/pictures/edited").glob("*.png")}
    assert all(every[name] != content for name, content in first.items())
    (row,) = [row for row in alone["concepts"] if row["name"] == "cat"]
    for metric in ("acc_e", "acc_g", "acc_n", "acc_s"):
        assert point(data, metric, 1)["value"] == row[metric], metric
        whole = data["rates"][metric]
        assert {**point(data, metric, 3), "hits": 0, "count": 0} == {**whole["edited"], "hits": 0, "count": 0}
        assert point(data, metric, 3, "unedited")["value"] == whole["original"]["value"]
    assert point(data, "H_4", 3)["value"] == data["harmonic"]["H_4"]["value"]
    # it is optional, and the unedited model is itself again after it
    plain = measured(pristine, place, judge, "all", tmp_path / "all")
    assert plain["curves"] is None
    assert plain["rates"] == data["rates"]


def test_what_nobody_named_is_that_of_the_shorter_list(place: Path) -> None:
    record = json.loads((place / "all" / "realera_edit.json").read_text("utf-8"))
    assert {row["strength"] for row in record["concepts"]} == {RECIPE.strength_for(3)}
    assert [(c.name, c.target, c.strength) for c in recipe_of(record, 2)] == [("cat", None, None), ("car", None, None)]
    named = {**record, "concepts": [{**row, "target": "person", "strength": 0.33} for row in record["concepts"]]}
    assert {(c.target, c.strength) for c in recipe_of(named, 2)} == {("person", 0.33)}
    styles = [{**row, "target": "<average>", "kind": "style"} for row in record["concepts"]]
    assert {c.target for c in recipe_of({**record, "concepts": styles, "preserve": ["ink", "oil"]}, 2)} == {None}
    assert [c.name for c in recipe_of(record)] == list(NAMES)
    assert {c.strength for c in recipe_of(record)} == {RECIPE.strength_for(3)}


def test_curves_at_fault(pristine: Any, place: Path, judge: Any, tmp_path: Path) -> None:
    for curve in ((0,), (1, 4)):
        with pytest.raises(ConfigError, match="erased 3 concepts; expected 1 to 3"):
            measured(pristine, place, judge, "all", tmp_path / "out", curve=curve)
    with pytest.raises(ConfigError, match="edited model has no"):
        evaluate(pristine("sd1"), pristine("sd1"), ["cat"], out=tmp_path / "out", judge=judge, curve=(1,))
    with pytest.raises(ConfigError, match="does not make the edited model"):  # on an edited model
        evaluate(place / "first", place / "all", out=tmp_path / "other", judge=judge, curve=(1,))
    said = run("evaluate", pristine("sd1"), place / "all", "-o", tmp_path / "out", "--curve", "1;2")
    assert (said.exit_code, said.stderr.count("\n")) == (1, 1)
    assert "curve '1;2': write a range such as 0-3" in said.stderr
