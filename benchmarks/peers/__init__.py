"""Closed-form concept erasers from their papers' formulas, own implementations, behind one call.

`PEERS[name]` holds `edit(pipe, concepts, retain, options)`, which changes a loaded pipeline in place, and
`published(count)`, the options that its authors take for so many concepts. `given` adds our contexts, alignment
and prior to those, so that a comparison is not one with a weak setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.peers import mace, realera, rece, speed, uce
from benchmarks.peers.common import ConceptLike, Options, vocabulary_prior
from realera_edit.contexts import CONTEXTS

# A word of the prior beside a retained name of weight one, as in ours. At 1 in place of it no peer erases anything.
WORD_WEIGHT = 0.01
# A text as the target; ours takes the average word, which the peers' programs cannot be told.
GUIDE = "object"
# SPEED's scripts change their settings for ten concepts and more.
MANY = 10


@dataclass(frozen=True)
class Peer:
    """One method: its edit, its options by the number of concepts, and whether it needs a prior to be itself."""

    edit: Callable[..., None]
    published: Callable[[int], Options]
    needs_prior: bool = False


PEERS: dict[str, Peer] = {
    "uce": Peer(uce.edit, lambda count: uce.UCE()),
    "uce-all": Peer(uce.edit, lambda count: uce.UCEAllTokens()),
    "rece": Peer(rece.edit, lambda count: rece.RECE()),
    "mace": Peer(mace.edit, lambda count: mace.MACE(), needs_prior=True),
    "speed": Peer(speed.edit, lambda count: speed.SPEED.many() if count >= MANY else speed.SPEED()),
    "realera": Peer(realera.edit, lambda count: realera.RealEra()),
}


def given(options: Options, prior: Tensor | None = None, kind: str = "general", padding: int = 2) -> Options:
    """A peer's options with our contexts, aligned positions, row weights, target and a prior in place of its own.

    The prior's weight is ours relative to a retained name; but ours also fits the erase weights to a wanted residual,
    so choose `prior_weight` for each peer on development concepts before anything is claimed.
    """
    ours: dict[str, Any] = {"contexts": CONTEXTS[kind], "tokens": "aligned", "padding": padding, "share": True}
    return replace(options, **ours, guide=GUIDE, prior=prior, prior_weight=WORD_WEIGHT)


__all__ = ["PEERS", "ConceptLike", "Options", "Peer", "given", "vocabulary_prior"]
