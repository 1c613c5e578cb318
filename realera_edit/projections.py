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
    decides: `attn2` reads the text (`attn1` too where `only_cross_attention` says so), motion modules never do.
    Raises `ProjectionError` when there is none, when they have been fused, or when shapes contradict one another.
    """
    _check_blocks(shapes, where)
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
        said = config.get("projection_class_embeddings_input_dim")
        if len(pooled) != 2 or pooled[1] < pooled_width or pooled[1] != (said or pooled[1]):
            raise ProjectionError(
                f"{where}: the pooled text path {POOLED} is {list(pooled) or 'missing'}; "
                f"expected {said or 'some'} inputs, of which {pooled_width} are the text's. Take a sound copy"
            )
        found.append(Projection(POOLED, "pooled", pooled_width))
    return tuple(found)


def _split(name: str) -> tuple[str, str]:
    """("path.of.attention", "to_k") of "path.of.attention.to_k.weight"; a PEFT-wrapped layer counts as its base."""
    if not name.endswith(".weight"):
        return name, ""
    path = name[: -len(".weight")].removesuffix(".base_layer")
    stem, _, leaf = path.rpartition(".")
    return stem, leaf


def _check_blocks(shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Key and value of a block have one shape, and as many outputs as its query; a damaged header breaks this.

    A block that reads nothing but added text has neither key nor value of its own.
    """
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        stem, leaf = _split(name)
        if leaf in ("to_q", "to_k", "to_v"):
            blocks.setdefault(stem, {})[leaf] = tuple(shape)
    for stem, block in blocks.items():
        key, value = block.get("to_k"), block.get("to_v")
        if key != value or (key is not None and block.get("to_q", key)[:1] != key[:1]):
            found = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sorted(block.items()))
            raise ProjectionError(f"{where}: the weights of {stem} do not fit together ({found}); take a sound copy")


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
    return block == "attn2" or (block == "attn1" and _only_cross(stem, config.get("only_cross_attention")))


def _only_cross(stem: str, flags: Any) -> bool:
    """Whether `only_cross_attention` (one flag, or one for each down block) holds for the block that `stem` is in."""
    place, number = (stem.split(".") + [""])[:2]
    if place not in ("down_blocks", "up_blocks") or not number.isdecimal():
        return False  # the middle block always attends to itself first
    if isinstance(flags, (list, tuple)):
        ordered = flags if place == "down_blocks" else flags[::-1]
        return int(number) < len(ordered) and ordered[int(number)] is True
    return flags is True


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
