"""The whole attack by textual inversion: its lines, its control, what it stores, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QUICK, run, tree

from realera_edit import edit_model, generate, inversion_run
from realera_edit.errors import CheckpointError, ConceptError, ConfigError, EncodingError
from realera_edit.generate import Drawing, open_pipeline
from realera_edit.inversion import Inversion, denoising_error, start_token, turned
from realera_edit.inversion_run import invert_model
from realera_edit.judges import FunctionJudge

LABELS = ("cat", "dog")
START = "person"
LINES = [
    *(("unedited", "its name"), ("unedited", "learned word")),
    *(("edited", "its name"), ("edited", "start word"), ("edited", "learned word"), ("edited", "control")),
]
OPTIONS: dict[str, Any] = {"steps": 3, "examples": 3, "start": START, "seeds": (0, 1), "drawing": Drawing(2, 3.0)}


@pytest.fixture(scope="module")
def models(pristine: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("inversion") / "edited"
    edit_model(pristine("sd1"), ["cat"], config=replace(QUICK, strength=0.9)).save(out, undo=False)
    return pristine("sd1"), out


class Watched:
    """A judge that keeps what it was shown, and says "cat" of every other picture."""

    name, labels, styles = "watched", LABELS, ()

    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []

    def __call__(self, pictures: np.ndarray) -> Any:
        self.shown.append(pictures)
        return FunctionJudge(lambda some: np.arange(len(some)) % 2, LABELS)(pictures)


def test_turned_pictures_are_others_and_come_back() -> None:
    pictures = torch.randint(256, (2, 4, 5, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    there = turned(pictures)
    assert torch.equal(turned(there, back=True), pictures)
    # the lowest row is the first, and red is shown as green
    assert torch.equal(there[:, 0, :, 1], pictures[:, -1, :, 0])
    grey = pictures[..., :1].repeat(1, 1, 1, 3)
    assert torch.equal(turned(grey), grey.flip(1))


def test_every_line_is_what_its_word_draws(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With an attack that learns nothing, each learned word draws what the start word draws; the control, turned."""
    learned_from = []

    def nothing(pipe: Any, pictures: torch.Tensor, **options: Any) -> Inversion:
        learned_from.append(pictures)
        table = pipe.text_encoder.get_input_embeddings().weight
        return Inversion(table[start_token(pipe, START)].detach().clone(), START, (0.0,))

    monkeypatch.setattr(inversion_run, "invert", nothing)
    judge = Watched()
    (report,) = invert_model(*models, "Cat", judge=judge, **OPTIONS)
    assert [(row.model, row.word) for row in report.rows] == LINES
    # both templates on both seeds
    assert {row.rate.count for row in report.rows if row.rate} == {4}
    assert {row.rate.hits for row in report.rows if row.rate} == {2}
    named, before, erased, start, learned, control = judge.shown
    assert np.array_equal(learned, start)
    assert np.array_equal(turned(torch.from_numpy(control)).numpy(), start)
    assert not np.array_equal(erased, start)
    assert not np.array_equal(before, learned)  # another model
    assert report.row("edited", "learned word").error == report.row("edited", "start word").error
    assert report.row("edited", "control").error != report.row("edited", "start word").error  # of turned pictures
    assert report.regained == 0 or np.isnan(report.regained)
    # what is learned from is the unedited model's, for both models alike, and is not what is judged
    one, two, three = learned_from
    assert torch.equal(one, two)
    assert torch.equal(turned(one), three)
    assert len(one) == 3
    assert not any(np.array_equal(a, b) for a in one.numpy() for b in named)


