"""The edits that the weights of a loaded U-Net carry: each with the hashes of what it found and of what it left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from .writer import digest

# Component -> weight -> SHA-256 before and after an edit.
Hashes = dict[str, dict[str, dict[str, str]]]


@dataclass(frozen=True, eq=False)
class Change:
    """One weight of an edit: what it was and became, in which dtype. It is held weakly, as no edit owns it."""

    weight: ref[nn.Parameter]
    dtype: torch.dtype
    before: str
    after: str


@dataclass(frozen=True, eq=False)
class Made:
    """One edit that was made in place by `owner`.

    `earlier`: records of the edits that were in force when it was made, oldest first; `record`: its own, where known.
    """

    owner: ref[Any]
    hashes: Hashes
    changes: tuple[Change, ...]
    earlier: tuple[dict[str, Any], ...]
    record: dict[str, Any] | None


# U-Net -> the edits made in place in pipelines that have it, oldest first: two pipelines may share one.
_EDITS: WeakKeyDictionary[nn.Module, list[Made]] = WeakKeyDictionary()


def note(
    unet: nn.Module,
    owner: Any,
    weights: Mapping[tuple[str, str], nn.Parameter],
    hashes: Hashes,
    tell: Callable[[], dict[str, Any]] | None,
) -> Made:
    """Put an edit that is about to be made on the list of its U-Net; `tell` gives its record."""
    known = _EDITS.setdefault(unet, [])
    before = in_force(unet)
    changes = tuple(
        Change(ref(weights[name, key]), weights[name, key].dtype, pair["before"], pair["after"])
        for name, group in hashes.items()
        for key, pair in group.items()
    )
    earlier = tuple(one.record for one in before if one.record is not None)
    made = Made(ref(owner), hashes, changes, earlier, {**tell(), "tensors": hashes} if tell else None)
    # what is neither in force nor can be undone is of no more use
    known[:] = [one for one in known if one in before or one.owner() is not None]
    if any(change.before != change.after for change in changes):
        known.append(made)
    return made


def forget(unet: nn.Module, made: Made) -> None:
    """Take an edit that was undone from the list of its U-Net."""
    _EDITS[unet].remove(made)


def in_force(unet: nn.Module, cast: bool = False) -> Sequence[Made]:
    """Those of a U-Net's edits, oldest first, that the weights still carry.

    The last one is in force where every weight is what it left; below it, what it found counts in place of the weights.
    `cast`: weights of another dtype than they were edited in, which no hash tells of, count as what the last edit left.
    """
    now: dict[int, str] = {}
    found = []
    for one in reversed(_EDITS.get(unet, [])):
        alive = [(weight, change) for change in one.changes if (weight := change.weight()) is not None]
        for weight, change in alive:
            if id(weight) not in now:
                now[id(weight)] = change.after if cast and weight.dtype != change.dtype else digest(weight.data)
        if alive and all(now[id(weight)] == change.after for weight, change in alive):
            found.append(one)
            now |= {id(weight): change.before for weight, change in alive}
    return found[::-1]
