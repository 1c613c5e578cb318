"""The library call: `attack_model` opens two models, compares their weights, and runs every closed-form attack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .attack import BUDGETS, RIDGE, AttackReport, attack, factor_of
from .errors import ConceptError, ConfigError
from .layers import compare
from .source import open_source, open_weights
from .vocabulary import load_prior, whole_words


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
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> list[AttackReport]:
    """Attack the edit that took `model` to `edited`, once for each of `concepts`. Nothing is changed or drawn.

    `model`, `edited`: as in `edit_model`, each of any kind, such as a folder and a single file; the edit may be
    anybody's, since only the weights of the two are compared. The prompt is the concept's name by itself with `padding`
    padding positions. `words`: frequent words of the tokenizer's vocabulary to search; `budgets`: shares of each
    state's norm; `tokenizer`, `text_encoder`: as in `edit_model`, where `model` is a single file. Raises a
    `RealEraError`.
    """
    names = [concepts] if isinstance(concepts, str) else list(concepts)
    if not names or not all(name.strip() for name in names):
        raise ConceptError("attack: a concept is empty; name at least one")
    if not ridge >= 0 or not all(budget > 0 for budget in budgets):
        raise ConfigError(f"attack: budgets {tuple(budgets)} and ridge {ridge:g}: expected positive numbers")
    source = open_source(
        model,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        variant=variant,
        revision=revision,
        device=device,
        progress=progress,
    )
    layers = compare(source, open_weights(edited, source))
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
