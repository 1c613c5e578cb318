"""The baseline: UCE's edit as its paper states it, one projection after another, one concept after another.

Written from the formula (Unified Concept Editing, arXiv 2308.14761, eq. 7), for every projection W [d_out, d]:

    W' = (sum_i W y_i x_i^T + sum_j W r_j r_j^T + lam W) (sum_i x_i x_i^T + sum_j r_j r_j^T + lam I)^-1

in float32 with a matrix inverse, and prompts encoded one by one, padded to the encoder's full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One concept (or kept prompt): rows x [k, d] that shall map to where y [k, d] maps (kept: y = x).

    `cross` and `gram` [k] weigh the rows in sum W y x^T and in sum x x^T: one and the same weight for plain rows.
    They differ, and `spread` * I joins the second sum, where a row stands for the exact moments of its neighbours.
    """

    x: Tensor
    y: Tensor
    cross: Tensor
    gram: Tensor
    spread: float = 0.0

    def to(self, dtype: torch.dtype) -> Term:
        """The term in another dtype."""
        return Term(self.x.to(dtype), self.y.to(dtype), self.cross.to(dtype), self.gram.to(dtype), self.spread)


def sums(weight: Tensor, terms: Sequence[Term], lam: float) -> tuple[Tensor, Tensor]:
    """The two sums of the formula, [d_out, d] and [d, d], in the dtype of `weight` [d_out, d]."""
    numerator = lam * weight
    denominator = lam * torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    for term in terms:
        values = weight @ term.y.T
        numerator += (values * term.cross) @ term.x
        denominator += (term.x.T * term.gram) @ term.x
        if term.spread:
            denominator.diagonal().add_(term.spread)
    return numerator, denominator


def edit_layer(weight: Tensor, terms: Sequence[Term], lam: float) -> Tensor:
    """The new weight of one projection [d_out, d]."""
    numerator, denominator = sums(weight, terms, lam)
    return numerator @ torch.inverse(denominator)


def edit_layers(weights: Sequence[Tensor], terms: Sequence[Term], lam: float) -> list[Tensor]:
    """The new weights of all projections."""
    return [edit_layer(weight, terms, lam) for weight in weights]


def exact_layer(weight: Tensor, terms: Sequence[Term], lam: float) -> Tensor:
    """The same formula in float64, solved instead of inverted: the reference for both."""
    numerator, denominator = sums(weight.double(), [term.to(torch.float64) for term in terms], lam)
    result: Tensor = torch.linalg.solve(denominator, numerator, left=False)
    return result


@torch.inference_mode()
def encode_one_by_one(pairs: Sequence[tuple[Any, Any]], prompts: Sequence[str], penultimate: bool) -> list[Tensor]:
    """States [length, d] of each prompt, padded to the full length, one forward pass of each encoder for each.

    `pairs` are (tokenizer, text model); `penultimate`: the last but one hidden state, as SDXL reads it.
    """
    states = []
    for prompt in prompts:
        parts = []
        for tokenizer, model in pairs:
            ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = model(ids.to(model.device), output_hidden_states=penultimate)
            parts.append(out.hidden_states[-2] if penultimate else out.last_hidden_state)
        states.append(torch.cat(parts, dim=-1)[0])
    return states
