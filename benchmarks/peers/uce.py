"""UCE, Unified Concept Editing (arXiv 2308.14761, eq. 7): one ridge regression for each projection.

    W' = (sum_i W y_i x_i^T + sum_j W r_j r_j^T + lam W) (sum_i x_i x_i^T + sum_j r_j r_j^T + lam I)^-1

over concepts x_i with their guides y_i and retained concepts r_j; own implementation from that formula.
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
from realera_edit.pipeline import LoadedPipeline


@dataclass(frozen=True, kw_only=True)
class UCE(Options):
    """UCE's published settings: eq. 7 with the scales 1, 1 and 0.5 and the state of the concept's last token.

    The scales are the defaults of its program, not of the paper; guides there are "" (objects, unsafe content) or
    "art". An empty guide has no last token, and the program counts back to the start token: `empty`.
    """

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    lamb: float = 0.5


@dataclass(frozen=True, kw_only=True)
class UCEAllTokens(UCE):
    """UCE as RECE runs it: all tokens, and lambda_1 = lambda_2 = 0.1 as RECE's model card states.

    Our reading: "all tokens" is each of the padded prompt's positions against the same position of the guide's
    padded prompt, and the two lambdas are the weights of the retained concepts and of |W' - W|^2.
    """

    tokens: str = "all"
    preserve_scale: float = 0.1
    lamb: float = 0.1


def edit(pipe: Any, concepts: Sequence[ConceptLike], retain: Sequence[str], options: UCE | None = None) -> None:
    """Erase `concepts` from a loaded pipeline in place, `retain` kept."""
    options = options or UCE()
    encoder = LoadedPipeline(pipe).encoder
    rows = erase_rows(encoder, concepts, options)
    kept, weight = kept_rows(encoder, retain, options)
    rows.weight.mul_(options.erase_scale)
    factor = ridge(rows, keep_moment(kept, weight * options.preserve_scale, options), options.lamb)
    multiply(list(text_parameters(pipe, options.roles).values()), factor)
