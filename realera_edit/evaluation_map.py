"""The text space of an evaluation: similarities, a map of the erased names' surroundings, what moved, and attacks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attack import AttackReport
from .attack_run import attack_model
from .checkpoint import encoder_widths
from .embeddings import PromptEncoder
from .errors import RealEraError, RealEraWarning
from .evaluation_curve import config_of, solved_again
from .evaluation_plan import Similarity, same
from .geometry import SHOWN_WORDS, measure
from .layers import Layers, compare
from .pipeline import LoadedPipeline
from .report import plain
from .source import open_weights
from .vocabulary import load_prior, similarity, whole_words

WORDS, NEAREST, PADDING = 2000, 40, 2


def end_states(encoder: PromptEncoder, names: Sequence[str]) -> Tensor:
    """The states [n, d] at the end token, float32 on the CPU."""
    return torch.stack([one.states[len(one.ids) - 1].cpu() for one in encoder.encode(names)])


def similarity_of(encoder: PromptEncoder) -> Similarity:
    """Cosines between end-of-text states, less the common part of the second list (`vocabulary.similarity`)."""

    def of(names: Sequence[str], others: Sequence[str]) -> np.ndarray:
        bank = end_states(encoder, others)
        # the mean of a few names is no common part, and of one it is the name itself
        centre = bank.mean(0) if len(others) > 2 else torch.zeros(bank.shape[1])
        return similarity(end_states(encoder, names), bank, centre).numpy()

    return of


def shifts(layers: Layers, states: Tensor) -> Tensor:
    """Relative change of all key and value outputs, for each state x of [n, d], float64 [n].

    sqrt(sum_l |W'_l x - W_l x|^2 / sum_l |W_l x|^2) = sqrt(x^T (A - B - B^T + Q) x / x^T Q x), see `Layers`.
    """
    x = states.to("cpu", torch.float64)
    change = layers.edited - layers.mixed - layers.mixed.T + layers.original
    moved, whole = (((x @ form) * x).sum(1).clamp_min(0) for form in (change, layers.original))
    return (moved / whole.clamp_min(1e-300)).sqrt()


def text_space(
    source: LoadedPipeline,
    edited: Any,
    roles: Mapping[str, str],
    names: Sequence[str],
    record: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Parts "neighbourhood", "moved", "geometry", "attack" of an evaluation's record; empty where they cannot be had.

    `roles`: word -> erased, neighbour or preserved, for the map. `names`: erased concepts to attack. An edit of another
    kind (its models differ in more than weights that read the text) gets a warning in their place.
    """
    found: dict[str, Any] = {"neighbourhood": [], "moved": [], "geometry": None, "attack": None}
    try:
        after = open_weights(edited, source)
        layers = compare(source, after)
        found["neighbourhood"], found["moved"] = _map(source.encoder, layers, roles)
        found["attack"] = attack_curves(attack_model(source, after, names)) if names else None
        found["geometry"] = None if record is None else _geometry(source, record)
    except RealEraError as error:
        warnings.warn(f"the text space is left out of the evaluation: {error}", RealEraWarning, stacklevel=3)
    return found


def attack_curves(reports: Sequence[AttackReport]) -> list[dict[str, Any]]:
    """Success against budget, a curve for each concept and attack; a budget of None is no limit."""
    curves = []
    for report in reports:
        for kind in dict.fromkeys(attack.kind for attack in report.attacks):
            points = [
                {"budget": a.budget, "success": plain(a.scored.success), "reach": plain(a.reach)}
                for a in report.attacks
                if a.kind == kind
            ]
            curves.append({"name": f"{report.concept}: {kind}", "points": points})
    return curves


def _map(
    encoder: PromptEncoder, layers: Layers, roles: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Points of the map, by the two main axes (PCA) of all end states on it, and the most moved vocabulary words."""
    words = whole_words(encoder.pairs[0][0], WORDS)
    bank = load_prior(encoder, words, PADDING, encoder.fingerprint())
    ranked: list[dict[str, Any]] = []
    names, states = (
        list(roles),
        end_states(encoder, list(roles)) if roles else torch.zeros(0, encoder_widths(encoder)[0]),
    )
    kinds = list(roles.values())
    if bank is not None:
        moved = shifts(layers, bank.last)
        ranked = [{"word": words[i], "shift": float(moved[i])} for i in moved.argsort(descending=True)[:SHOWN_WORDS]]
        erased = [place for place, kind in enumerate(kinds) if kind == "erased"]
        if erased:
            near = similarity(states[erased], bank.last, bank.last.mean(0)).amax(0)
            taken = {same(name) for name in names}
            order = [i for i in near.argsort(descending=True).tolist() if same(words[i]) not in taken][:NEAREST]
            names += [words[i] for i in order]
            kinds += ["vocabulary"] * len(order)
            states = torch.cat([states, bank.last[order]])
    points = [
        {"word": name, "x": x, "y": y, "role": kind, "moved": shift}
        for name, kind, (x, y), shift in zip(
            names, kinds, _plane(states).tolist(), shifts(layers, states).tolist(), strict=True
        )
    ]
    return points, ranked


def _plane(states: Tensor) -> Tensor:
    """Coordinates [n, 2] on the two main axes; each axis points to where its largest value is positive."""
    x = states.double() - states.double().mean(0) if len(states) else states.double()
    if len(x) < 2:
        return torch.zeros(len(x), 2, dtype=torch.float64)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    found: Tensor = (u * s)[:, :2]
    peaks = found.gather(0, found.abs().argmax(0, keepdim=True))
    return found.mul(torch.where(peaks < 0, -1.0, 1.0))


def _geometry(source: LoadedPipeline, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The geometry report of the edit of a record, which is solved anew from its recipe: seconds, no picture.

    None, with a warning, where that gives another edit.
    """
    edit = solved_again(source, record)
    if edit is None:
        warnings.warn(
            "the geometry is left out: the record's recipe does not give the edit again on this model, as after an "
            "edit with --prior-file, or of another model",
            RealEraWarning,
            stacklevel=4,
        )
        return None
    return measure(edit, config_of(record)).to_dict()
