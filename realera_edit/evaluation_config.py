"""What decides an evaluation apart from the models, in one frozen object for the library and the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import ConfigError


def _option(default: Any, help: str, low: float, high: float) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class EvaluationConfig:
    """How many prompts of each kind are drawn, and when one may take part. `ConfigError` for a value out of range.

    Names are chosen on seeds of their own (`choice_seeds`), so that the unedited model's accuracy on `seeds`, which
    stands beside every figure, is not that of a lucky choice.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = _option(18, "Denoising steps; 18 suits the emoji models, 25 to 50 Stable Diffusion.", 1, 1000)
    guidance: float = _option(4.0, "Guidance scale; 2 to 4 suit the emoji models, 7.5 Stable Diffusion.", 0.0, 100.0)
    far: int = _option(24, "Far concepts that must stay.", 0, 10_000)
    neighbours: int = _option(4, "Near concepts that must stay, for each erased one.", 0, 1000)
    alias_count: int = _option(4, "Most other names of each erased concept.", 0, 1000)
    residue: int = _option(4, "Most prompts that draw it and never name it, for each erased concept.", 0, 1000)
    words: int = _option(
        128, "Vocabulary words that the unedited denoiser is asked about for each, to find what draws it.", 0, 10_000
    )
    threshold: float = _option(
        0.95, "Share of the unedited model's pictures that must be right for a concept to take part.", 0.0, 1.0
    )
    alias_threshold: float = _option(0.5, "The same for other names and for keywords.", 0.0, 1.0)
    batch_size: int = _option(16, "Pictures drawn at once.", 1, 10_000)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, meta = getattr(self, spec.name), spec.metadata
            if meta and not meta["low"] <= value <= meta["high"]:
                raise ConfigError(f"{spec.name} = {value!r}: expected {meta['low']:g} to {meta['high']:g}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds = {self.seeds}: expected at least one, none below 0, none twice")

    @property
    def choice_seeds(self) -> tuple[int, ...]:
        """As many seeds as are measured on, none of them among these."""
        first = max(self.seeds) + 100
        return tuple(range(first, first + len(self.seeds)))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return {**asdict(self), "seeds": list(self.seeds), "choice_seeds": list(self.choice_seeds)}


def parse_numbers(text: str, what: str = "seeds") -> tuple[int, ...]:
    """Whole numbers from "0-3" or "0,2,10-12". Raises `ConfigError`, naming `what` they are."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            found += range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"{what} {text!r}: write a range such as 0-3, or numbers with commas") from None
    return tuple(found)
