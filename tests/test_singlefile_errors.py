"""Single files that are no checkpoint, pickles, options without meaning, damaged headers: one clear error each."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import split_file, write_file
from safetensors.torch import load_file, save_file
from single_models import PREFIX, erase

from realera_edit import RealEraError, edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError, ProjectionError
from realera_edit.singlefile import open_single


def projections(path: Path) -> set[str]:
    return {p.name for p in open_single(path, tokenizer=path.parent / "folder").projections}


@pytest.mark.parametrize("ending", ["ckpt", "pt", "CKPT"])
def test_a_pickle_is_refused_with_a_command_that_works(ending: str, single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    old = tmp_path / f"old model.{ending}"
    whole = torch.zeros(4, 4)
    torch.save({"state_dict": {**tensors, "view": whole[:2], "again": whole}, "global_step": 7}, old)
    with pytest.raises(CheckpointError, match=r"can run code when loaded and is never opened\. Convert it") as caught:
        edit_model(old, ["cat"])
    if ending == "ckpt":
        command = re.sub("^python", sys.executable, str(caught.value).partition("Convert it: ")[2])
        subprocess.run(command, shell=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        converted = load_file(tmp_path / "old model.safetensors")
        assert {name: w for name, w in converted.items() if name not in ("view", "again")}.keys() == tensors.keys()
        assert all(torch.equal(weight.float(), converted[name].float()) for name, weight in tensors.items())


def test_files_that_are_no_checkpoint_are_told_apart(single: Path, tmp_path: Path) -> None:
    cases = {
        "lora_unet_down_blocks_0_attentions_0.lora_up.weight": "a LoRA, not a checkpoint",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "a transformer (SD3, FLUX, ...)",
        "first_stage_model.decoder.conv_in.weight": "no U-Net of Stable Diffusion .* first_stage_model.decoder.conv_in",
    }
    for name, message in cases.items():
        save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
        with pytest.raises(
            CheckpointError, match=f"a.safetensors: {message.replace('(', '[(]').replace('...)', '.*')}"
        ):
            edit_model(tmp_path / "a.safetensors", ["cat"])
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a whole safetensors file"):
        open_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"models/a\.safetensors: no such file; give"):
        edit_model("models/a.safetensors", ["cat"])
    save_file(
        {f"{PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ProjectionError, match=r"a\.safetensors: .*"):
        erase(tmp_path / "a.safetensors", text_encoder=single.parent / "folder")


def test_options_that_have_no_meaning_are_refused(single: Path) -> None:
    folder = single.parent / "folder"
    with pytest.raises(CheckpointError, match="has no variants; leave --variant out"):
        erase(single, variant="fp16")
    with pytest.raises(CheckpointError, match="brings its own tokenizer"):
        erase(single, tokenizer=folder, text_encoder=folder)
    for option in ("tokenizer", "text_encoder"):
        with pytest.raises(
            CheckpointError, match="folder: no single file; --tokenizer and --text-encoder are for those"
        ):
            edit_model(folder, ["cat"], **{option: folder})
        with pytest.raises(CheckpointError, match="a loaded pipeline has its own text encoder"):
            edit_model(_Pipe(), ["cat"], **{option: folder})


class _Pipe:
    """No pipeline at all: the option is refused before anything is looked at."""


def test_random_damage_to_the_header_is_our_error_or_harmless(single: Path) -> None:
    """Never another exception, and never other projections."""
    text, data = split_file(single)
    sound, dice = projections(single), random.Random(0)
    spots = [m.start() for m in re.finditer(rb"attn2\.to_[kv]|token_emb|self_attn|dtype|shape|offsets", text)]
    went = {"error": 0, "opened": 0}
    for _ in range(200):
        broken = bytearray(text)
        for _ in range(dice.randint(1, 2)):
            at = min(dice.choice(spots) + dice.randint(0, 60), len(broken) - 1)
            at = at if dice.random() < 0.6 else dice.randrange(len(broken))
            broken[at] = dice.choice((dice.randrange(256), dice.choice(b'0123456789",:[]{}FBI_')))
        write_file(single, bytes(broken), data)
        try:
            found = projections(single)
        except RealEraError:
            went["error"] += 1
            continue
        went["opened"] += 1
        assert len(found) >= len(sound) - 2
    assert went["error"] > 60, went
    assert went["opened"] > 5, went
