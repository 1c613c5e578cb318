"""States of many token rows from a CLIP text encoder, every distinct prefix computed once. Imports torch only.

CLIP is causal: a position's state depends on the tokens before it alone, so rows that begin alike share their first
states. Linear layers and norms run on the distinct prefixes, without padding; attention gathers them per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Rows = Sequence[tuple[int, ...]]


def batches(rows: Rows, limit: int) -> Iterator[list[int]]:
    """Places of `rows` in batches of at most `limit` distinct prefixes; rows that begin alike stand together."""
    batch: list[int] = []
    size = 0
    last: tuple[int, ...] = ()
    for place in sorted(range(len(rows)), key=lambda i: rows[i]):
        row = rows[place]
        shared = next((i for i, (a, b) in enumerate(zip(row, last, strict=False)) if a != b), min(len(row), len(last)))
        if batch and size + len(row) - shared > limit:
            yield batch
            batch, size, shared = [], 0, 0
        batch.append(place)
        size, last = size + len(row) - shared, row
    if batch:
        yield batch


def prefix_tree(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token id [N] and depth [N] of each distinct prefix, its index [rows, length], and one flat place [N] of each.

    Beyond a row's end the index names an arbitrary prefix: causal attention never looks there.
    """
    length = max(map(len, rows))
    known: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    depth: list[int] = []
    where: list[int] = []
    index = [[0] * length for _ in rows]
    for place, row in enumerate(rows):
        node = -1
        for position, token in enumerate(row):
            key = (node, token)
            if key not in known:
                known[key] = len(ids)
                ids.append(token)
                depth.append(position)
                where.append(place * length + position)
            index[place][position] = node = known[key]
    return torch.tensor(ids), torch.tensor(depth), torch.tensor(index), torch.tensor(where)


def _layer(layer: Any, h: Tensor, index: Tensor, where: Tensor) -> Tensor:
    attention = layer.self_attn
    x, flat = layer.layer_norm1(h), index.flatten()
    q, k, v = (
        projection(x).index_select(0, flat).view(*index.shape, attention.num_heads, -1).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    h = h + attention.out_proj(mixed.transpose(1, 2).reshape(index.numel(), -1).index_select(0, where))
    result: Tensor = h + layer.mlp(layer.layer_norm2(h))
    return result


def encode_rows(model: Any, rows: Rows, penultimate: bool, ends: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
    """States [len(row), d] of each row, and the projected states [rows, d_pooled] at `ends` (None if not projected).

    `model`: a transformers CLIPTextModel or CLIPTextModelWithProjection; `penultimate`: the last but one hidden state
    instead of the last, normalised one. The result is that of the model's own forward up to rounding.
    """
    text = getattr(model, "text_model", model)
    ids, depth, index, where = (t.to(model.device) for t in prefix_tree(rows))
    h = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding(depth)
    layers = list(text.encoder.layers)
    for layer in layers[:-1]:
        h = _layer(layer, h, index, where)
    projects = penultimate and hasattr(model, "text_projection")
    top = None
    if projects or not penultimate:
        last = text.final_layer_norm(_layer(layers[-1], h, index, where))
        if projects:
            top = model.text_projection(last[index[torch.arange(len(rows)), torch.tensor(list(ends))]])
        if not penultimate:
            h = last
    return [h[places[: len(row)]] for places, row in zip(index, rows, strict=True)], top
