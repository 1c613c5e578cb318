"""MACE's closed-form refinement (arXiv 2403.06135, the objective of that section) with a prior, without its LoRA part.

    minimise  sum_i |W' f_i - W g_i|^2 + lambda_1 sum_j |W' p_j - W p_j|^2

f_i: states of the words that stand beside the concept in a prompt, g_i: of the same words beside its generic stand-in,
p_j: states of prior prompts. It takes the concept out of the words around it; the concept's own words are left to a
LoRA, which is no closed form. `tokens="aligned"` erases those as well, in the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.common import (
    ConceptLike,
    Options,
    erase_rows,
    keep_moment,
    kept_rows,
    multiply,
    ridge,
    text_parameters,
)
from realera_edit.contexts import CONTEXTS
from realera_edit.pipeline import LoadedPipeline


@dataclass(frozen=True, kw_only=True)
class MACE(Options):
    """MACE's refinement with a prior and without a ridge, as it erases many concepts.

    Published (its configurations): ridge 0 with a prior over captions for 100 celebrities; ridge 1,000 without one
    for a single object; stand-ins such as "a person" or "ground", so `guide` is a generic word. Our reading: its 30
    generated prompts are our general contexts, the words beside a concept are all positions after it (before it,
    a causal encoder changes nothing), end token and all padding included, and the prior is weighed in our unit,
    as the normalisation of its cached sums is not stated: `prior_weight` is our choice. Retained names join it.
    """

    tokens: str = "after"
    guide: str = "object"
    contexts: tuple[str, ...] = CONTEXTS["general"]
    prior_weight: float = 1.0
    preserve_scale: float = 1.0
    lamb: float = 0.0


def edit(pipe: Any, concepts: Sequence[ConceptLike], retain: Sequence[str], options: MACE | None = None) -> None:
    """Refine a loaded pipeline's projections in place, `retain` and the prior kept."""
    options = options or MACE()
    encoder = LoadedPipeline(pipe).encoder
    rows = erase_rows(encoder, concepts, options)
    kept, weight = kept_rows(encoder, retain, options)
    factor = ridge(rows, keep_moment(kept, weight * options.preserve_scale, options), options.lamb)
    multiply(list(text_parameters(pipe, options.roles).values()), factor)
