"""Records, recipes in headers and edit files: what has the wrong type is named when it is read, not when it is used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK, UNET, header, made, run, split_file, write_file

from realera_edit import EditConfig, EditFile, RealEraWarning, edit_model, forms
from realera_edit.editfile import compose
from realera_edit.errors import CheckpointError, ConfigError
from realera_edit.history import read_record
from realera_edit.provenance import EDIT_FILE_KEY, METADATA_KEY, RECORD, inspect_path

# Whose type is of no consequence: what the unedited model's card says, and that an edit is an inverse.
FREE = ("license", "invert")


@pytest.fixture(scope="module")
def edited(pristine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with the folder `out`, edited twice, and an edit that was composed and scaled, `edit.safetensors`."""
    place = tmp_path_factory.mktemp("edited")
    first = edit_model(pristine("sdxl"), ["cat"], preserve=["dog"], config=QUICK).save(place / "first")
    edit_model(first, ["car"], prior=["a lake"], preserve=["dog"], config=QUICK).save(place / "out")
    one, two = made(pristine("sd1")), made(pristine("sd1"), "car", contexts=("a {} at night",))
    compose([one.scale(0.5), two]).invert().save(place / "edit.safetensors")
    return place


def recipe(path: Path, key: str) -> dict[str, Any]:
    return dict(json.loads(header(path)["__metadata__"][key]))


def put_recipe(path: Path, key: str, value: Any) -> None:
    head, (_, data) = header(path), split_file(path)
    write_file(path, {**head, "__metadata__": {**head["__metadata__"], key: json.dumps(value)}}, data)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key in FREE:
            continue
        yield (*above, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*above, key))


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    copied = copy.deepcopy(value)
    inner = copied
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return copied


@pytest.mark.parametrize("what", ["record", "header", "edit"])
def test_a_value_of_another_type_is_named_wherever_it_is(what: str, edited: Path) -> None:
    data, form = {
        "record": (json.loads((edited / "out" / RECORD).read_text()), forms.record),
        "header": (recipe(edited / "out" / UNET, METADATA_KEY), forms.recipe),
        "edit": (recipe(edited / "edit.safetensors", EDIT_FILE_KEY), forms.edit),
    }[what]
    data.pop("format", None)
    forms.check(data, form)
    ways = list(places(data))
    assert len(ways) > 50
    for way in ways:
        for wrong in (frozenset(), 10**400):  # neither is any type of ours
            with pytest.raises(ValueError, match=r"expected") as caught:
                forms.check(changed(data, way, wrong), form)
            names = [key for key in way if isinstance(key, str)]
            assert any(str(name) in str(caught.value) for name in names[-2:]), (way, str(caught.value))


def test_what_could_not_be_written_again_is_refused_in_any_place(edited: Path) -> None:
    data, key = json.loads((edited / "out" / RECORD).read_text()), "a key of another version"
    for wrong, message in (("\ud800", "has half of a surrogate pair"), (json.loads("[" * 100 + "]" * 100), "nested")):
        with pytest.raises(ValueError, match=message):
            forms.check({**data, key: wrong}, forms.record)
    forms.check({**data, key: [["a"], 1e300, None]}, forms.record)


@pytest.mark.filterwarnings("always::realera_edit.RealEraWarning")
@pytest.mark.parametrize(
    ("way", "value"),
    [(("spaces", "cross", "condition"), ""), (("concepts", 0, "aliases"), 3), (("config", "padding"), "2")],
)
def test_damage_is_one_error_of_the_command(way: tuple[Any, ...], value: Any, edited: Path, sd1: Path) -> None:
    """Of an edit file; a damaged record of an earlier edit is only not carried along."""
    path, out = sd1.parent / "edit.safetensors", sd1.parent / "out"
    made(sd1).save(path)
    sound = recipe(path, EDIT_FILE_KEY)
    assert run("apply", path, sd1, "-o", out).exit_code == 0
    put_recipe(path, EDIT_FILE_KEY, changed(sound, way, value))
    for command in (("apply", path, sd1, "-o", sd1.parent / "more"), ("inspect", path)):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"Error: {path}: is damaged ({'.'.join(way[:1])}")
    put_recipe(path, EDIT_FILE_KEY, sound)
    record = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps(changed(record, way, value)))
    with pytest.raises(CheckpointError, match=rf"{RECORD}: is damaged \({way[0]}"):
        read_record(out / RECORD)
    result = run("apply", path, out, "-o", sd1.parent / "more")
    assert result.exit_code == 0
    assert f"{RECORD}: is damaged" in result.stderr
    assert "not carried into the new record" in result.stderr
    assert "previous" not in json.loads((sd1.parent / "more" / RECORD).read_text())


def test_a_damaged_recipe_in_a_header_is_named(sd1: Path, tmp_path: Path) -> None:
    out = edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "out")
    sound = recipe(out / UNET, METADATA_KEY)
    put_recipe(out / UNET, METADATA_KEY, changed(sound, ("concepts", 0, "name"), 5))
    with pytest.raises(CheckpointError, match=r"the record in its header is damaged: concepts\[0\]\.name is 5"):
        inspect_path(out / UNET)
    (out / RECORD).unlink()
    with pytest.warns(RealEraWarning, match=r"concepts\[0\]\.name is 5.*not carried into the new record"):
        assert edit_model(out, ["dog"], config=QUICK).previous == ()


def test_a_configuration_of_a_later_version(sd1: Path, tmp_path: Path) -> None:
    """Its record can be read and undone; the edit cannot be made again."""
    data = edit_model(sd1, ["cat"], config=QUICK).to_dict()
    data = {**data, "tensors": {}, "config": {**data["config"], "colour": 1}}
    forms.check(data, forms.record)
    with pytest.raises(ConfigError, match="has the unknown option 'colour'; update realera-edit"):
        EditConfig.of(data["config"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("padding", "2", "a whole number"),
        ("padding", 2.5, "a whole number"),
        ("padding", True, "a whole number"),
        ("padding", None, "a whole number"),
        ("strength", "much", "a number or None"),
        ("ridge", [], "a number"),
        ("pooled", 1, "true or false"),
        ("kind", None, "text"),
        ("contexts", "{}", "a list of texts"),
    ],
)
def test_an_option_of_another_type_is_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = .*: expected {expected}$"):
        EditConfig(**{name: value})


def test_a_sound_edit_file_reads_as_it_was_written(edited: Path) -> None:
    """Control: composed, scaled and inverted, it passes."""
    edit = EditFile.load(edited / "edit.safetensors")
    assert [step.keys() for step in edit.recipe["history"]] == [{"compose"}, {"invert"}]
    assert edit.config == QUICK
