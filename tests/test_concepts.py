"""Concepts and the files that list them: every format, and every error names the row at fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realera_edit import Concept, load_concepts
from realera_edit.concepts import load_prompts, resolve_concepts
from realera_edit.config import KINDS
from realera_edit.contexts import DEFAULT_TARGETS
from realera_edit.errors import ConceptError

WANTED = [
    Concept("Van Gogh", "a painting", ("Vincent", "van gogh style"), 0.5, "style"),
    Concept("猫 🐱"),
    Concept("Smith, John", "a man", (), None, "person"),
]
FILES = {
    "names.csv": "concept,target,aliases,strength,kind\n"
    "Van Gogh,a painting,Vincent; van gogh style,0.5,style\n\n猫 🐱,,,,\n"
    '"Smith, John",a man,,,person\n',
    "spaced.csv": 'target , concept,kind, aliases,strength\r\na painting, "Van\nGogh", style,Vincent;van gogh style,.5'
    "\r\n"
    '"",猫  🐱\r\na man, "Smith, John", person\r\n',
    "names.yaml": "- {concept: Van Gogh, target: a painting, aliases: [Vincent, van gogh style], strength: 0.5,\n"
    "   kind: style}\n"
    "- 猫 🐱\n- concept: Smith, John\n  target: a man\n  kind: person\n",
    "nested.yml": "concepts:\n"
    "- {name: Van Gogh, target: a painting, aliases: Vincent;van gogh style, strength: '0.5', kind: style}\n"
    "- 猫 🐱\n- {concept: 'Smith, John', target: a man, aliases: null, kind: person}\n",
    "names.json": json.dumps(
        [
            {
                "concept": " Van  Gogh ",
                "target": "a painting",
                "aliases": ["Vincent", "van gogh style"],
                "strength": 0.5,
            }
            | {"kind": "style"},
            "猫 🐱",
            {"name": "Smith, John", "target": "a man", "kind": "person", "strength": None},
        ]
    ),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_the_same_concepts(name: str, tmp_path: Path) -> None:
    assert load_concepts(write(tmp_path, name, FILES[name])) == WANTED
    assert load_concepts(write(tmp_path, name, b"\xef\xbb\xbf" + FILES[name].encode())) == WANTED


def test_plain_text_has_one_name_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "names.TXT", "# people\n Van  Gogh \r\n\n猫 🐱\n  # no more\nSmith, John\n")
    assert load_concepts(path) == [Concept(concept.name) for concept in WANTED]
    assert load_prompts(path) == [concept.name for concept in WANTED]


@pytest.mark.parametrize("ending", ["csv", "yaml", "json", "txt"])
def test_a_thousand_rows(ending: str, tmp_path: Path) -> None:
    names = [f"person number {i}" for i in range(1000)]
    text = {
        "csv": "\n".join(["concept", *names]),
        "yaml": "\n".join(f"- {name}" for name in names),
        "json": json.dumps(names),
        "txt": "\n".join(names),
    }[ending]
    concepts = resolve_concepts(load_concepts(write(tmp_path, f"many.{ending}", text)), kind="person")
    assert [concept.name for concept in concepts] == names
    assert {concept.target for concept in concepts} == {"a person"}
    broken = text.replace("number 765", "number 432")
    with pytest.raises(ConceptError, match=r"row 766.*'person number 432' was already given in row 433"):
        load_concepts(write(tmp_path, f"twice.{ending}", broken))


ROWS: dict[str, tuple[Any, str]] = {
    "duplicate": (["cat", "dog", "Cat "], "row 3: 'Cat' was already given in row 1"),
    "duplicate spelling": (["caf\u00e9", "cafe\u0301"], "row 2: .* was already given in row 1"),
    "alias is a name": (["cat", {"name": "dog", "aliases": "CAT"}], "row 2: 'CAT' was already given in row 1"),
    "alias is an alias": (
        [{"name": "cat", "aliases": ["kitty"]}, {"name": "dog", "aliases": ["kitty"]}],
        "row 2: 'kitty' was already given in row 1",
    ),
    "alias is its own name": (["dog", {"name": "cat", "aliases": ["Cat"]}], "row 2: an alias of 'cat'"),
    "empty": (["cat", "  "], "row 2: the concept's name is empty"),
    "no name": (["cat", {"target": "dog"}], "row 2: the concept's name is empty"),
    "empty alias": (["cat", {"name": "dog", "aliases": ["wolf", " "]}], "row 2: an alias is empty"),
    "alias number": (["cat", {"name": "dog", "aliases": 5}], "row 2: aliases 5: expected a list"),
    "target is concept": (["dog", {"name": "cat", "target": "CAT"}], "row 2: the target 'CAT' contains .* 'cat'"),
    "target contains": (["dog", {"name": "cat", "target": "a  Cat, sitting"}], "row 2: the target .* contains"),
    "target contains alias": (
        ["dog", {"name": "cat", "aliases": ["kitty"], "target": "a kitty"}],
        "row 2: the target 'a kitty' contains the concept 'kitty'",
    ),
    "target contains (Chinese)": (["dog", {"name": "猫", "target": "一只猫在桌上"}], "row 2: the target .* contains"),
    "unknown column": (["cat", {"name": "dog", "colour": "red", "weight": 1}], "row 2: unknown column colour, weight"),
    "not a row": (["cat", 7], "row 2: expected a name or a mapping .*, found 7"),
    "strength word": (["cat", {"name": "dog", "strength": "high"}], "row 2: strength 'high' is not a number"),
    "strength list": (["cat", {"name": "dog", "strength": [1]}], r"row 2: strength \[1\] is not a number"),
    "strength 1": (["cat", {"name": "dog", "strength": "1"}], r"row 2: strength 1 of 'dog' is not in \[0, 1\)"),
    "strength below": (["cat", {"name": "dog", "strength": -0.1}], r"row 2: strength -0.1 of 'dog' is not in"),
    "strength nan": (["cat", {"name": "dog", "strength": "nan"}], r"row 2: strength nan of 'dog' is not in"),
    "kind": (["cat", {"name": "dog", "kind": "animal"}], "row 2: kind 'animal' of 'dog': expected one of general"),
    "surrogate": (["cat", "\ud83d"], "row 2: .* is not text"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_by_the_library(case: str) -> None:
    rows, message = ROWS[case]
    with pytest.raises(ConceptError, match=f"concepts, {message}"):
        resolve_concepts(rows)


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_with_its_file(case: str, tmp_path: Path) -> None:
    rows, message = ROWS[case]
    path = write(tmp_path, "rows.json", json.dumps(rows))
    with pytest.raises(ConceptError, match=re.escape(f"{path}, ") + message):
        load_concepts(path)


def test_a_bad_concept_object_is_named_too() -> None:
    with pytest.raises(ConceptError, match="row 1: kind 'animal'"):
        resolve_concepts([Concept("dog", kind="animal")])
    with pytest.raises(ConceptError, match="row 1: an alias is empty"):
        resolve_concepts(Concept("dog", aliases=("",)))
    assert resolve_concepts(Concept("dog", aliases="wolf; pug"))[0].aliases == ("wolf", "pug")  # type: ignore[arg-type]


def test_a_concept_that_is_also_preserved() -> None:
    with pytest.raises(ConceptError, match=r"row 2: 'Cat' is to be erased and is also in the preserve list"):
        resolve_concepts(["dog", "Cat"], preserve=["fish", " cat"])
    with pytest.raises(ConceptError, match=r"row 1: 'kitty' is to be erased and is also in the preserve list"):
        resolve_concepts([{"name": "cat", "aliases": "kitty"}], preserve=["Kitty"])
    assert resolve_concepts(["cat"], preserve=["a cat and a dog"])


def test_no_concept_at_all() -> None:
    with pytest.raises(ConceptError, match="no concept given"):
        resolve_concepts([])


def test_words_inside_other_words_are_not_contained() -> None:
    assert resolve_concepts(["cat"], target="a category")[0].target == "a category"
    assert resolve_concepts(["cat"], target=" a   category ")[0].target == "a category"
    assert resolve_concepts([Concept("cat", target="")])[0].target == ""


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "a.csv": ("name,target\ncat,dog\n", "the header has no column 'concept'"),
    "b.csv": ("concept,target\nGogh, Vincent,a painting\n", "row 1: more fields than the header has columns"),
    "c.csv": ("concept,size\ncat,\ndog,big\n", "row 1: unknown column size"),
    "d.csv": ("concept\n", "the file lists no concept"),
    "e.csv": (b"concept\n\xff\xfe\n", "cannot be read as UTF-8"),
    "f.csv": ("", "the header has no column"),
    "a.yaml": ("- {cat: [\n", "not valid YAML"),
    "b.yaml": ("concept: cat\n", "expected a list of concepts"),
    "c.yaml": ("- cat\n- !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    "d.yaml": ("- no\n", "row 1: expected a name"),
    "e.yaml": ("", "expected a list of concepts"),
    "f.yaml": ("- 2024-99-99\n", "not valid YAML"),
    "g.yaml": ("[" * 1200, "not valid YAML"),
    "a.json": ('["cat",', "not valid JSON"),
    "b.json": ('"cat"', "expected a list of concepts"),
    "c.json": ("[" * 100_000, "not valid JSON"),
    "d.json": (b'["\xff"]', "cannot be read as UTF-8"),
    "e.json": ("[]", "the file lists no concept"),
    "a.txt": ("# nothing\n\n", "the file lists no concept"),
    "a.xlsx": ("cat", "unknown ending '.xlsx'; use .csv, .yaml, .json or .txt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = write(tmp_path, name, content)
    for load in (load_concepts, load_prompts):
        with pytest.raises(ConceptError, match=re.escape(str(path)) + ".*" + message) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match=r"gone\.csv: no such file"):
        load_concepts(tmp_path / "gone.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConceptError, match=r"folder\.csv: cannot be read"):
        load_concepts(tmp_path / "folder.csv")


WORDS = st.sampled_from(
    ["object", "a object", "thing", "picture", "A Person", "person", "art", "Art", "a", "cat", "猫"]
)


def _inside(text: str, name: str) -> bool:
    """Whether the words of `name` stand in `text` one after another; independent of the package's own test."""
    words, part = text.casefold().split(), name.casefold().split()
    return any(words[i : i + len(part)] == part for i in range(len(words)))


