"""Find the projections that read the text, by structure: module role and input width, never by class name.

Works on names and shapes alone, so a checkpoint's header is enough and no denoiser is ever built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ProjectionError

# add_k/add_v: the text projections of attention blocks that also attend to themselves (UnCLIP, IF, Kandinsky).
_KEYS = ("to_k", "add_k_proj")
_VALUES = ("to_v", "add_v_proj")
_TEMPORAL = ("motion_modules", "temp_attentions", "temporal")
POOLED = "add_embedding.linear_1.weight"


@dataclass(frozen=True)
class Projection:
    """One weight that reads text: `name` in its state dict, `role` ("k", "v" or "pooled"), text input columns."""

    name: str
    role: str
    columns: int


def text_projections(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], width: int, pooled_width: int | None, where: str
) -> tuple[Projection, ...]:
    """Every cross-attention key and value projection of the text, and the pooled path where there is one.

    `shapes`: weight name -> shape. `width`: of the text states. A projection belongs to the text when it maps
    `width` inputs while its block's query maps another width; where the two widths are equal, the block's role
    decides: `attn2` reads the text (`attn1` too under `only_cross_attention`), motion modules never do.
    Raises `ProjectionError` when there is none, or when they have been fused.
    """
    found = []
    for name, shape in shapes.items():
        stem, leaf = _split(name)
        role = "k" if leaf in _KEYS else "v" if leaf in _VALUES else None
        if role is None or len(shape) != 2:
            continue
        if shape[1] == width and _reads_text(stem, leaf, shapes, config, width):
            found.append(Projection(name, role, width))
    if not found:
        raise ProjectionError(_none_found(shapes, config, width, where))
    if pooled_width is not None and config.get("addition_embed_type") == "text_time":
        pooled = shapes.get(POOLED, ())
        if len(pooled) != 2 or pooled[1] < pooled_width:
            raise ProjectionError(f"{where}: the pooled text path {POOLED} is missing or narrower than {pooled_width}")
        found.append(Projection(POOLED, "pooled", pooled_width))
    return tuple(found)


def _split(name: str) -> tuple[str, str]:
    """("path.of.attention", "to_k") of "path.of.attention.to_k.weight"; a PEFT-wrapped layer counts as its base."""
    if not name.endswith(".weight"):
        return name, ""
    path = name[: -len(".weight")].removesuffix(".base_layer")
    stem, _, leaf = path.rpartition(".")
    return stem, leaf


def _reads_text(
    stem: str, leaf: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], width: int
) -> bool:
    if leaf in ("add_k_proj", "add_v_proj"):
        return True
    query = shapes.get(f"{stem}.to_q.weight", shapes.get(f"{stem}.to_q.base_layer.weight"))
    if query is not None and query[1] != width:
        return True
    if any(part in stem for part in _TEMPORAL):
        return False
    block = stem.rpartition(".")[2]
    only_cross = config.get("only_cross_attention")
    if block == "attn1":
        return only_cross is True or (isinstance(only_cross, (list, tuple)) and all(only_cross))
    return block == "attn2"


def _none_found(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], width: int, where: str) -> str:
    if any(".to_kv." in name for name in shapes):
        return f"{where}: the attention projections are fused (to_kv); call unfuse_qkv_projections() first"
    widths = sorted({int(s[1]) for n, s in shapes.items() if _split(n)[1] in _KEYS and len(s) == 2})
    if not widths:
        return f"{where}: no attention key projection (to_k) among its {len(shapes)} tensors; is this a U-Net?"
    said = config.get("cross_attention_dim")
    return (
        f"{where}: no cross-attention projection reads {width} inputs, the width of the text encoder's states. Found "
        f"widths {', '.join(map(str, widths))}; config says cross_attention_dim = {said}. The text encoder belongs to "
        "another model, or the text passes through a projection first (not supported)"
    )


def selected(projections: Sequence[Projection], edit: str, pooled: bool) -> tuple[Projection, ...]:
    """The projections that an edit of `edit` ("kv", "k", "v") and `pooled` changes."""
    return tuple(p for p in projections if (pooled if p.role == "pooled" else p.role in edit))
