"""One frozen configuration drives the library and the command line; each default and help text is written once."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import ConfigError

KINDS = ("general", "object", "person", "style")
PERTURBATIONS = ("none", "isotropic", "covariance")

# Default strength by the number of names, with an overshoot and without one; the first measured at 1, 10, 50 and 100.
STRENGTHS = ((1, 0.8), (10, 0.8), (50, 0.7), (100, 0.65))
PLAIN_STRENGTHS = ((1, 0.8), (10, 0.7), (50, 0.65), (100, 0.6))
# A robust solve moves the rest further at the same strength (docs/evaluation.md); so much less costs about the same.
ROBUST_LESS = 0.1

_KINDS = {
    type(None): "a number or None",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
}


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the type of an option with this default."""
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)
    if value is None or isinstance(value, bool):
        return value is default
    return isinstance(value, numbers.Integral if isinstance(default, int) else numbers.Real)


def _option(default: Any, help: str, low: float | None = None, high: float | None = None, choices: Any = None) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class EditConfig:
    """Everything that decides the result of an edit, apart from the model and the concepts.

    All defaults are ours, measured on development concepts of the emoji model (docs/defaults.md); none is a
    published value of RealEra. Raises `ConfigError` for a value outside its range.
    """

    strength: float | None = _option(
        None,
        "Share of each concept to remove, 0 to 1; without overshoot 1 - strength is left.  [default: 0.8 up to ten "
        "names, 0.7 for fifty, 0.65 from a hundred on; without overshoot 0.8 for one name, 0.7 for ten, 0.65 and 0.6; "
        "with robust 0.1 less than those]",
        0.0,
        0.9999,
    )
    overshoot: float = _option(
        0.5,
        "How far beyond its target a concept is sent, as a share of the way, with a smaller weight: the same is gone, "
        "and the rest moves less (not with robust).",
        0.0,
        10.0,
    )
    kind: str = _option("general", "Contexts and default target to use.", choices=KINDS)
    contexts: tuple[str, ...] = _option((), "Own prompt templates, each with one {} for the concept.")
    padding: int = _option(2, "Padding positions after the end token that are erased too.", 0, 76)
    words: int = _option(0, "Most vocabulary words erased with each name (0: none).", 0, 1000)
    word_similarity: float = _option(
        0.6, "Least centred cosine between a concept and a vocabulary word erased with it.", -1.0, 1.0
    )
    perturbation: str = _option(
        "none", "Shape of the random neighbours drawn around each concept state.", choices=PERTURBATIONS
    )
    samples: int = _option(0, "Random neighbours per concept; 0 uses their exact moments.", 0, 1_000_000)
    radius: float = _option(
        0.5, "D1 as a share of the state's norm (isotropic), or the scale of the covariance.", 0.0, 10.0
    )
    cos_min: float = _option(0.8, "S1: least cosine between a state and its isotropic neighbour.", -1.0, 1.0)
    cos_max: float = _option(1.0, "S2: greatest cosine between a state and its isotropic neighbour.", -1.0, 1.0)
    perturbation_weight: float = _option(
        0.25, "Weight of a concept's random neighbours beside its own states.", 0.0, 1e6
    )
    beyond: int = _option(8, "Vocabulary words just outside each neighbourhood held with extra weight.", 0, 1000)
    prior_words: int = _option(2000, "Frequent vocabulary words whose mapping is kept (0: none).", 0, 100_000)
    preserve_weight: float = _option(100.0, "Weight of a preserved concept, in vocabulary words.", 0.0, 1e9)
    hold_class: bool = _option(
        True, 'Also preserve the last word of a lower-case name, if it is a frequent word: "face" of "cat face".'
    )
    ridge: float = _option(0.03, "Weight of |W'-W|^2, in mean eigenvalues of the kept statistics.", 1e-12, 1e6)
    robust: int = _option(0, "Rounds of attack and solve in closed form, with a ridge of 3 or more (0: none).", 0, 20)
    edit: str = _option("kv", "Which projections to edit: keys, values or both.", choices=("kv", "k", "v"))
    pooled: bool = _option(True, "Also edit the pooled text path (SDXL's add_embedding).")
    seed: int = _option(0, "Seed of the random neighbours.", 0, 2**63 - 1)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, meta = getattr(self, spec.name), spec.metadata
            if not _fits(value, spec.default):
                raise ConfigError(f"{spec.name} = {value!r}: expected {_KINDS[type(spec.default)]}")
            if meta["choices"] is not None and value not in meta["choices"]:
                raise ConfigError(f"{spec.name} = {value!r}: expected one of {', '.join(meta['choices'])}")
            if meta["low"] is not None and value is not None and not meta["low"] <= value <= meta["high"]:
                raise ConfigError(f"{spec.name} = {value!r}: expected {meta['low']:g} to {meta['high']:g}")
        if self.cos_min > self.cos_max:
            raise ConfigError(f"cos_min = {self.cos_min} is above cos_max = {self.cos_max}: swap them")
        for template in self.contexts:
            if template.count("{}") != 1:
                raise ConfigError(f"context {template!r}: write {{}} once, where the concept goes")

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> EditConfig:
        """The configuration that `to_dict` gave; what it does not name is at its default. Raises `ConfigError`."""
        unknown = [name for name in stored if name not in known_options()]
        if unknown:
            raise ConfigError(f"has the unknown option {unknown[0]!r}; update realera-edit")
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        return cls(**options)

    def strength_for(self, names: int) -> float:
        """`strength`, or its default for so many names in one edit, log-linear between those of `STRENGTHS`.

        The more is erased at once, the more each erased direction costs the rest, and the less of each is enough
        (docs/defaults.md).
        """
        if self.strength is not None:
            return self.strength
        known = STRENGTHS if self.overshoot and not self.robust else PLAIN_STRENGTHS
        less, at = ROBUST_LESS if self.robust else 0.0, math.log(max(names, 1))
        for (low, first), (high, last) in itertools.pairwise(known):
            if names <= high:
                return first + (last - first) * (at - math.log(low)) / math.log(high / low) - less
        return known[-1][1] - less

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def known_options() -> frozenset[str]:
    """The names of all fields of the configuration."""
    return frozenset(spec.name for spec in fields(EditConfig))
