"""The model that ships with the package: complete, small, in the layout that diffusers loads, and erasable by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from realera_edit import EditConfig, edit_model, reference_model
from realera_edit.cli import cli
from realera_edit.hub import resolve


def test_ships_whole_and_small() -> None:
    folder = reference_model()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6
    assert {"README.md", "NOTICE", "concepts.json", "model_index.json"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


def test_name_stands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("emoji") == reference_model()
    (tmp_path / "emoji").mkdir()
    assert resolve("emoji") == Path("emoji")


@pytest.mark.filterwarnings("ignore")
def test_draws_what_is_asked_for() -> None:
    """Pictures of two concepts differ, and each is drawn on white."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(reference_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["an emoji of a red apple", "an emoji of a guitar"]
    draws = [torch.Generator().manual_seed(0) for _ in prompts]
    pictures = pipe(prompts, num_inference_steps=8, guidance_scale=4, generator=draws, output_type="np").images
    assert pictures.shape == (2, 64, 64, 3)
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.9
    assert abs(pictures[0] - pictures[1]).mean() > 0.05


@pytest.mark.filterwarnings("ignore:1 preserved entries or frequent words moved")  # "fur"
def test_erases_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "no-cat"
    ran = CliRunner().invoke(cli, ["erase", "emoji", "cat face", "-o", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    record = json.loads((out / "realera_edit.json").read_text("utf-8"))
    assert record["concepts"][0]["residual"]["cat face"] < 0.45
    assert record["projections"]["k_edited"] == record["projections"]["k_found"] > 0


def test_hundred_concepts_have_room() -> None:
    """Concepts of a narrow text space would pull one another; 384 dimensions hold a hundred apart."""
    labels = [row["label"] for row in json.loads((reference_model() / "concepts.json").read_text("utf-8"))]
    edit = edit_model(reference_model(), labels[:100], config=EditConfig(strength=0.8, overshoot=0)).edit
    own = torch.tensor([float(r) for group, r in zip(edit.groups, edit.residual, strict=True) if group.role == "name"])
    assert len(own) == 100
    assert own.mean() < 0.3
