"""Which weights are read where a component has several sets: the plain ones, unless a variant was asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import QUICK, UNET
from safetensors.torch import load_file, save_file

from realera_edit import edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError
from realera_edit.layers import compare, metric, text_weights

Tiny = Callable[..., Path]


def twin(name: str) -> str:
    return UNET.replace(".safetensors", f".{name}.safetensors")


def add_variant(folder: Path, name: str, scale: float, dtype: torch.dtype | None = None) -> None:
    """A set of weights beside the plain one: its attention is `scale` times as large."""
    tensors = load_file(folder / UNET)
    changed = {key: (value * scale if "attn2.to_" in key else value).to(dtype) for key, value in tensors.items()}
    save_file(changed, folder / twin(name), {"format": "pt"})


def is_file(folder: Path, name: str, **options: str) -> bool:
    """Whether the weights that are read are those of the file `name`."""
    wanted = load_file(folder / name)
    return all(torch.equal(w, wanted[p.name]) for _, p, w in text_weights(open_checkpoint(folder, **options)))


@pytest.mark.parametrize("name", ["fp16", "non_ema", "z"])
def test_plain_weights_win_over_variants(name: str, sd1: Path) -> None:
    """Whatever the order of their names."""
    wanted = metric(open_checkpoint(sd1))
    add_variant(sd1, name, 2.0)
    assert is_file(sd1, UNET)
    assert torch.equal(metric(open_checkpoint(sd1)), wanted)
    assert not is_file(sd1, twin(name))  # control


def test_a_variant_that_is_asked_for_wins(sd1: Path) -> None:
    encoder = next((sd1 / "text_encoder").glob("*.safetensors"))
    shutil.copy(encoder, encoder.with_suffix(".non_ema.safetensors"))
    add_variant(sd1, "fp16", 3.0)
    add_variant(sd1, "non_ema", 2.0)
    assert is_file(sd1, twin("non_ema"), variant="non_ema")
    assert is_file(sd1, UNET)


def test_the_only_variant_is_read(sd1: Path) -> None:
    add_variant(sd1, "fp16", 1.0, torch.float16)
    (sd1 / UNET).unlink()
    assert is_file(sd1, twin("fp16"))


def test_shards_beside_a_whole_file_are_read_as_diffusers_reads_them(tiny: Tiny, sd1: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet")
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(2)
    unet.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    shutil.copytree(tmp_path / "shards", sd1 / "unet", dirs_exist_ok=True)
    loaded = UNet2DConditionModel.from_pretrained(sd1 / "unet").state_dict()
    assert all(torch.equal(w, loaded[p.name]) for _, p, w in text_weights(open_checkpoint(sd1)))


def test_an_edit_is_compared_in_the_weights_of_the_original(sd1: Path, tmp_path: Path) -> None:
    """With the plain ones, and where a variant of the original was asked for, with the same of the edited model."""
    encoder = next((sd1 / "text_encoder").glob("*.safetensors"))
    shutil.copy(encoder, encoder.with_suffix(".non_ema.safetensors"))
    add_variant(sd1, "non_ema", 2.0)
    edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "out")
    edited = open_checkpoint(tmp_path / "out")
    plain, asked = (compare(open_checkpoint(sd1, variant=v), edited) for v in (None, "non_ema"))
    for name in ("edited", "mixed", "original"):
        torch.testing.assert_close(getattr(asked, name), 4 * getattr(plain, name), rtol=1e-5, atol=1e-5)


def test_variants_of_different_layers_are_refused(sd1: Path) -> None:
    """An edit would pass over those that the other set lacks, and the concept would stay in them."""
    add_variant(sd1, "fp16", 1.0)
    tensors = load_file(sd1 / twin("fp16"))
    lost = "mid_block.attentions.0.transformer_blocks.0.attn2."
    save_file({key: value for key, value in tensors.items() if not key.startswith(lost)}, sd1 / twin("fp16"))
    with pytest.raises(CheckpointError, match=rf"its variants have different layers \({lost}to_"):
        open_checkpoint(sd1)
