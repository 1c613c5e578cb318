"""Model cards: they tell what the record tells, their commands work, and nothing of another's card is lost."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from helpers import QUICK, UNET, run, tensor_bytes, tree
from huggingface_hub import ModelCard
from single_models import erase

from realera_edit import (
    Concept,
    EditFile,
    RealEraWarning,
    apply_edit,
    edit_model,
    export_lora,
    inspect_path,
    model_card,
    undo_folder,
)
from realera_edit.card_text import escaped
from realera_edit.errors import CheckpointError, ConfigError
from realera_edit.front_matter import split
from realera_edit.provenance import RECORD, UNDO
from realera_edit.readme import BEGIN, END, Fields, joined, without

# tiny encoders tell few names apart
pytestmark = pytest.mark.filterwarnings("ignore:.*names keep more than was asked")
CARD = "README.md"
THEIRS = """---
# who may use it
license: other
license_name: some-terms
license_link: LICENSE.md
language:
- no
tags: [painting]
base_model: them/older
model-index: [{name: theirs, results: []}]
inference: false
---
# Their model

Uses: `paint`.
"""


def front(text: str) -> dict[str, Any]:
    """The front matter, read as the hub's client reads it."""
    return dict(ModelCard(text).data.to_dict())


def edited(model: Path, out: Path, *concepts: Any, **options: Any) -> Path:
    saving = {name: options.pop(name) for name in ("undo", "card") if name in options}
    config = options.pop("config", QUICK)
    return edit_model(model, list(concepts) or ["cat"], config=config, **options).save(out, **saving)


def commands(text: str) -> list[list[str]]:
    """The commands of "Made by"."""
    block = re.search(r"## Made by\n\n```sh\n(.*?)\n```", text, re.DOTALL)
    assert block is not None, text
    return [shlex.split(line)[1:] for line in block[1].splitlines()]


def remake(text: str, place: Path) -> None:
    """Write the files that the card gives, and run its commands, in the folder that they are run in."""
    for name, content in re.findall(r"with ([\w.\\-]+):\n\n`{3,}json\n(.*?)\n`{3,}", text, re.DOTALL):
        (place / name.replace("\\", "")).write_text(content, encoding="utf-8")
    for line in commands(text):
        said = run(*line, "-q")
        assert said.exit_code == 0, said.stderr


# What it tells


def test_a_folder_gets_a_card_that_tells_what_the_record_tells(sd1: Path, tmp_path: Path) -> None:
    concepts = [Concept("cat", "a rug", ("kitty", "puss")), "Van Gogh"]
    out = edited(sd1, tmp_path / "out", *concepts, preserve=["dog", "horse"], config=replace(QUICK, words=1, beyond=2))
    text, record = (out / CARD).read_text(encoding="utf-8"), inspect_path(out)
    assert front(text)["tags"] == ["realera-edit", "concept-erasure", "stable-diffusion", "text-to-image"]
    assert {key: front(text)[key] for key in ("pipeline_tag", "library_name")} == {
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers",
    }
    assert not {"license", "base_model"} & set(front(text))  # neither is known, so neither is told
    assert "# sd1 without cat, Van Gogh" in text
    left = record["concepts"][0]["residual"]
    assert f"| cat | a rug | kitty, puss | cat {left['cat']:.2f}, kitty {left['kitty']:.2f}, puss" in text
    assert "By name: dog, horse." in text
    for concept in record["concepts"]:
        assert all(escaped(word) in text for word in (*concept["near"], *concept["words"]))
    drift, space = record["drift"], record["spaces"]["cross"]
    for name in ("dog", "horse"):
        assert f"{name} {drift[name]['mean']:.3f} ({drift[name]['worst']:.3f})" in text
    assert f"rank {space['rank']} of 96, condition {space['condition']:.1e}" in text
    assert f"{record['projections']['k_edited']} of {record['projections']['k_found']} keys" in text
    assert '"seed": 0' in text
    for word in ("2410.09140", "2308.14761", "realera-edit evaluate sd1 OUT", "realera-edit undo OUT", "torch"):
        assert word in text
    assert model_card(out) == text
    assert run("card", out).stdout == text
    edited(sd1, tmp_path / "bare", card=False)
    assert not (tmp_path / "bare" / CARD).exists()


