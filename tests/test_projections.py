"""The projections that read the text are found by structure, and are those of the built U-Net."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from helpers import QUICK

from realera_edit import edit_model
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import ProjectionError
from realera_edit.projections import POOLED, Projection, selected, text_projections

WIDTH = 32
SMALL: dict[str, Any] = {
    "layers_per_block": 1,
    "block_out_channels": (16, WIDTH),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
MIXED = {**SMALL, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
EQUAL = {**SMALL, "block_out_channels": (WIDTH, WIDTH)}
MODELS: dict[str, Callable[[], Any]] = {
    "equal width": lambda: UNet2DConditionModel(**SMALL),
    "all widths equal": lambda: UNet2DConditionModel(**EQUAL),
    "other widths": lambda: UNet2DConditionModel(**{**SMALL, "block_out_channels": (16, 24)}),
    "only cross attention": lambda: UNet2DConditionModel(**SMALL, only_cross_attention=True),
    "one block only cross": lambda: UNet2DConditionModel(**EQUAL, only_cross_attention=(False, True)),
    "two transformers": lambda: UNet2DConditionModel(**SMALL, dual_cross_attention=True),
    "deep": lambda: UNet2DConditionModel(**SMALL, transformer_layers_per_block=(1, 3), use_linear_projection=True),
    "mixed blocks": lambda: UNet2DConditionModel(**MIXED),
    "control net": lambda: ControlNetModel(
        **{k: v for k, v in SMALL.items() if k != "up_block_types"}, conditioning_embedding_out_channels=(16, 16)
    ),
    "motion": lambda: UNetMotionModel(
        layers_per_block=1,
        block_out_channels=(16, WIDTH),
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        norm_num_groups=8,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        cross_attention_dim=WIDTH,
    ),
    "video": lambda: UNet3DConditionModel(
        layers_per_block=1,
        block_out_channels=(16, WIDTH),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    ),
}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def cross_attention(module: torch.nn.Module) -> set[str]:
    """Keys and values of every attention that says of itself that it reads another sequence."""
    return {
        f"{name}.{leaf}.weight"
        for name, part in module.named_modules()
        if isinstance(part, Attention) and part.is_cross_attention
        for leaf in ("to_k", "to_v")
    }


def find(
    shapes: Mapping[str, tuple[int, ...]], config: Any = None, width: int = WIDTH, pooled: int | None = None
) -> Any:
    return text_projections(shapes, config or {"cross_attention_dim": width}, width, pooled, "model/unet")


@pytest.mark.parametrize("name", MODELS)
def test_found_are_those_of_the_built_model(name: str) -> None:
    with torch.device("meta"):
        module = MODELS[name]()
    found = find(shapes_of(module), module.config)
    wanted = cross_attention(module)
    assert wanted
    assert {p.name for p in found} == wanted
    assert all(p.role == ("k" if ".to_k." in p.name else "v") and p.columns == WIDTH for p in found)


@pytest.mark.parametrize("name", ["equal width", "only cross attention", "one block only cross", "motion", "video"])
def test_width_alone_would_not_do(name: str) -> None:
    """Control: in these models other keys and values read as many inputs as the text has."""
    with torch.device("meta"):
        module = MODELS[name]()
    by_width = {n for n, s in shapes_of(module).items() if ".to_k." in n and s[1] == WIDTH}
    by_name = {n for n in shapes_of(module) if ".attn2.to_k." in n}
    wanted = {n for n in cross_attention(module) if ".to_k." in n}
    assert (by_name if "only cross" in name else by_width) != wanted


def test_found_in_a_folder_of_each_family(family: str, model: Path) -> None:
    checkpoint = open_checkpoint(model)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    pooled = {POOLED} if family == "sdxl" else set()
    assert {p.name for p in checkpoint.projections} == cross_attention(unet) | pooled
    assert {p.columns for p in checkpoint.projections if p.role != "pooled"} == {unet.config.cross_attention_dim}
    if family == "sdxl":
        text = checkpoint.encoder.pairs[1][1].config.projection_dim
        assert [p.columns for p in checkpoint.projections if p.role == "pooled"] == [text]
        assert shapes_of(unet)[POOLED][1] > text


def test_found_in_the_real_model(emoji: Path) -> None:
    config = json.loads((emoji / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    checkpoint = open_checkpoint(emoji)
    assert {p.name for p in checkpoint.projections} == cross_attention(unet)
    assert len(checkpoint.projections) == 14


def test_a_control_net_beside_the_unet_is_edited_too(sd1: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet")
    ControlNetModel.from_unet(unet, conditioning_channels=3).save_pretrained(sd1 / "controlnet")
    denoisers = {d.name: d for d in open_checkpoint(sd1).denoisers}
    assert set(denoisers) == {"unet", "controlnet"}
    assert {p.name for p in denoisers["controlnet"].projections} == cross_attention(
        ControlNetModel.from_pretrained(sd1 / "controlnet")
    )


def test_added_and_wrapped_projections() -> None:
    """UnCLIP's `add_k_proj`; a LoRA's base layer; an IP-Adapter's image keys, which read no text."""
    block = "mid_block.attentions.0.transformer_blocks.0.attn2"
    shapes = {
        "mid_block.attentions.0.to_q.weight": (16, 16),
        "mid_block.attentions.0.add_k_proj.weight": (16, WIDTH),
        "mid_block.attentions.0.add_v_proj.weight": (16, WIDTH),
        **{f"{block}.to_{x}.base_layer.weight": (16, 16 if x == "q" else WIDTH) for x in "qkv"},
        **{f"{block}.to_{x}.lora_A.default.weight": (4, WIDTH) for x in "kv"},
        **{f"{block}.processor.to_{x}_ip.0.weight": (16, WIDTH) for x in "kv"},
    }
    assert {p.name for p in find(shapes)} == set(list(shapes)[1:3]) | {
        f"{block}.to_{x}.base_layer.weight" for x in "kv"
    }


