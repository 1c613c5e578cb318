"""Pictures in folders: each by its own seed, drawn once, whole, and never mixed with another model's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, UNet2DConditionModel
from helpers import tree
from PIL import Image

from realera_edit import generate
from realera_edit.errors import CheckpointError, ConfigError
from realera_edit.generate import Drawing, PictureFolder, Team, draw, fingerprint, open_pipeline

QUICK = Drawing(steps=2, guidance=3.0)
SHOTS = [(prompt, seed) for prompt in ("a cat", "a dog", "") for seed in (0, 7)]


@pytest.fixture(scope="module")
def pipe(pristine: Any) -> Any:
    """The tiny Stable Diffusion 1.x, opened as the evaluation opens it."""
    return open_pipeline(pristine("sd1"))


@pytest.fixture
def folder(pipe: Any, tmp_path: Path) -> PictureFolder:
    return PictureFolder(tmp_path / "pictures", fingerprint(pipe), QUICK)


def apart(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - two.astype(int)).max())


def test_pictures_are_the_pipelines_own(pipe: Any, folder: PictureFolder) -> None:
    assert draw(pipe, folder, SHOTS) == 6
    for (prompt, seed), picture in zip(SHOTS, folder.load(SHOTS), strict=True):
        alone = pipe(
            prompt,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        assert apart(picture, (alone * 255).round().astype(np.uint8)) <= 1
    assert len({picture.tobytes() for picture in folder.load(SHOTS)}) == 6


def test_no_picture_depends_on_its_batch(pipe: Any, folder: PictureFolder, tmp_path: Path) -> None:
    draw(pipe, folder, SHOTS, batch=6)
    for size in (1, 4):
        other = PictureFolder(tmp_path / str(size), fingerprint(pipe), QUICK)
        draw(pipe, other, SHOTS[::-1], batch=size)
        assert apart(folder.load(SHOTS), other.load(SHOTS)) <= 1
    # control: another seed is another picture
    assert apart(folder.load(SHOTS[:1]), folder.load(SHOTS[1:2])) > 10


def test_a_run_goes_on_where_it_stopped(
    pipe: Any, folder: PictureFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PictureFolder(tmp_path / "whole", fingerprint(pipe), QUICK)
    draw(pipe, whole, SHOTS, batch=2)
    real, calls = generate._pictures, []

    def breaks(model: Any, shots: Any, drawing: Drawing) -> np.ndarray:
        calls.append(list(shots))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, shots, drawing)

    monkeypatch.setattr(generate, "_pictures", breaks)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, folder, SHOTS, batch=2)
    first = {path: path.stat().st_mtime_ns for path in folder.folder.glob("*.png")}
    assert len(first) == 2
    seen: list[tuple[str, int, int]] = []
    again = PictureFolder(folder.folder, fingerprint(pipe), QUICK)
    assert draw(pipe, again, SHOTS, batch=2, label="again", progress=lambda *now: seen.append(now)) == 4
    assert seen == [("again", 2, 4), ("again", 4, 4)]
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert [shot for part in calls[2:] for shot in part] == SHOTS[2:]
    assert again.load(SHOTS).tobytes() == whole.load(SHOTS).tobytes()
    assert draw(pipe, again, SHOTS * 2, batch=2) == 0
    assert {path.suffix for path in folder.folder.iterdir()} == {".png", ".json"}


def test_several_processes_draw_what_one_draws(pipe: Any, folder: PictureFolder, tmp_path: Path) -> None:
    """Each its own batches, whoever is first, and the same bytes."""
    whole = PictureFolder(tmp_path / "whole", fingerprint(pipe), QUICK)
    draw(pipe, whole, SHOTS, batch=2)
    counts = [draw(pipe, folder, SHOTS, batch=2, team=Team(rank, 2)) for rank in (1, 0)]
    assert counts == [2, 4]
    assert tree(folder.folder) == tree(whole.folder)


def test_a_name_depends_on_everything_that_is_drawn_with() -> None:
    names = {QUICK.name("a cat", 0), QUICK.name("a cat", 1), QUICK.name("a dog", 0)}
    for change in ({"steps": 3}, {"guidance": 2.0}, {"height": 8}, {"width": 8}, {"negative": "red"}):
        names.add(replace(QUICK, **change).name("a cat", 0))
    assert len(names) == 8
    assert QUICK.name("a cat", 0) == Drawing(2, 3.0).name("a cat", 0)


def test_size_and_negative_prompt_reach_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    found = {}
    for name, drawing in {
        "plain": QUICK,
        "large": replace(QUICK, height=16, width=24),
        "not": replace(QUICK, negative="cat"),
    }.items():
        folder = PictureFolder(tmp_path / name, fingerprint(pipe), drawing)
        draw(pipe, folder, SHOTS[:1])
        found[name] = folder.load(SHOTS[:1])
    assert found["large"].shape == (1, 16, 24, 3)
    assert apart(found["plain"], found["not"]) > 0


def test_a_folder_belongs_to_one_model_and_one_way_of_drawing(pipe: Any, folder: PictureFolder) -> None:
    draw(pipe, folder, SHOTS[:1])
    with pytest.raises(CheckpointError, match=r"holds pictures of another model.*choose another output"):
        PictureFolder(folder.folder, "0" * 64, QUICK)
    with pytest.raises(CheckpointError, match=r"drawn otherwise \(steps 2, not 5\)"):
        PictureFolder(folder.folder, fingerprint(pipe), replace(QUICK, steps=5))
    (folder.folder / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match="not of pictures of realera-edit"):
        PictureFolder(folder.folder, fingerprint(pipe), QUICK)
    (folder.folder / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        PictureFolder(folder.folder, fingerprint(pipe), QUICK)


def test_missing_and_torn_pictures_are_named(pipe: Any, folder: PictureFolder) -> None:
    path = folder.path(*SHOTS[0])
    with pytest.raises(CheckpointError, match=f"{path.name}: no such picture"):
        folder.load(SHOTS)
    draw(pipe, folder, SHOTS[:1])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged"):
        folder.load(SHOTS[:1])
    assert folder.load([]).shape[0] == 0


def test_fingerprint_is_of_weights_scheduler_and_words(pristine: Any, tiny: Any) -> None:
    from diffusers import PNDMScheduler

    one, two = open_pipeline(pristine("sd1")), open_pipeline(tiny("sd1"))
    assert fingerprint(one) == fingerprint(two)
    two.scheduler = PNDMScheduler.from_config(two.scheduler.config, skip_prk_steps=True)
    assert fingerprint(one) != fingerprint(two)
    two.scheduler = one.scheduler
    assert fingerprint(one) == fingerprint(two)
    next(two.vae.parameters()).data[0] += 1
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(open_pipeline(pristine("sd1"), dtype=torch.bfloat16)) != fingerprint(one)


def test_unsound_models(sd1: Path, tmp_path: Path, folder: PictureFolder) -> None:
    pipe = open_pipeline(sd1)
    pipe.vae.decoder.conv_out.bias.data[:] = torch.nan
    with pytest.raises(CheckpointError, match="drew NaN"):
        draw(pipe, folder, SHOTS[:1])
    with pytest.raises(CheckpointError, match="device 'toaster' cannot be used"):
        open_pipeline(sd1, device="toaster")
    shutil.rmtree(sd1 / "vae")
    with pytest.raises(CheckpointError, match="sd1: cannot be loaded by diffusers"):
        open_pipeline(sd1)
    with pytest.raises(CheckpointError, match=r"gone/model_index.json: no such file"):
        open_pipeline(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="convert the single file"):
        open_pipeline(tmp_path / "model.safetensors")
    for wrong in ({"steps": 0}, {"guidance": -1.0}, {"guidance": float("nan")}):
        with pytest.raises(ConfigError, match="expected at least 1 and 0"):
            replace(QUICK, **wrong)


def test_sdxl(pristine: Any, tmp_path: Path) -> None:
    pipe = open_pipeline(pristine("sdxl"))
    folder = PictureFolder(tmp_path / "xl", fingerprint(pipe), QUICK)
    draw(pipe, folder, SHOTS[:2])
    assert apart(*folder.load(SHOTS[:2])) > 0


def inpainting(pipe: Any) -> Any:
    """The same networks, but for a U-Net that reads a mask and a masked picture beside the latent."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    parts = {**pipe.components, "unet": unet, "safety_checker": None}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def test_an_inpainting_model_draws_whole_pictures(pipe: Any, tmp_path: Path) -> None:
    inpainting(pipe).save_pretrained(tmp_path / "model")
    paint = open_pipeline(tmp_path / "model")
    folder = PictureFolder(tmp_path / "pictures", fingerprint(paint), QUICK)
    assert draw(paint, folder, SHOTS, batch=4) == 6
    [picture] = folder.load(SHOTS[1:2])
    side = len(picture)
    alone = paint(
        SHOTS[1][0],
        image=Image.new("RGB", (side, side), "white"),
        mask_image=Image.new("L", (side, side), 255),
        height=side,
        width=side,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(SHOTS[1][1]),
        output_type="np",
    ).images[0]
    assert apart(picture, (alone * 255).round().astype(np.uint8)) <= 1
    assert len({picture.tobytes() for picture in folder.load(SHOTS)}) == 6