@given(names=st.lists(WORDS | st.text(min_size=1, max_size=8), min_size=1, max_size=5), kind=st.sampled_from(KINDS))
def test_a_default_target_never_contains_its_concept(names: list[str], kind: str) -> None:
    """And is the default of the kind wherever that is possible."""
    try:
        concept = resolve_concepts([Concept(names[0], aliases=tuple(names[1:]))], kind=kind)[0]
    except ConceptError:  # a name that is empty or twice, or every default taken
        return
    assert concept.target
    assert not any(_inside(concept.target, name) for name in concept.names)
    if not any(_inside(DEFAULT_TARGETS[kind], name) for name in concept.names):
        assert concept.target == DEFAULT_TARGETS[kind]


def test_the_property_is_not_vacuous() -> None:
    """Control: these names collide with defaults, and still get a target or a clear error."""
    assert resolve_concepts(["object"])[0].target == "thing"
    assert resolve_concepts([Concept("object", aliases=("thing",))])[0].target == "picture"
    assert resolve_concepts(["person"], kind="person")[0].target == "thing"
    with pytest.raises(ConceptError, match="row 1: 'object' and its aliases take up every default target"):
        resolve_concepts([Concept("object", aliases=("thing", "picture"))])


def test_a_rows_own_fields_beat_the_defaults() -> None:
    own, other = resolve_concepts([WANTED[0], "cat"], kind="object", target="a shape")
    assert (own.target, own.kind, own.strength) == ("a painting", "style", 0.5)
    assert (other.target, other.kind, other.strength) == ("a shape", "object", None)
