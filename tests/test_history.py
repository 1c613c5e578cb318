"""A model that is edited again: the record of each earlier edit is kept, shown, and given back by undo."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import UNET, header, run, tensor_bytes
from single_models import change, erase

from realera_edit import RealEraWarning, inspect_path, undo_file, undo_folder
from realera_edit.errors import CheckpointError
from realera_edit.history import sidecars
from realera_edit.provenance import METADATA_KEY, RECORD

Names = list[str]


def erased(record: Any) -> Names:
    return [concept["name"] for concept in record["concepts"]]


@pytest.fixture(params=["folder", "file"])
def chain(request: pytest.FixtureRequest, single: Path, tmp_path: Path) -> Callable[..., Path]:
    """`chain("cat", "dog")`: the place of a model from which these were erased one after the other."""

    def edit(*concepts: str) -> Path:
        model = single if request.param == "file" else single.parent / "folder"
        for number in range(len(concepts)):
            out = tmp_path / (" ".join(concepts[: number + 1]) + ".safetensors" * (request.param == "file"))
            words = {"tokenizer": single.parent / "folder"} if request.param == "file" else {}
            if not out.exists():
                erase(model, out, concepts[number], **words)
            model = out
        return model

    return edit


def weights(model: Path) -> Path:
    return model / UNET if model.is_dir() else model


def record_of(model: Path) -> Path:
    return model / RECORD if model.is_dir() else sidecars(model)[0]


def undo(model: Path, out: Path) -> Path:
    return undo_folder(model, out) if model.is_dir() else undo_file(model, out.with_suffix(".safetensors"))


def test_earlier_records_are_kept_oldest_first(chain: Callable[..., Path]) -> None:
    first = inspect_path(chain("cat"))
    assert "previous" not in first
    last = chain("cat", "dog", "horse")
    found = inspect_path(last)
    assert erased(found) == ["horse"]
    assert [erased(old) for old in found["previous"]] == [["cat"], ["dog"]]
    assert found["previous"][0] == {name: value for name, value in first.items() if name != "undo"}
    assert not any("previous" in old for old in found["previous"])
    # the hashes of one end are those that the next begins with
    records = [*found["previous"], found]
    for before, after in itertools.pairwise(records):
        ends = {key: pair["after"] for file in before["tensors"].values() for key, pair in file.items()}
        starts = {key: pair["before"] for file in after["tensors"].values() for key, pair in file.items()}
        assert ends == starts
    in_header = json.loads(header(weights(last))["__metadata__"][METADATA_KEY])
    assert [erased(old) for old in [*in_header["previous"], in_header]] == [["cat"], ["dog"], ["horse"]]
    assert not any("tensors" in old for old in in_header["previous"])  # a header stays small
    shown = run("inspect", last).stdout
    assert shown.index("erased     horse") < shown.index("before it  cat -> object") < shown.index("before it  dog")


def test_undo_gives_the_record_before_back(chain: Callable[..., Path], tmp_path: Path) -> None:
    one, two, three = inspect_path(chain("cat")), inspect_path(chain("cat", "dog")), chain("cat", "dog", "horse")
    back = undo(three, tmp_path / "back")
    assert tensor_bytes(weights(back)) == tensor_bytes(weights(chain("cat", "dog")))
    assert inspect_path(back) == {**two, "undo": False}
    assert erased(two["previous"][0]) == ["cat"]
    assert two["previous"][0] == {name: value for name, value in one.items() if name != "undo"}
    plain = undo(chain("cat"), tmp_path / "plain")
    assert not record_of(plain).exists()
    assert json.loads(header(weights(plain))["__metadata__"][METADATA_KEY])["undone"] is True
    again = erase(plain, concept="dog", **({} if plain.is_dir() else {"tokenizer": tmp_path / "folder"}))
    assert again.previous == ()


def test_without_a_record_the_header_is_carried_on(chain: Callable[..., Path], tmp_path: Path) -> None:
    one = chain("cat")
    record_of(one).unlink()
    two = erase(one, concept="dog", **({} if one.is_dir() else {"tokenizer": tmp_path / "folder"}))
    assert [erased(old) for old in two.previous] == [["cat"]]
    assert "tensors" not in two.previous[0]
    out = two.save(tmp_path / ("two" + ".safetensors" * one.is_file()))
    assert "before it  cat -> object" in run("inspect", out).stdout
    back = undo(out, tmp_path / "back")
    assert not record_of(back).exists()
    assert erased(json.loads(header(weights(back))["__metadata__"][METADATA_KEY])) == ["cat"]


@pytest.mark.parametrize("content", ["[", "{}", '{"concepts": 5}'])
def test_a_damaged_record_is_passed_over_with_a_warning(
    content: str, chain: Callable[..., Path], tmp_path: Path
) -> None:
    one = chain("cat")
    record_of(one).write_text(content)
    with pytest.warns(RealEraWarning, match=r"realera_edit\.json: .*is not carried into the new record"):
        assert erase(one, concept="dog", **({} if one.is_dir() else {"tokenizer": tmp_path / "folder"})).previous == ()


@pytest.mark.parametrize("previous", [5, ["cat"], [{}], [{"concepts": [{}]}], [{"concepts": [], "tensors": 5}]])
def test_a_damaged_history_is_one_clear_error(previous: Any, chain: Callable[..., Path]) -> None:
    place = chain("cat", "dog")
    data = json.loads(record_of(place).read_text())
    record_of(place).write_text(json.dumps({**data, "previous": previous}))
    with pytest.raises(CheckpointError, match=r"realera_edit\.json: is damaged"):
        inspect_path(place)


def test_a_record_that_is_left_over_belongs_to_no_other_file(single: Path, tmp_path: Path) -> None:
    """An unedited model that has taken the place of an edited one has no history."""
    erase(single, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(single.read_bytes())
    assert erase(tmp_path / "a.safetensors", tokenizer=tmp_path / "folder").previous == ()
    change(tmp_path / "a.safetensors", lambda tensors: None)
    assert sidecars(tmp_path / "a.safetensors")[0].exists()