def test_a_pipeline_that_needs_a_picture_is_refused(pipe: Any, folder: PictureFolder, tmp_path: Path) -> None:
    from_picture = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "safety_checker": None}, requires_safety_checker=False
    )
    from_picture.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="Img2ImgPipeline draws from a picture beside the text"):
        open_pipeline(tmp_path / "model")
    with pytest.raises(CheckpointError, match="draws from a picture beside the text"):
        draw(from_picture, folder, SHOTS)


@pytest.mark.slow
def test_accelerate_launch_draws_the_same(pipe: Any, pristine: Any, folder: PictureFolder, tmp_path: Path) -> None:
    """Two CPU processes, each half of the batches, and each sees all pictures when `draw` returns."""
    draw(pipe, folder, SHOTS, batch=1)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom realera_edit.generate import *\n"
        "team, pipe = Team.of_environment(), open_pipeline(sys.argv[1])\n"
        "folder = PictureFolder(Path(sys.argv[2]), fingerprint(pipe), Drawing(steps=2, guidance=3.0))\n"
        "shots = [(prompt, seed) for prompt in ('a cat', 'a dog', '') for seed in (0, 7)]\n"
        "drawn = draw(pipe, folder, shots, batch=1, team=team)\n"
        "said = f'{drawn} drawn of {len(folder.load(shots))} by one of {team.size}'\n"
        "Path(sys.argv[3], f'rank{team.rank}').write_text(said)\n"  # one stdout for both would mix their lines
    )
    # its option's name notwithstanding, this is how accelerate launches several processes without MPI
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    said = subprocess.run(
        [*launch, *fixed, script, pristine("sd1"), tmp_path / "out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(generate.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert said.returncode == 0, said.stderr
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == "3 drawn of 6 by one of 2"
    assert tree(tmp_path / "out") == tree(folder.folder)
