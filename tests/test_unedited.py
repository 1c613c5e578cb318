"""Copies of the unedited model in any corner of a folder stay out of the edited one, and of what is pushed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import QUICK, UNET, made, tree
from safetensors.torch import load_file, save_file

from realera_edit import RealEraWarning, edit_model, export_lora, push_to_hub
from realera_edit.errors import CheckpointError
from realera_edit.front_matter import CARD
from realera_edit.projections import POOLED
from realera_edit.provenance import RECORD, UNDO

Tiny = Callable[..., Path]
OWN = {RECORD, UNDO, CARD}
WEIGHTS = "diffusion_pytorch_model.safetensors"
WORDS = "left out of the output, since they hold the model unedited"
FOREIGN = "the edit did not write these weights"


def copy(file: Path, *targets: Path) -> None:
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def save(sd1: Path, out: Path) -> set[str]:
    """Files of an edited copy, beside those that the edit itself adds."""
    edit_model(sd1, ["cat"], config=QUICK).save(out)
    return set(tree(out)) - OWN


def pushed(out: Path) -> tuple[set[str], set[str]]:
    """(what `push` would upload, what it leaves here) beside our own files."""
    found = push_to_hub(out, "alice/no-cat", license="mit", dry_run=True)
    assert len(set(found.left_out)) == len(found.left_out)
    return set(found.files) - OWN, set(found.left_out) - OWN


def fill(root: Path, names: Iterable[str]) -> None:
    """Files that cannot be looked into."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"a pickle")


def fill_with_copies(root: Path, unet: Path) -> set[str]:
    """Copies of `unet` all over `root`, in every layout and format: their names."""
    copies = {f"{place}/{WEIGHTS}" for place in ("checkpoint-500/unet", "checkpoint-500/unet_ema", "unet_old", "a/b/c")}
    copy(unet, *(root / name for name in copies))
    tensors = load_file(unet)
    blocks = {name: value for name, value in tensors.items() if "attn2.to_k" in name}
    layouts = {
        "sd/model.safetensors": {f"model.diffusion_model.{name}": value for name, value in blocks.items()},
        "sd/ema.safetensors": {
            f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in blocks.items()
        },
        "peft/a.safetensors": {
            name.replace("to_k.weight", "to_k.base_layer.weight"): value for name, value in blocks.items()
        },
        "if/a.safetensors": {"down_blocks.0.attentions.0.add_k_proj.weight": torch.ones(2, 2)},
        "pixart/a.safetensors": {"transformer_blocks.0.attn2.to_v.weight": torch.ones(2, 2)},
    }
    for name, content in layouts.items():
        (root / name).parent.mkdir(exist_ok=True)
        save_file(content, root / name)
    pickles = {"x/unet/diffusion_pytorch_model.bin", "x/transformer/sub/a.pt", "onnx/unet/model.onnx", "unet_3/a.ckpt"}
    fill(root, pickles)
    return copies | set(layouts) | pickles


def test_copies_in_nested_folders_are_left_out(sd1: Path, tmp_path: Path) -> None:
    before = set(tree(sd1))
    copies = fill_with_copies(sd1, sd1 / UNET)
    (sd1 / "checkpoint-500" / "unet" / "config.json").write_text("{}")
    whole = tree(sd1)
    with pytest.warns(RealEraWarning, match=rf"{WORDS}: a/b/c/.* \.\.\. \({len(copies)} files\)$"):
        found = save(sd1, tmp_path / "out")
    assert found == before | {"checkpoint-500/unet/config.json"}
    assert tree(sd1) == whole


