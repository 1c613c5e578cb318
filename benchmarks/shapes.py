"""Diffusers folders of random weights at the shapes of public models, and narrow ones of the same structure.

`python -m benchmarks.shapes --shape sd15 --out DIR` writes Stable Diffusion 1.5 without a download: U-Net, text
encoder(s) and VAE at their public shapes, a tokenizer with a vocabulary of its own (`clip_tokenizer`), no safety
checker. The tiny-* shapes keep the structure, and heads of 64 in the text encoders, with few narrow layers; they build
in about a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.clip_tokenizer import END, load_tokenizer

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class Text:
    """One text encoder: fields of its `CLIPTextConfig`, its class, and the token that pads its prompts."""

    config: Mapping[str, Any]
    kind: str = "CLIPTextModel"
    pad: str = END


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model: its text encoders, fields of the U-Net's and the VAE's configuration, and its pipeline class."""

    texts: tuple[Text, ...]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    pipeline: str = "StableDiffusionPipeline"
    prediction: str = "epsilon"
    vocabulary: int = 49408


def _blocks(cross: tuple[bool, ...]) -> dict[str, Any]:
    """Block types of a U-Net whose down blocks read the text where `cross` says so, and up blocks mirrored."""
    pairs = [_CROSS if reads else _PLAIN for reads in cross]
    return {
        "down_block_types": tuple(down for down, _ in pairs),
        "up_block_types": tuple(up for _, up in reversed(pairs)),
        "in_channels": 4,
        "out_channels": 4,
    }


def _text(hidden: int, layers: int, heads: int, act: str = "quick_gelu", **more: Any) -> dict[str, Any]:
    size = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return {**size, "num_attention_heads": heads, "hidden_act": act, "projection_dim": hidden, **more}


def _vae(channels: tuple[int, ...], layers: int, groups: int, scale: float) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 4,
        "scaling_factor": scale,
        "sample_size": 64 * 2 ** (len(channels) - 1) if groups == 32 else 16,
    }