def test_no_folder_of_this_machine_is_told(sd1: Path, single: Path, tmp_path: Path) -> None:
    """Neither in a card, nor in a record, nor in a header."""
    edited(sd1, tmp_path / "out")
    edited(tmp_path / "out", tmp_path / "two", "dog")
    erase(single, tmp_path / "out.safetensors")
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    edit.save(tmp_path / "edit.safetensors")
    apply_edit(edit, sd1).save(tmp_path / "applied")
    export_lora(edit, sd1, tmp_path / "lora.safetensors")
    told = [path.read_bytes() for name in ("out", "two", "applied") for path in (tmp_path / name).glob("*.*")]
    files = [tmp_path / name for name in ("out.safetensors", "edit.safetensors", "lora.safetensors")]
    told += [path.read_bytes() for path in (*files, tmp_path / "out.realera_edit.json")]
    told += [model_card(path).encode() for path in files]
    assert not [text for text in told if str(tmp_path).encode() in text]
    assert {inspect_path(tmp_path / name)["model"] for name in ("out", "applied")} == {"sd1"}


def test_any_name_means_nothing_but_itself(sd1: Path, tmp_path: Path) -> None:
    names = ["<script>x</script>", "a | b", "*bold* `code`", END, "--- #1", "猫\u202e"]
    out = edited(sd1, tmp_path / "out", *[Concept(name, "[x](y)") for name in names], preserve=["~~~"])
    text = (out / CARD).read_text(encoding="utf-8")
    prose = re.sub(r"^(`{3,})\w+\n.*?^\1\n", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" in text  # in a command, which is a block of code
    assert "<script>" not in prose
    rows = [line for line in text.splitlines() if line.startswith("| ") and "left |" not in line]
    assert len(rows) == len(names)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert "\u202e" not in prose
    assert without(text) == ""  # the END among the names ends nothing
    assert front(text)["pipeline_tag"] == "text-to-image"


# Making it again


@pytest.mark.parametrize("case", ["one", "two", "file", "config", "many", "prior", "dtype", "empty", "dashes"])
def test_its_commands_make_the_same_weights(
    case: str, sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(QUICK, prior_words=40)
    given: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "one": ([Concept("cat", "rug", ("kitty",))], {"preserve": ["dog's house", "-x"]}),
        "two": (["cat", "Van Gogh"], {"target": "art"}),
        "file": ([Concept("cat", "rug", ("kitty; puss",)), Concept("dog", None, (), 0.5, "person")], {}),
        "config": (["cat"], {"config": replace(few, strength=0.7, contexts=("{} at night",), edit="v", pooled=False)}),
        "many": ([f"cat {i}" for i in range(9)], {"preserve": [f"dog {i}" for i in range(9)], "config": few}),
        "prior": (["cat"], {"prior": ["a lake", "#1 fan"]}),
        "dtype": (["cat"], {"dtype": torch.bfloat16}),
        "empty": ([Concept("cat", ""), Concept("dog", "rug")], {}),
        "dashes": (["--force", "-o"], {}),
    }
    concepts, options = given[case]
    out = edited(sd1, tmp_path / "first", *concepts, **{"config": few, **options})
    monkeypatch.chdir(tmp_path)
    remake((out / CARD).read_text(encoding="utf-8"), tmp_path)
    assert tensor_bytes(tmp_path / "OUT" / UNET) == tensor_bytes(out / UNET) != tensor_bytes(sd1 / UNET)
    assert (tmp_path / "OUT" / CARD).read_bytes() == (out / CARD).read_bytes()


def test_each_step_of_several_edits_is_made_again(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(sd1, tmp_path / "first", preserve=["horse"])
    edit = EditFile.of(edit_model(sd1, ["dog"], config=QUICK))
    apply_edit(edit, tmp_path / "first").save(tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "second" / CARD).read_text(encoding="utf-8")
    assert [line[0] for line in commands(text)] == ["erase", "erase", "apply"]
    assert "# sd1 without cat, dog" in text
    assert text.index("| cat | object") < text.index("| dog | object")
    remake(text, tmp_path)
    assert tensor_bytes(tmp_path / "OUT" / UNET) == tensor_bytes(tmp_path / "second" / UNET)
    edit.scale(0.5).save(tmp_path / "half.safetensors")
    apply_edit(edit.scale(0.5), sd1).save(tmp_path / "half")
    for path in ("half", "half.safetensors"):
        assert "does not make one command" in model_card(tmp_path / path)


def test_a_single_file_and_an_edit_file_are_made_again(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase(single, tmp_path / "mine.safetensors").save_edit(tmp_path / "edit.safetensors")
    monkeypatch.chdir(tmp_path)
    for name, out in (("mine.safetensors", "OUT.safetensors"), ("edit.safetensors", "EDIT.safetensors")):
        text = model_card(tmp_path / name)
        (line,) = commands(text)
        assert "--tokenizer" in text or name == "edit.safetensors"
        assert run(*line, "--tokenizer", "folder", "-q").exit_code == 0
        assert tensor_bytes(tmp_path / out) == tensor_bytes(tmp_path / name)
        assert "library_name" not in front(text)
    assert "realera-edit undo mine.safetensors -o restored.safetensors` gives" in model_card("mine.safetensors")
    (tmp_path / "mine.realera_edit.json").unlink()
    text = model_card("mine.safetensors")
    assert "| cat | object |" in text
    assert "was not found" in text


# Another's card


def test_nothing_of_the_card_that_was_there_is_lost(sd1: Path, tmp_path: Path) -> None:
    (sd1 / CARD).write_text(THEIRS)
    out = edited(sd1, tmp_path / "out")
    text = (out / CARD).read_text()
    assert text.endswith(f"{END}\n# Their model\n\nUses: `paint`.\n")
    block, _ = split(text)
    found = yaml.safe_load(block.strip().removesuffix("---"))
    assert (found["license"], found["license_name"]) == ("other", "some-terms")
    assert found["tags"][:2] == ["painting", "realera-edit"]
    assert "- no\n" in block  # a language, not a boolean, as it was written
    assert found["inference"] is False
    assert found["base_model"] == "them/older"
    assert "model-index" not in found  # of other weights
    assert split(THEIRS)[0] in text  # and yet kept, with the comment
    assert without(text) == THEIRS
    assert "that of the unedited model, other" in text
    assert list(inspect_path(out)["license"].values()) == ["other", "some-terms", "LICENSE.md"]


@pytest.mark.parametrize("theirs", [
    THEIRS,
    THEIRS.replace("\n", "\r\n"),
    "# No front matter",
    "---\nlicense: mit\n---\n",
    "---\nbroken: [\n---\nText\n",
    "---\n- a list\n---\nText\n",
    "\n\n  text after blank lines\n\n",
    "---\na: '````'\n---\n```\ncode\n```\n",
])  # fmt: skip
def test_undo_gives_their_card_back_to_the_byte(theirs: str, sd1: Path, tmp_path: Path) -> None:
    (sd1 / CARD).write_bytes(theirs.encode())
    edited(sd1, tmp_path / "one")
    edited(tmp_path / "one", tmp_path / "two", "dog")
    one, two = ((tmp_path / name / CARD).read_bytes().decode() for name in ("one", "two"))
    assert two.count(BEGIN) == one.count(BEGIN) == 1
    assert "| dog | object" in two
    assert "| cat | object" in two  # both edits are in force
    undo_folder(tmp_path / "two", tmp_path / "back to one")
    assert (tmp_path / "back to one" / CARD).read_bytes().decode() == one
    undo_folder(tmp_path / "one", tmp_path / "back")
    assert (tmp_path / "back" / CARD).read_bytes().decode() == theirs
    assert tree(sd1)[CARD] == tree(tmp_path / "back")[CARD]


def test_undo_takes_a_card_that_was_ours_alone(sd1: Path, tmp_path: Path) -> None:
    edited(sd1, tmp_path / "out")
    undo_folder(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back" / CARD).exists()
    (tmp_path / "out" / CARD).write_text("mine alone")
    undo_folder(tmp_path / "out", tmp_path / "back two")
    assert (tmp_path / "back two" / CARD).read_text() == "mine alone"


def test_what_a_user_writes_into_the_card_stays(sd1: Path, tmp_path: Path) -> None:
    out = edited(sd1, tmp_path / "out")
    text = (out / CARD).read_text()
    (out / CARD).write_text(text.replace("tags:", "license: mit\ntags:\n- mine") + "\n# More of mine\n")
    assert run("card", out, "-o", out / CARD).exit_code == 0
    again = (out / CARD).read_text()
    assert front(again)["license"] == "mit"
    assert front(again)["tags"][0] == "mine"
    assert again.endswith("\n# More of mine\n")
    assert again.count(BEGIN) == 1
    assert front(model_card(out, license="apache-2.0"))["license"] == "apache-2.0"


def test_a_card_that_is_no_text_is_copied_and_warned_of(sd1: Path, tmp_path: Path) -> None:
    (sd1 / CARD).write_bytes(b"\xff\xfe")
    with pytest.warns(RealEraWarning, match=r"README\.md: cannot be read as UTF-8 text .* No model card is written"):
        edited(sd1, tmp_path / "out")
    assert (tmp_path / "out" / CARD).read_bytes() == b"\xff\xfe"
    undo_folder(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back")[CARD] == tree(sd1)[CARD]


def test_joining_twice_is_joining_once() -> None:
    fields = Fields({"base_model": "a/b"}, {"license": "mit"}, ("x",))
    once = joined(THEIRS, "ours", fields)
    assert joined(once, "ours", fields) == once
    assert without(once) == THEIRS
    assert front(once)["license"] == "other"
    assert without(THEIRS) == THEIRS


# Where it came from


def test_a_hub_model_is_the_base_and_its_commit_is_told(sd1: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--tiny-sd" / "snapshots" / commit
    folder.parent.mkdir(parents=True)
    sd1.rename(folder)
    (folder / CARD).write_text(THEIRS)
    out = edited(folder, tmp_path / "out")
    text, record = (out / CARD).read_text(), inspect_path(out)
    assert (record["model"], record["revision"]) == ("owner/tiny-sd", commit)
    assert (front(text)["base_model"], front(text)["base_model_relation"]) == ("owner/tiny-sd", "finetune")
    assert commands(text)[0][:2] == ["erase", "owner/tiny-sd"]
    assert f"--revision {commit}" in text
    # of an edit of the edit, the base is still told
    two = edited(out, tmp_path / "two", "dog")
    assert front((two / CARD).read_text())["base_model"] == "owner/tiny-sd"
    edit = EditFile.of(edit_model(folder, ["cat"], config=QUICK))
    edit.save(tmp_path / "edit.safetensors")
    export_lora(edit, folder, tmp_path / "lora.safetensors")
    for name in ("edit.safetensors", "lora.safetensors"):
        found = front(model_card(tmp_path / name))
        assert (found["base_model"], found["base_model_relation"]) == ("owner/tiny-sd", "adapter")
        assert "base_model:adapter:owner/tiny-sd" in found["tags"]
        assert found["license"] == "other"
        assert found["license_link"] == "https://huggingface.co/owner/tiny-sd/blob/main/LICENSE.md"


def test_a_saved_pipeline_has_a_card(sd1: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1)
    edit_model(pipe, ["cat"], config=QUICK).save(tmp_path / "out")
    text = (tmp_path / "out" / CARD).read_text()
    assert "| cat | object" in text
    assert "library_name: diffusers" in text
    assert "base_model" not in front(text)
    pipe.register_to_config(_name_or_path="owner/tiny-sd")
    edit_model(pipe, ["dog"], config=QUICK).save(tmp_path / "two")
    assert front((tmp_path / "two" / CARD).read_text())["base_model"] == "owner/tiny-sd"


# Results


def evaluation(folder: Path, **changes: Any) -> Path:
    rate = {"value": 0.25, "low": 0.1, "high": 0.5, "hits": 2, "count": 8}
    data = {
        "format": "realera-edit evaluation 1",
        "model": {"original": "/home/alice/sd1", "edited": "/home/alice/out"},
        "judge": {"name": "clip:ours"},
        "settings": {"seeds": [0, 1], "steps": 30, "guidance": 7.5},
        "rates": {"acc_e": {"edited": rate, "original": {**rate, "value": 1.0}}, "acc_g": {"edited": {"value": None}}},
        "harmonic": {"H_4": {"value": 0.875, "low": 0.5, "high": 1.0, "concepts": 1}},
        "command": "realera-edit evaluate /home/alice/sd1",
        "date": "2026-01-02T03:04:05+00:00",
        "recipe": None,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(data))
    return folder


def test_the_figures_of_an_evaluation_are_added(sd1: Path, tmp_path: Path) -> None:
    out = edited(sd1, tmp_path / "out")
    report = evaluation(tmp_path / "report", recipe=json.loads((out / RECORD).read_text()))
    said = run("card", out, "--evaluation", report, "-o", tmp_path / "new.md")
    assert (said.exit_code, said.stdout) == (0, f"written    {tmp_path / 'new.md'}\n")
    text = (tmp_path / "new.md").read_text()
    assert "| acc\\_e | 0.250 [0.100, 0.500] | 1.000 [0.100, 0.500] | 8 |" in text
    assert "| H\\_4 | 0.875 [0.500, 1.000] | | |" in text
    assert "acc\\_g |" not in text
    assert "judge clip:ours, 2 seeds, 30 steps, guidance 7.5" in text
    assert "alice" not in text
    (result,) = ModelCard(text).data.eval_results[:1]
    assert (result.metric_type, result.metric_value, result.task_type) == ("acc_e", 0.25, "text-to-image")
    assert "model-index" not in model_card(out)
    run("card", out, "--evaluation", report, "-o", out / CARD)
    run("card", out, "-o", out / CARD)  # a result that was stated stays, until another is given
    assert len(ModelCard.load(out / CARD).data.eval_results) == 2
    edited(out, tmp_path / "two", "dog")
    assert "model-index" not in front((tmp_path / "two" / CARD).read_text())


def test_an_evaluation_of_another_edit_is_refused(sd1: Path, tmp_path: Path) -> None:
    out, other = edited(sd1, tmp_path / "out"), edited(sd1, tmp_path / "other", "dog")
    for recipe in (json.loads((other / RECORD).read_text()), {"concepts": 5}):
        report = evaluation(tmp_path / "report", recipe=recipe)
        with pytest.raises(ConfigError, match=r"evaluation\.json: is of another edit"):
            model_card(out, evaluation=report)


# LoRAs, and what has no card


def test_a_lora_has_a_card(sd1: Path, tmp_path: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK, preserve=["dog"]))
    for format in ("diffusers", "kohya"):
        export_lora(edit, sd1, tmp_path / f"{format}.safetensors", format=format)
        text = model_card(tmp_path / f"{format}.safetensors")
        assert "lora" in front(text)["tags"]
        assert front(text)["library_name"] == "diffusers"
        assert ("load_lora_weights" in text) == (format == "diffusers")
        assert "| cat | object |" in text
        assert "By name: dog." in text


def test_what_is_no_edit_has_no_card(sd1: Path, single: Path, tmp_path: Path) -> None:
    edited(sd1, tmp_path / "out")
    undo_folder(tmp_path / "out", tmp_path / "back")
    cases = {
        sd1: "was not written by realera-edit",
        tmp_path / "back": "was not written by realera-edit",
        tmp_path / "back" / UNET: "holds no edit that is in force",
        tmp_path / "out" / UNDO: "holds no edit that is in force",
        single: "no record of an edit",
        tmp_path / "gone": "no such file",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            model_card(path)
        assert run("card", path, "-o", tmp_path / "new.md").exit_code == 1
    assert not (tmp_path / "new.md").exists()
    (tmp_path / "file").write_text("")
    said = run("card", tmp_path / "out", "-o", tmp_path / "file" / "new.md")
    assert "cannot be written" in said.stderr


@pytest.mark.parametrize("damage", [
    lambda d: d.update(config=5),
    lambda d: d["concepts"][0].update(residual={"cat": "x"}),
    lambda d: d.update(drift={"dog": 5}),
    lambda d: d.update(license=5),
    lambda d: d.update(versions=5),
])  # fmt: skip
def test_a_damaged_record_is_one_clear_error(damage: Callable[[Any], None], sd1: Path, tmp_path: Path) -> None:
    out = edited(sd1, tmp_path / "out", preserve=["dog"])
    data = json.loads((out / RECORD).read_text())
    damage(data)
    (out / RECORD).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="damaged"):
        model_card(out)
