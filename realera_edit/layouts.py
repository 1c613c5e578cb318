"""Where a single file keeps its U-Net: the weights that read the text, by structure, and their EMA copies.

The original (LDM) layout has `model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight`, a file of
the U-Net alone often the same without its prefix, a diffusers file `down_blocks.0.attentions.0...`. Below the block,
all say the same, so the projections are found as in a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .errors import CheckpointError
from .projections import POOLED, Projection, text_projections

MAIN = "model.diffusion_model."
LDM_POOLED = "label_emb.0.0.weight"
EMA = "model_ema"  # the network of EMA copies, and with a dot what their names begin with
_EMA = f"{EMA}."
_BLOCK = r"(?:input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)\."
_IN_BLOCK = re.compile(_BLOCK)
_CROSS = re.compile(rf"(?P<prefix>(?:.*?\.)??){_BLOCK}.*\.attn2\.to_k\.weight")

Shapes = Mapping[str, Sequence[int]]


def unet_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the blocks of each network with cross-attention: the U-Net's first, then a ControlNet's, ...

    An empty prefix is a file of bare U-Net weights.
    """
    found = dict.fromkeys(match["prefix"] for name in names if (match := _CROSS.fullmatch(name)))
    return sorted(found, key=lambda prefix: prefix != MAIN)


def file_projections(
    shapes: Shapes, prefix: str, width: int, pooled_width: int | None, where: str
) -> tuple[Projection, ...]:
    """The projections of the text in the network at `prefix`, named by their keys in the file.

    `shapes`: key -> shape of the whole file; `width`, `pooled_width`: of the text states and, for SDXL, the pooled
    one. Raises `ProjectionError` where there is none, or shapes contradict one another.
    """
    keys: dict[str, str] = {}
    for key in shapes:
        name = key[len(prefix) :]
        if key.startswith(prefix) and (_IN_BLOCK.match(name) or name in (LDM_POOLED, POOLED)):
            keys[POOLED if name == LDM_POOLED else name] = key
    said = next(shapes[key][-1:] for key in shapes if key.startswith(prefix) and _CROSS.fullmatch(key))
    config: dict[str, object] = {"cross_attention_dim": said[0] if said else None}
    if pooled_width is not None:
        config["addition_embed_type"] = "text_time"
    own = {name: shapes[key] for name, key in keys.items()}
    return tuple(replace(p, name=keys[p.name]) for p in text_projections(own, config, width, pooled_width, where))


def ema_projections(shapes: Shapes, projections: Sequence[Projection], where: str) -> tuple[Projection, ...]:
    """The EMA copies of `projections` in a file that has them: `model_ema.` and the name below `model` without dots.

    Raises `CheckpointError` where the file has EMA copies, but not of each projection: they would keep the concept.
    """
    if not any(name.startswith(_EMA) and name.endswith("weight") for name in shapes):
        return ()
    copies = []
    for projection in projections:
        name = _EMA + projection.name.removeprefix("model.").replace(".", "")
        if tuple(shapes.get(name, ())) != tuple(shapes[projection.name]):
            raise CheckpointError(
                f"{where}: holds EMA copies, but {name} is {list(shapes.get(name, ())) or 'missing'}, and the concept "
                f"would stay in it. Remove the {_EMA}* tensors, which programs that draw never read"
            )
        copies.append(replace(projection, name=name))
    return tuple(copies)
