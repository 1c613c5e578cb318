"""The library call: `attack_model` opens two models, compares their weights, and runs every closed-form attack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .attack import BUDGETS, RIDGE, AttackReport, attack, factor_of
from .checkpoint import Checkpoint, encoder_widths, open_checkpoint
from .errors import ConceptError, ConfigError
from .hub import resolve
from .layers import compare
from .pipeline import LoadedPipeline
from .vocabulary import load_prior, whole_words

Source = Checkpoint | LoadedPipeline


def attack_model(
    model: Any,
    edited: Any,
    concepts: str | Sequence[str],
    *,
    budgets: Sequence[float] = BUDGETS,
    ridge: float = RIDGE,
    words: int = 2000,
    top: int = 10,
    padding: int = 2,
    device: str | None = None,
    tokenizer: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> list[AttackReport]:
    """Attack the edit that took `model` to `edited`, once for each of `concepts`. Nothing is changed or drawn.

    `model`, `edited`: paths, hub ids or loaded pipelines; the edit may be anybody's, since only the weights of the
    two are compared. The prompt is the concept's name by itself with `padding` padding positions. `words`: frequent
    words of the tokenizer's vocabulary to search; `budgets`: shares of each state's norm; `tokenizer`: as in
    `edit_model`, for a single file. Raises a `RealEraError`.
    """
    names = [concepts] if isinstance(concepts, str) else list(concepts)
    if not names or not all(name.strip() for name in names):
        raise ConceptError("attack: a concept is empty; name at least one")
    if not ridge >= 0 or not all(budget > 0 for budget in budgets):
        raise ConfigError(f"attack: budgets {tuple(budgets)} and ridge {ridge:g}: expected positive numbers")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = _opened(model, revision, place, tokenizer, variant=variant, progress=progress)
    layers = compare(source, _weights_of(edited, encoder_widths(source.encoder)))
    matrix = factor_of(layers)
    encoder = source.encoder
    bank = load_prior(encoder, whole_words(encoder.pairs[0][0], words), padding, encoder.fingerprint())
    encoded = encoder.encode(names, padding)
    return [
        attack(
            layers,
            name,
            one.states[1:],
            budgets=budgets,
            ridge=ridge,
            factor=matrix,
            words=() if bank is None else bank.words,
            bank=None if bank is None else bank.last,
            end=len(one.ids) - 2,
            top=top,
        )
        for name, one in zip(names, encoded, strict=True)
    ]


def _opened(model: Any, revision: str | None, device: str, tokenizer: str | Path | None, **options: Any) -> Source:
    """`model` with its text encoder."""
    if not isinstance(model, (str, Path)):
        return LoadedPipeline(model)
    path = resolve(model, revision)
    if os.path.isfile(path):
        from .singlefile import open_single

        return open_single(path, device=device, tokenizer=tokenizer, **options)
    return open_checkpoint(path, device=device, **options)


def _weights_of(model: Any, widths: tuple[int, int | None]) -> Source:
    """`model` for its weights alone."""
    if not isinstance(model, (str, Path)):
        return LoadedPipeline(model)
    path = resolve(model, None)
    if os.path.isfile(path):
        from .singlefile import open_single

        return open_single(path, widths=widths)
    return open_checkpoint(path, widths=widths)
