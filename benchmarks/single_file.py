"""A diffusers model as one file of the original layout, as A1111 and ComfyUI use it: what our own maps are tested on.

`python -m benchmarks.single_file --shape sd15 --out FILE.safetensors` writes random weights at a public shape. U-Net
and text encoders have their original names; the VAE keeps its diffusers names: it is there for its bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

UNET = "model.diffusion_model."
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TEXT_PARTS = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)
_TEXT_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_name(name: str, config: Any) -> str:
    """The original name, without prefix, of a weight of diffusers' U-Net with this configuration."""
    path, _, leaf = name.rpartition(".")
    if path in _TOP:
        return f"{_TOP[path]}.{leaf}"
    step = int(config["layers_per_block"]) + 1
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, number, rest = match.groups()
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(number)}.{_resnet(rest)}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: not a weight of Stable Diffusion's U-Net")
    side, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{step * (block + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{step * (block + 1) - 1}.{place}.conv.{leaf}"
    at = step * block + number
    stem = f"input_blocks.{at + 1}" if side == "down" else f"output_blocks.{at}"
    return f"{stem}.1.{rest}" if kind == "attentions" else f"{stem}.0.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    path, _, leaf = rest.rpartition(".")
    return f"{_RESNET[path]}.{leaf}"


def unet_state(unet: Any) -> dict[str, Tensor]:
    """Original name, without prefix -> weight."""
    return {unet_name(name, unet.config): weight for name, weight in unet.state_dict().items()}


def clip_state(model: Any, inner: str = "text_model.") -> dict[str, Tensor]:
    """CLIP's own layout; files of old have no `inner` name."""
    return {inner + name.removeprefix("text_model."): weight for name, weight in model.state_dict().items()}


def openclip_state(model: Any, extra: int = 0) -> dict[str, Tensor]:
    """OpenCLIP's layout; `extra` layers that are stored and not run, as the last of Stable Diffusion 2.x."""
    import torch

    plain = {name.removeprefix("text_model."): weight for name, weight in model.state_dict().items()}
    state = {new: plain[old] for old, new in _TEXT_TOP.items()}
    if "text_projection.weight" in plain:
        state["text_projection"] = plain["text_projection.weight"].T.contiguous()
    else:
        width = plain["final_layer_norm.weight"].numel()
        state["text_projection"] = torch.randn(width, 2 * width).to(plain["final_layer_norm.weight"].dtype)
    state["logit_scale"] = torch.tensor(4.6052)
    layers = int(model.config.num_hidden_layers)
    for number in range(layers + extra):
        old, new = f"encoder.layers.{min(number, layers - 1)}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            joint = torch.cat([plain[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            part = {f"attn.in_proj_{kind}": joint} | {f"{b}.{kind}": plain[f"{old}{a}.{kind}"] for a, b in _TEXT_PARTS}
            # a layer too many must show wherever it is run
            state |= {new + name: weight * -3 if number >= layers else weight for name, weight in part.items()}
    return state


def single_state(pipe: Any) -> dict[str, Tensor]:
    """Key -> tensor of a pipeline as a single file: Stable Diffusion 1.x, 2.x or XL, told by its text encoders."""
    parts = {UNET: unet_state(pipe.unet), "first_stage_model.": pipe.vae.state_dict()}
    if getattr(pipe, "text_encoder_2", None) is not None:
        parts["conditioner.embedders.0.transformer."] = clip_state(pipe.text_encoder)
        parts["conditioner.embedders.1.model."] = openclip_state(pipe.text_encoder_2)
    elif pipe.text_encoder.config.hidden_act == "gelu":
        parts["cond_stage_model.model."] = openclip_state(pipe.text_encoder, extra=1)
    else:
        parts["cond_stage_model.transformer."] = clip_state(pipe.text_encoder)
    return {prefix + name: weight.contiguous() for prefix, part in parts.items() for name, weight in part.items()}


def ema_name(key: str) -> str:
    """The name of the EMA copy of a U-Net weight."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def main() -> None:
    """Build one file and print its size."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.shapes import DTYPES, SHAPES, pipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder to write the shape's tokenizer to")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out}: already exists; choose another file")
    pipe = pipeline(options.shape, getattr(torch, options.dtype), options.seed)
    save_file(single_state(pipe), options.out)
    if options.tokenizer:
        pipe.tokenizer.save_pretrained(options.tokenizer)
    print(f"{options.out}: {options.shape} in {options.dtype}, {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
