"""Tiny random diffusers folders with the structure of Stable Diffusion 1.x, 2.x and XL.

In `sd1` and `sd2` the text width equals a channel count of the U-Net on purpose: there, the width alone does not tell
which attention reads the text. Each width exceeds the number of positions, as in every real model: the states of the
empty prompt are kept exactly, and must leave room for an edit.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

logging.disable_progress_bar()
FAMILIES = ("sd1", "sd2", "sdxl")
START, END = "<|startoftext|>", "<|endoftext|>"
# What every test may count on to be one token of its own.
_CORE = (
    "the of and in photo picture drawing icon simple style object thing person art painting table house portrait "
    "cat dog horse bird fish lion tiger wolf bear mouse car bike train boat plane truck apple pear lemon grape bread "
    "tree flower river mountain ocean island desert castle tower bridge king queen knight monk monet picasso van gogh "
    "red green blue black white small large round happy smiling background event face chair lamp clock guitar piano"
)
_HEADS = "b c d f g h l m n p r s t v br cl dr gr pl st tr"
_TAILS = "ade ail ane ark ask aver eam eck ell ender ift ill imp inder ock ollow ond ore ound uff umble unt ust"


def words() -> list[str]:
    """A few hundred words, most frequent first."""
    return list(dict.fromkeys([*_CORE.split(), *(head + tail for tail in _TAILS.split() for head in _HEADS.split())]))


def _alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes, as GPT-2 and CLIP write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges learnt until each word is one token; earlier words count more."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in vocabulary}
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for place, parts in enumerate(split.values()):
            for pair in pairwise(parts):
                pairs[pair] += 2 * len(vocabulary) - place
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            split[word] = _merged(parts, best)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result, i = [], 0
    while i < len(parts):
        whole = tuple(parts[i : i + 2]) == pair
        result.append("".join(pair) if whole else parts[i])
        i += 2 if whole else 1
    return result


def write_vocabulary(folder: Path) -> int:
    """`vocab.json` and `merges.txt` as CLIP's; the size of the vocabulary."""
    folder.mkdir(parents=True)
    merges = _merges(words())
    letters = _alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    tokens = list(dict.fromkeys(tokens))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def _tokenizer(folder: Path, length: int, pad: str = END) -> Any:
    """A CLIP tokenizer in the old layout of two text files, as the published checkpoints have it."""
    from transformers import CLIPTokenizer

    write_vocabulary(folder)
    config = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad, "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(str(folder))


def _text_model(tokenizer: Any, width: int, length: int, act: str, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()
    # at the usual 0.02, three layers hardly mix their tokens, and all words stay alike
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.0 if "token_embedding" in name else 0.3 if "position" in name else 0.15)
    return model


def _unet(width: int, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 96),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": width,
    }
    return UNet2DConditionModel(**{**options, **changes})


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, steps_offset=1)


def _sd(scratch: Path, pad: str, length: int, act: str, **unet: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    tokenizer = _tokenizer(scratch / "tokenizer", length, pad)
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_model(tokenizer, 96, length, act),
        tokenizer=tokenizer,
        unet=_unet(96, **unet),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(scratch: Path, length: int) -> Any:
    from diffusers import StableDiffusionXLPipeline

    one, two = _tokenizer(scratch / "tokenizer", length), _tokenizer(scratch / "tokenizer_2", length, "!")
    unet = _unet(
        144,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=72 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        block_out_channels=(16, 32),
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_model(one, 64, length, "quick_gelu"),
        text_encoder_2=_text_model(two, 80, length, "gelu", projection=72),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet,
        scheduler=_scheduler(),
    )


def build_pipeline(family: str, scratch: Path) -> Any:
    """A random pipeline of the family in float32; the same one each time. `scratch` receives the tokenizers."""
    torch.manual_seed(FAMILIES.index(family))
    if family == "sd1":
        return _sd(scratch, END, 32, "quick_gelu")
    if family == "sd2":
        return _sd(scratch, "!", 32, "gelu", use_linear_projection=True)
    return _sdxl(scratch, 77)


def build_folder(
    family: str,
    folder: Path,
    scratch: Path,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    max_shard_size: str | None = None,
) -> Path:
    """The pipeline saved as a diffusers folder. The tokenizer keeps its old layout in all families but `sd2`."""
    pipe = build_pipeline(family, scratch)
    if dtype != torch.float32:
        pipe = pipe.to(dtype)
    pipe.save_pretrained(folder, variant=variant, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    if family != "sd2":
        for source in sorted(scratch.iterdir()):
            shutil.rmtree(folder / source.name)
            shutil.copytree(source, folder / source.name)
    return folder
