"""Where a U-Net's projections are called what: in diffusers, in the original (LDM) U-Net, in a single file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoint import Denoiser
from .errors import CheckpointError
from .layouts import unet_prefixes
from .projections import POOLED
from .tensorfile import TensorFile

_BLOCK = re.compile(r"^(down_blocks|up_blocks)\.(\d+)\.attentions\.(\d+)\.(.+)$")
_MIDDLE = "mid_block.attentions.0."
_ORIGINAL_BLOCK = re.compile(r"^(input_blocks|output_blocks)\.(\d+)\.1\.(.+)$")
_ORIGINAL_MIDDLE = "middle_block.1."
_DOWNSAMPLING = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")


def original_path(path: str, layers: int) -> str:
    """The path of a module in the original (LDM) U-Net from its path in diffusers'; `layers`: layers_per_block.

    down_blocks.i.attentions.j -> input_blocks.{(layers + 1) i + j + 1}.1, up_blocks.i.attentions.j ->
    output_blocks.{(layers + 1) i + j}.1, mid_block.attentions.0 -> middle_block.1, add_embedding.linear_1 ->
    label_emb.0.0. Raises `CheckpointError` for a module that has no place there.
    """
    if path == POOLED.removesuffix(".weight"):
        return "label_emb.0.0"
    if path.startswith(_MIDDLE):
        return "middle_block.1." + path[len(_MIDDLE) :]
    match = _BLOCK.match(path)
    if match is None:
        raise CheckpointError(f"{path}: has no place in the original U-Net; export with --format diffusers")
    place, block, number, rest = match.groups()
    at = (layers + 1) * int(block) + int(number)
    return f"input_blocks.{at + 1}.1.{rest}" if place == "down_blocks" else f"output_blocks.{at}.1.{rest}"


def diffusers_path(path: str, layers: int) -> str:
    """The inverse of `original_path`; a path that is diffusers' own already stays."""
    if path == "label_emb.0.0":
        return POOLED.removesuffix(".weight")
    if path.startswith(_ORIGINAL_MIDDLE):
        return _MIDDLE + path[len(_ORIGINAL_MIDDLE) :]
    match = _ORIGINAL_BLOCK.match(path)
    if match is None:
        return path
    place, at, rest = match.groups()
    block, number = divmod(int(at) - (place == "input_blocks"), layers + 1)
    return f"{'down' if place == 'input_blocks' else 'up'}_blocks.{block}.attentions.{number}.{rest}"


@dataclass(frozen=True)
class Layout:
    """A U-Net's configuration, and each projection's name in its file -> its path in diffusers' U-Net."""

    config: Mapping[str, Any]
    paths: Mapping[str, str]


def single_layout(file: TensorFile, unet: Denoiser) -> Layout:
    prefix = next(p for p in unet_prefixes(file.entries) if unet.projections[0].name.startswith(p))
    # the first downsampling of the original U-Net comes after the input convolution and the first block's layers
    steps = [int(m[1]) for name in file.entries if (m := _DOWNSAMPLING.fullmatch(name[len(prefix) :]))]
    layers = min(steps) - 1 if steps else 2
    names = [p.name for p in unet.projections]
    paths = {n: diffusers_path(n[len(prefix) :].removesuffix(".weight"), layers) for n in names}
    pooled = POOLED.removesuffix(".weight") in paths.values()
    return Layout({"addition_embed_type": "text_time" if pooled else None, "layers_per_block": layers}, paths)