def test_what_is_no_copy_stays(sd1: Path, tmp_path: Path) -> None:
    """Other networks, additions to the model, what a training leaves, damaged files: nothing is said of them."""
    edit = made(sd1)
    (sd1 / "more").mkdir()
    for name, options in (("diffusers", {}), ("kohya", {}), ("full", {})):
        export_lora(edit, sd1, tmp_path / f"{name}.safetensors", format=name, **options)
        copy(tmp_path / f"{name}.safetensors", sd1 / "more" / f"{name}.safetensors")
    edit.save(tmp_path / "edit.safetensors")
    copy(tmp_path / "edit.safetensors", sd1 / "more" / "edit.safetensors")
    copy(sd1 / "vae" / WEIGHTS, sd1 / "checkpoint-500" / "vae" / WEIGHTS)
    copy(next((sd1 / "text_encoder").glob("*.safetensors")), sd1 / "checkpoint-500" / "text_encoder" / "a.safetensors")
    motion = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_k.weight"
    small = {
        "motion": motion,
        "ip": "ip_adapter.1.to_k_ip.weight",
        "custom": "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight",
        "old-lora": "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
        "inversion": "<cat>",
    }
    for name, key in small.items():
        save_file({key: torch.ones(2, 96)}, sd1 / "more" / f"{name}.safetensors")
    pickles = ("checkpoint-500/optimizer.bin", "checkpoint-500/text_encoder/pytorch_model.bin", "safety_checker/a.bin",
               "checkpoint-500/unet/optimizer.bin", "x/unet/adapter_model.bin", "x/unet_lora/pytorch_model.bin",
               "checkpoint-500/random_states_0.pkl", "more/learned_embeds.bin")  # fmt: skip
    fill(sd1, (*pickles, "checkpoint-500/unet/damaged.safetensors"))
    before = set(tree(sd1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save(sd1, tmp_path / "out") == before
        assert pushed(tmp_path / "out") == (before, set())


def test_the_shards_of_a_copy_go_together(sd1: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet")
    unet.save_pretrained(sd1 / "checkpoint-1" / "unet", max_shard_size="200KB")
    shards = {str(path.relative_to(sd1)) for path in (sd1 / "checkpoint-1" / "unet").glob("*.safetensors")}
    read = {name for name in shards if any("attn2.to_" in key for key in load_file(sd1 / name))}
    assert 0 < len(read) < len(shards)
    before = set(tree(sd1))
    with pytest.warns(RealEraWarning, match=WORDS):
        assert save(sd1, tmp_path / "out") == before - shards


def test_an_index_leads_nowhere(sd1: Path, tmp_path: Path) -> None:
    """What a nested index names is no reason to look at it, to leave it out, or to fail."""
    (sd1 / "x" / "unet").mkdir(parents=True)
    index = {"weight_map": {"mid_block.attn2.to_k.weight": "../../vae/" + WEIGHTS, "b": str(tmp_path / "secret")}}
    (sd1 / "x" / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    before = set(tree(sd1))
    assert save(sd1, tmp_path / "out") == before


def test_a_link_to_the_edited_folder_is_no_edited_folder(sd1: Path, tmp_path: Path) -> None:
    """Followed, it would be copied as it was."""
    (sd1 / "x").mkdir()
    (sd1 / "x" / "unet").symlink_to(sd1 / "unet")
    with pytest.warns(RealEraWarning, match=f"{WORDS}: x/unet/{WEIGHTS}$"):
        found = save(sd1, tmp_path / "out")
    assert UNET in found
    assert f"x/unet/{WEIGHTS}" not in found


@pytest.mark.parametrize("shard", [None, "200KB"])
def test_every_edited_component_stays(shard: str | None, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("sd1", torch.float32, None, shard)
    for name in ("unet_2", "controlnet", "controlnet_1", "transformer", "prior", "decoder"):
        shutil.copytree(folder / "unet", folder / name)
    before = set(tree(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save(folder, tmp_path / "out") == before
        assert pushed(tmp_path / "out") == (before, set())


def test_a_component_of_another_text_stays(sd1: Path, sdxl: Path, tmp_path: Path) -> None:
    """It is in the model's index, and no edit of this text reaches it; nested, it is a copy like any other."""
    shutil.copytree(sdxl / "unet", sd1 / "unet_wide")
    before = set(tree(sd1))
    assert POOLED in load_file(sd1 / "unet_wide" / WEIGHTS)
    assert save(sd1, tmp_path / "out") == before
    assert pushed(tmp_path / "out") == (before, set())
    shutil.copytree(sdxl / "unet", sd1 / "x" / "unet_wide")
    with pytest.warns(RealEraWarning, match=f"{WORDS}: x/unet_wide/{WEIGHTS}$"):
        save(sd1, tmp_path / "out2")


def test_the_original_weights_of_an_earlier_edit_are_left_out(sd1: Path, tmp_path: Path) -> None:
    """At the root they are replaced by those of this edit; elsewhere they would bring the concepts back."""
    edit_model(sd1, ["dog"], config=QUICK).save(tmp_path / "first")
    copy(tmp_path / "first" / UNDO, tmp_path / "first" / "old" / UNDO)
    with pytest.warns(RealEraWarning, match=f"{WORDS}: old/{UNDO}$"):
        found = save(tmp_path / "first", tmp_path / "out")
    assert f"old/{UNDO}" not in found


def test_nested_copies_are_not_pushed(sd1: Path, tmp_path: Path) -> None:
    before = save(sd1, tmp_path / "out")
    copies = fill_with_copies(tmp_path / "out", sd1 / UNET)
    # a component that came later and reads the same text
    shutil.copytree(sd1 / "unet", tmp_path / "out" / "unet_later")
    copies.add(f"unet_later/{WEIGHTS}")
    before.add("unet_later/config.json")
    copy(tmp_path / "out" / UNDO, tmp_path / "out" / "old" / UNDO)  # not among those that are warned of
    with pytest.warns(RealEraWarning, match=rf"{FOREIGN}, .*: a/b/c/.* \.\.\. \({len(copies)} files\)$"):
        assert pushed(tmp_path / "out") == (before, copies | {f"old/{UNDO}"})


def test_of_a_saved_pipeline_only_what_it_wrote_is_pushed(sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    edit_model(DiffusionPipeline.from_pretrained(sd1), ["cat"], config=QUICK).save(out)
    before = set(tree(out)) - OWN
    assert pushed(out) == (before, set())
    copies = {UNET.replace(".safetensors", ".fp16.safetensors"), f"checkpoint-500/{UNET}", "unet/a.bin"}
    copy(sd1 / UNET, *(out / name for name in copies))
    with pytest.warns(RealEraWarning, match=FOREIGN):
        assert pushed(out) == (before, copies)
    # the weights that a pipeline loads are those that are checked, whatever lies beside them
    copy(out / UNET, out / UNET.replace(".safetensors", ".z.safetensors"))
    copy(sd1 / UNET, out / UNET)
    with pytest.raises(CheckpointError, match="is not as the edit left it"):
        pushed(out)
