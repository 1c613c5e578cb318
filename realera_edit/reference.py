"""The small text-to-image model that ships with the package; the name `emoji` stands for it."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError

NAME = "emoji"
FOLDER = Path(__file__).with_name("models") / NAME


def reference_model() -> Path:
    """The diffusers folder of the reference model. `CheckpointError` if the installation left it out."""
    if not (FOLDER / "model_index.json").is_file():
        raise CheckpointError(f"{FOLDER}: the reference model is not installed; install realera-edit with its data")
    return FOLDER