def test_fused_projections_are_an_error(sd1: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    with torch.no_grad():
        pipe.fuse_qkv_projections()
    with pytest.raises(ProjectionError, match=r"unet: .*fused; call unfuse_qkv_projections\(\) first"):
        edit_model(pipe, ["cat"], config=QUICK)
    only_fused = {n: s for n, s in shapes_of(pipe.unet).items() if ".to_k." not in n and ".to_v." not in n}
    only_fused = {n: s for n, s in only_fused.items() if ".to_q." not in n}
    with pytest.raises(ProjectionError, match=r"fused \(to_kv\); call unfuse_qkv_projections\(\)"):
        find(only_fused, pipe.unet.config, 96)
    pipe.unfuse_qkv_projections()
    edit_model(pipe, ["cat"], config=QUICK)
    changed = {name for name, weight in before.items() if not torch.equal(weight, pipe.unet.state_dict()[name])}
    assert changed == cross_attention(pipe.unet)


def test_none_found_says_what_there_is() -> None:
    shapes = shapes_of(MODELS["other widths"]())
    with pytest.raises(ProjectionError, match=r"model/unet: no cross-attention projection reads 64 inputs.*16, 24, 32"):
        find(shapes, {"cross_attention_dim": 32}, 64)
    with pytest.raises(ProjectionError, match=r"no attention key projection .* among its 1 tensors"):
        find({"conv_in.weight": (16, 4, 3, 3)})


def block_shapes(**changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...] | None] = {"q": (16, 16), "k": (16, WIDTH), "v": (16, WIDTH), **changes}
    return {f"b.attn2.to_{leaf}.weight": shape for leaf, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    "changes",
    [{"k": (WIDTH, 16)}, {"v": (WIDTH, 16)}, {"k": (WIDTH, 16), "v": (WIDTH, 16)}, {"v": None}, {"k": None}, {"q": ()}],
)
def test_shapes_that_contradict_one_another_are_an_error(changes: dict[str, tuple[int, ...] | None]) -> None:
    assert len(find(block_shapes())) == 2
    with pytest.raises(ProjectionError, match=r"model/unet: the weights of b\.attn2 do not fit together"):
        find(block_shapes(**changes))


@pytest.mark.parametrize("shape", [None, (64, 10), (64, 88), (90, 64)])
def test_a_pooled_path_that_does_not_fit_is_an_error(shape: tuple[int, int] | None) -> None:
    config = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 90}
    good = {**block_shapes(), POOLED: (64, 90)}
    assert find(good, config, pooled=40)[-1] == Projection(POOLED, "pooled", 40)
    assert len(find(good, {}, pooled=40)) == len(find(good, config)) == 2
    damaged = {**block_shapes(), **({POOLED: shape} if shape else {})}
    with pytest.raises(ProjectionError, match=f"pooled text path {POOLED} is .*expected 90 inputs, of which 40"):
        find(damaged, config, pooled=40)


def test_selected() -> None:
    every = tuple(Projection(role, role, 8) for role in ("k", "v", "pooled"))

    def names(edit: str, pooled: bool) -> str:
        return " ".join(p.name for p in selected(every, edit, pooled))

    assert names("kv", True) == "k v pooled"
    assert names("kv", False) == "k v"
    assert names("k", False) == "k"
    assert names("v", True) == "v pooled"