_TEXT_XL = {"addition_embed_type": "text_time", "use_linear_projection": True}
_VAE = (128, 256, 512, 512), 2, 32
_TINY_VAE = (8, 16), 1, 8
_TINY_UNET = {"layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
SHAPES: dict[str, Shape] = {
    "sd15": Shape(
        (Text(_text(768, 12, 12)),),
        _blocks((True, True, True, False))
        | {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
        | {"sample_size": 64},
        _vae(*_VAE, 0.18215),
    ),
    "sd21": Shape(
        (Text(_text(1024, 23, 16, "gelu", projection_dim=512), pad="!"),),
        _blocks((True, True, True, False))
        | {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1024, "sample_size": 96}
        | {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True, "upcast_attention": True},
        _vae(*_VAE, 0.18215),
        prediction="v_prediction",
    ),
    "sdxl": Shape(
        (Text(_text(768, 12, 12)), Text(_text(1280, 32, 20, "gelu"), "CLIPTextModelWithProjection", "!")),
        _blocks((False, True, True))
        | _TEXT_XL
        | {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20)}
        | {"transformer_layers_per_block": (1, 2, 10), "addition_time_embed_dim": 256, "sample_size": 128}
        | {"projection_class_embeddings_input_dim": 2816},
        _vae(*_VAE, 0.13025),
        "StableDiffusionXLPipeline",
    ),
    "tiny-sd15": Shape(
        (Text(_text(128, 2, 2)),),
        _blocks((True, False))
        | _TINY_UNET
        | {"block_out_channels": (16, 32), "cross_attention_dim": 128, "attention_head_dim": 4},
        _vae(*_TINY_VAE, 0.18215),
        vocabulary=1500,
    ),
    "tiny-sd21": Shape(
        (Text(_text(192, 3, 3, "gelu", projection_dim=64), pad="!"),),
        _blocks((True, False))
        | _TINY_UNET
        | {"block_out_channels": (16, 32), "cross_attention_dim": 192, "attention_head_dim": (2, 4)}
        | {"use_linear_projection": True, "upcast_attention": True},
        _vae(*_TINY_VAE, 0.18215),
        prediction="v_prediction",
        vocabulary=1500,
    ),
    "tiny-sdxl": Shape(
        (Text(_text(64, 2, 1)), Text(_text(128, 3, 2, "gelu"), "CLIPTextModelWithProjection", "!")),
        _blocks((False, True, True))
        | _TEXT_XL
        | _TINY_UNET
        | {"block_out_channels": (16, 24, 32), "cross_attention_dim": 192, "attention_head_dim": (2, 2, 4)}
        | {"transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8}
        | {"projection_class_embeddings_input_dim": 6 * 8 + 128},
        _vae(*_TINY_VAE, 0.13025),
        "StableDiffusionXLPipeline",
        vocabulary=1500,
    ),
}


def _fill(module: torch.nn.Module, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """A module built on the meta device, with memory and random weights of the variance that torch starts with.

    Matrices and kernels are normal with variance 1 / (3 fan_in), biases 0, gains of norms 1. Only the tensor in hand
    is ever held in float32 besides.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Module.to(module, dtype)  # diffusers' own `to` warns of modules that it keeps in float32
    module = module.to_empty(device="cpu").requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(float(name.endswith("weight")))
        else:
            std = (3 * parameter[0].numel()) ** -0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
    return module


def meta_unet(shape: str) -> Any:
    """The U-Net of a shape on the meta device: structure without memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SHAPES[shape].unet)


def _meta_vae(shape: str) -> Any:
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**SHAPES[shape].vae)


def text_encoders(shape: str, dtype: torch.dtype | None = None, seed: int = 0) -> list[tuple[Any, Any]]:
    """(tokenizer, text model) of a shape with the random weights that transformers starts with."""
    import torch
    import transformers

    pairs, spec = [], SHAPES[shape]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for text in spec.texts:
            tokenizer = load_tokenizer(spec.vocabulary, text.pad)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = transformers.CLIPTextConfig(
                **text.config, **ids, pad_token_id=tokenizer.pad_token_id, vocab_size=spec.vocabulary
            )
            model = getattr(transformers, text.kind)(config)
            pairs.append((tokenizer, model.to(dtype or torch.float32).eval().requires_grad_(False)))
    return pairs


def pipeline(shape: str, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """A pipeline of a shape with random weights in `dtype` (float32 unless told)."""
    import diffusers
    import torch

    spec, dtype = SHAPES[shape], dtype or torch.float32
    parts: dict[str, Any] = {}
    for place, (tokenizer, model) in enumerate(text_encoders(shape, dtype, seed)):
        suffix = f"_{place + 1}" if place else ""
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": model}
    parts["vae"] = _fill(_meta_vae(shape), dtype, seed + 1)
    parts["unet"] = _fill(meta_unet(shape), dtype, seed + 2)
    parts["scheduler"] = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=spec.prediction,
    )  # fmt: skip
    if len(spec.texts) == 1:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        parts["add_watermarker"] = False
    return getattr(diffusers, spec.pipeline)(**parts)


def _shard_size(module: Any, shards: int) -> int | None:
    """The largest file size in bytes that splits the weights into `shards` files; None for one file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state = module.state_dict()
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    for step in range(200 if shards > 1 else 0):
        size = int(total / shards * (1 + step / 100)) + 1
        if len(split_torch_state_dict_into_shards(state, max_shard_size=size).filename_to_tensors) == shards:
            return size
    if shards > 1:
        raise ValueError(f"these weights cannot be split into {shards} files; ask for fewer")
    return None


def build(
    shape: str,
    out: Path | str,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shards: int = 1,
    variant: str | None = None,
) -> Path:
    """Write a folder of random weights: `shape` of `SHAPES`, `dtype` float32 unless told, U-Net in `shards` files."""
    pipe = pipeline(shape, dtype, seed)
    pipe.save_pretrained(out, variant=variant, max_shard_size=_shard_size(pipe.unet, shards))
    return Path(out)


def main() -> None:
    """Build one folder and print its size."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--shards", type=int, default=1, help="files that the U-Net is split into")
    parser.add_argument("--variant", help="variant in the file names, such as fp16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out}: already exists; choose another folder")
    dtype = getattr(torch, options.dtype)
    build(options.shape, options.out, dtype=dtype, seed=options.seed, shards=options.shards, variant=options.variant)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {options.shape} in {options.dtype}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
