"""The one way in: whatever the kinds of two models, the same weights are attacked with the same figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run
from safetensors.torch import load_file, save_file
from single_models import PREFIX, SHAPES, change, erase

from benchmarks.single_file import ema_name
from realera_edit import attack_model
from realera_edit.errors import CheckpointError, ProjectionError
from realera_edit.generate import open_pipeline

Build = Callable[..., Path]
FEW = {"words": 60, "top": 2}


def figures(*models: Any, **options: Any) -> Any:
    (report,) = attack_model(*models, "cat", **FEW, **options)
    return report.to_dict()


def alike(one: Any, two: Any) -> bool:
    """Whether two reports say the same; sums in another order differ in their last bits."""
    words = [[row["word"] for row in report["words"]] for report in (one, two)]
    kinds = [[(row["kind"], row["budget"]) for row in report["attacks"]] for report in (one, two)]
    scores = [[row["scored"][key] for row in r["attacks"] for key in ("distance", "success")] for r in (one, two)]
    return bool(words[0] == words[1] and kinds[0] == kinds[1] and scores[0] == pytest.approx(scores[1], abs=1e-3))


@pytest.fixture
def pair(request: pytest.FixtureRequest, pristine_single: Build, tmp_path: Path) -> dict[str, Path]:
    """A model and its edit, as folders and as single files; of Stable Diffusion 1.x unless told."""
    place = pristine_single(getattr(request, "param", SHAPES[0]))
    folder, file = place / "folder", place / "model.safetensors"
    erase(folder, tmp_path / "out")
    erase(file, tmp_path / "out.safetensors")
    return {"folder": folder, "file": file, "edited": tmp_path / "out", "edited file": tmp_path / "out.safetensors"}


def unet_of(path: Path, out: Path, prefix: str = "") -> Path:
    """The U-Net of a single file alone, its names after `prefix`."""
    state = {n: w for n, w in load_file(path).items() if n.startswith(PREFIX)}
    save_file({prefix + name.removeprefix(PREFIX): weight for name, weight in state.items()}, out)
    return out


@pytest.mark.parametrize("pair", SHAPES, indirect=True)
def test_an_attack_on_files_is_that_on_folders(pair: dict[str, Path]) -> None:
    wanted = figures(pair["folder"], pair["edited"])
    assert len(wanted["words"]) == 2
    assert any(attack["scored"]["success"] > 0.5 for attack in wanted["attacks"])
    # control: where nothing was erased, there are other figures
    assert not alike(figures(pair["folder"], pair["folder"]), wanted)
    words = {"tokenizer": pair["folder"]}
    assert alike(figures(pair["file"], pair["edited file"], **words), wanted)
    assert alike(figures(pair["file"], pair["edited"], **words), wanted)
    assert alike(figures(pair["folder"], pair["edited file"]), wanted)


def test_a_loaded_pipeline_is_compared_with_a_file(pair: dict[str, Path]) -> None:
    wanted = figures(pair["folder"], pair["edited"])
    assert alike(figures(open_pipeline(pair["folder"]), pair["edited file"]), wanted)
    with pytest.raises(CheckpointError, match="a loaded pipeline has its own text encoder"):
        figures(open_pipeline(pair["folder"]), pair["edited"], text_encoder=pair["folder"])


def test_copies_that_draw_nothing_do_not_count(pair: dict[str, Path]) -> None:
    wanted = figures(pair["folder"], pair["edited"])

    def with_copies(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({ema_name(n): 2 * w for n, w in tensors.items() if n.startswith(PREFIX)})

    change(pair["edited file"], with_copies)
    assert alike(figures(pair["folder"], pair["edited file"]), wanted)


def test_a_controlnet_is_found_in_both_kinds(single: Path, tmp_path: Path) -> None:
    """A folder's component `controlnet` is a file's `control_model`."""
    folder = single.parent / "folder"
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "controlnet").mkdir()
    (folder / "controlnet" / "config.json").write_bytes((folder / "unet" / "config.json").read_bytes())
    save_file({n: 3 * w for n, w in unet.items()}, folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    change(single, lambda tensors: tensors.update({
        n.replace(PREFIX, "control_model."): 3 * w for n, w in tensors.items() if n.startswith(PREFIX)
    }))  # fmt: skip
    erase(folder, tmp_path / "out")
    erase(single, tmp_path / "out.safetensors")
    wanted = figures(folder, tmp_path / "out")
    assert alike(figures(folder, tmp_path / "out.safetensors"), wanted)
    assert alike(figures(single, tmp_path / "out", tokenizer=folder), wanted)


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_the_unet_alone_is_attacked_with_a_text_encoder(prefix: str, pair: dict[str, Path], tmp_path: Path) -> None:
    wanted = figures(pair["folder"], pair["edited"])
    before = unet_of(pair["file"], tmp_path / "before.safetensors", prefix)
    after = unet_of(pair["edited file"], tmp_path / "after.safetensors")
    with pytest.raises(CheckpointError, match=r"before\.safetensors: holds no text encoder .*--text-encoder DIR"):
        figures(before, after)
    options = ("--text-encoder", pair["folder"], "--words", "60", "--top", "2", "--json")
    said = run("attack", before, "--edited", after, "cat", *options)
    (found,) = json.loads(said.stdout)["concepts"]
    assert alike(found, wanted)


def test_models_that_do_not_fit_are_named(pair: dict[str, Path], pristine_single: Build, tmp_path: Path) -> None:
    other, words = pristine_single("tiny-sdxl"), {"tokenizer": pair["folder"]}
    for edited in (other / "folder", other / "model.safetensors"):
        with pytest.raises(ProjectionError, match=r"does not read the text of .*folder; another model\?"):
            figures(pair["folder"], edited)
    # the same text encoder, and a U-Net of fewer blocks
    part = unet_of(pair["edited file"], tmp_path / "part.safetensors")
    change(part, lambda tensors: {n: w for n, w in tensors.items() if not n.startswith("middle_block")})
    with pytest.raises(ProjectionError, match=r"part.* has no unet mid_block\..* like .*folder; another model\?"):
        figures(pair["folder"], part)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file; give a diffusers folder"):
        figures(pair["folder"], tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="gone: no such folder; give a diffusers folder"):
        figures(tmp_path / "gone", pair["edited"], **words)
    with pytest.raises(CheckpointError, match="folder: no single file; --tokenizer and --text-encoder are for those"):
        figures(pair["folder"], pair["edited"], **words)