def test_a_second_run_draws_and_learns_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, int, int]] = []
    before = [tree(model) for model in models]
    (first,) = invert_model(*models, ["cat"], out=tmp_path, progress=lambda *now: said.append(now), **OPTIONS)
    assert {row.rate for row in first.rows} == {None}
    assert ("learning cat, edited, control", 3, 3) in said
    assert len(list((tmp_path / "words").iterdir())) == 3
    files = tree(tmp_path)
    monkeypatch.setattr(inversion_run, "invert", lambda *_, **__: pytest.fail("learned again"))
    monkeypatch.setattr(generate, "_pictures", lambda *_: pytest.fail("drawn again"))
    (again,) = invert_model(*models, ["cat"], out=tmp_path, **OPTIONS)
    assert again.to_dict() == first.to_dict()
    assert tree(tmp_path) == files
    assert [tree(model) for model in models] == before
    # a word is read by diffusers, and a damaged one is named
    word = next((tmp_path / "words").iterdir())
    pipe = open_pipeline(models[0])
    pipe.load_textual_inversion(str(word))
    word.write_bytes(word.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{word.name}: not a learned word"):
        invert_model(*models, ["cat"], out=tmp_path, **OPTIONS)


def test_denoising_error_is_the_loss_on_fixed_noise(models: tuple[Path, Path]) -> None:
    pipe = open_pipeline(models[0])
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pictures = torch.randint(256, (3, size, size, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    one = denoising_error(pipe, pictures, ["cat"])
    assert one == denoising_error(pipe, pictures, ["cat"])
    assert one != denoising_error(pipe, pictures, ["dog"])
    assert one != denoising_error(pipe, pictures, ["cat"], seed=1)
    unet = pipe.unet.forward
    # a denoiser that gives nothing has the error of the noise itself, which has a variance of one
    pipe.unet.forward = lambda *args, **options: type("Out", (), {"sample": 0 * unet(*args, **options).sample})()
    assert denoising_error(pipe, pictures, ["cat"], draws=40) == pytest.approx(1, abs=0.1)


def test_requests_at_fault(models: tuple[Path, Path], sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="judge watched does not know 'lion'"):
        invert_model(*models, ["lion"], judge=Watched(), **OPTIONS)
    with pytest.raises(ConfigError, match="knows one label, and would see it in every picture; name others"):
        invert_model(*models, ["cat"], judge=FunctionJudge(len, ("cat",)), **OPTIONS)
    with pytest.raises(ConceptError, match="is empty"):
        invert_model(*models, [" "], **OPTIONS)
    with pytest.raises(ConfigError, match="0 steps"):
        invert_model(*models, ["cat"], **{**OPTIONS, "steps": 0})
    with pytest.raises(EncodingError, match="start from a word that is one token"):
        invert_model(*models, ["cat"], out=tmp_path / "out", **{**OPTIONS, "start": "cat dog"})
    with pytest.raises(CheckpointError, match="pipelines of one text encoder"):
        invert_model(sdxl, sdxl, ["cat"], out=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_the_command(models: tuple[Path, Path], tmp_path: Path) -> None:
    args = ["attack", models[0], "--edited", models[1], "cat", "--words", "0", "--inversion", "2", "--start", START]
    args += ["--seeds", "0", "--steps", "2"]
    said = run(*args, "-o", tmp_path / "out")
    assert said.exit_code == 0, said.stderr
    assert "inversion  cat: 2 steps on 8 pictures of the unedited model\n" in said.stdout
    for model, word in LINES:
        assert f"\n           {model}, {word} " in said.stdout
    data = json.loads((tmp_path / "out" / "attack.json").read_text("utf-8"))
    again = run(*args, "-o", tmp_path / "out", "--json")
    assert json.loads(again.stdout) == data
    (one,) = data["concepts"]
    assert one["attacks"]
    assert [(row["model"], row["word"]) for row in one["inversion"]["rows"]] == LINES
    plain = run(*args[:7])
    assert "inversion" not in plain.stdout
    useless = run(*args[:7], "-o", tmp_path / "other")
    assert (useless.exit_code, useless.stdout) == (2, "")
    assert "--out is for --inversion" in useless.stderr
    judged = run(*args, "--judge", "oracle")
    assert (judged.exit_code, judged.stderr.count("\n")) == (1, 1)
    assert "judge 'oracle': expected reference" in judged.stderr


def test_a_model_that_cannot_be_drawn_is_told_of_first(
    models: tuple[Path, Path], single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realera_edit.attack_run.attack_model", lambda *_, **__: pytest.fail("attacked"))
    for args in ([models[0], "--edited", single], [single, "--edited", models[1]]):
        said = run("attack", *args, "cat", "--inversion", "2")
        assert (said.exit_code, said.stderr.count("\n")) == (1, 1)
        assert "model.safetensors: pictures are drawn from diffusers folders" in said.stderr
    with pytest.raises(CheckpointError, match=r"gone/model_index\.json: no such file"):
        invert_model(models[0], single.parent / "gone", "cat")
