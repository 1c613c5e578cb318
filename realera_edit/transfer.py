"""An edit file on another model that shares the text encoder: a fine-tune, another precision, a loaded pipeline.

Nothing is encoded and nothing is solved: the weights of the text encoder are hashed, and the edited projections are
multiplied by the stored factor, by the same code that `erase` uses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, open_checkpoint
from .compute import Edit
from .edit import EditResult, check_changed
from .editfile import EditFile
from .errors import CheckpointError
from .fingerprint import check_encoders, loaded_encoders, stored_encoders, widths
from .hub import resolve
from .pipeline import LoadedPipeline
from .projections import selected
from .singlefile import single_encoders
from .solve import Factor, Solution
from .writer import check_outside


@dataclass
class AppliedEdit(EditResult):
    """A stored edit on one model: in force already in a loaded pipeline; for a folder, `save` writes it."""

    file: EditFile = field(kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """The record that is written to `realera_edit.json`: the recipe of the edit, the hashes of this model."""
        recipe = self.file.recipe
        kept = {name: recipe[name] for name in ("concepts", "drift", "dtype") if name in recipe}
        made = {"made_from": recipe["model"]} | {
            name: recipe[name] for name in ("revision", "hub_id", "history") if name in recipe
        }
        data = super().to_dict()
        data.pop("dtype", None)  # of this model's text encoder, which did not run
        return {**data, **kept, "applied": made}

    def save_edit(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the edit file again."""
        if isinstance(self.source, Checkpoint):
            check_outside(Path(path), self.source.root)
        return self.file.save(path, force=force)


def apply_edit(
    edit: EditFile | str | Path,
    model: Any,
    *,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    force_encoder: bool = False,
    progress: bool = False,
) -> AppliedEdit:
    """Apply `edit` (an edit file or its path) to `model`, a folder, a hub id, or a loaded pipeline (edited in place).

    For a folder, `result.save(OUT)` writes the edited copy; the text encoder is hashed but never run, so this takes
    about as long as copying the folder. The weights are those that `edit_model` with the same factor gives, to the bit
    on the same device. `text_encoder`: a diffusers folder whose text encoder is compared, for a single file of the
    U-Net alone. `variant`: weights of the text encoder to compare, where the folder has several. Raises
    `CheckpointError` where the text encoder is not the edit's own (`force_encoder`: only warns), `ProjectionError`
    where its width is another.
    """
    file = edit if isinstance(edit, EditFile) else EditFile.load(edit)
    source = open_target(
        file,
        model,
        text_encoder=text_encoder,
        variant=variant,
        revision=revision,
        force_encoder=force_encoder,
        progress=progress,
    )
    result = AppliedEdit(
        source,
        _as_edit(file),
        file.config,
        tuple(file.recipe["preserve"]),
        progress=progress,
        prior=tuple(file.recipe.get("prior", ())),
        file=file,
    )
    selection = selected(source.projections, file.config.edit, file.config.pooled)
    if not selection:
        raise CheckpointError(f"{source.where}: none of its projections is one that the edit changes")
    if isinstance(source, LoadedPipeline):
        result.tensors = source.apply(result.edit, selection)
        check_changed(source.where, result.tensors)
    return result


def open_target(
    file: EditFile,
    model: Any,
    *,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    force_encoder: bool = False,
    progress: bool = False,
) -> Checkpoint | LoadedPipeline:
    """Open `model` without loading its text encoder, and check that this is the one that `file` was made for."""
    if not isinstance(model, (str, Path)):
        source = LoadedPipeline(model, progress=progress)
        check_encoders(file.encoders, loaded_encoders(source.encoder), source.where, force=force_encoder)
        return source
    root = resolve(model, revision)
    if text_encoder is not None and not os.path.isfile(root):
        raise CheckpointError(
            f"{root}: has its own text encoder; --text-encoder is for single files of the U-Net alone"
        )
    if os.path.isfile(root):
        encoders = single_encoders(root, text_encoder, variant)
    elif root.is_dir():
        encoders = stored_encoders(root, variant)
    else:
        return open_checkpoint(root)  # raises: there is no such model
    check_encoders(file.encoders, encoders, str(root), force=force_encoder)
    return open_checkpoint(root, progress=progress, widths=widths(encoders))


def _as_edit(file: EditFile) -> Edit:
    """The stored edit in the form that the solve gives; of its diagnostics, those that were stored."""
    solutions = {
        name: _solution(factor, file.recipe["spaces"].get(name, {})) for name, factor in file.factors().items()
    }
    return Edit(
        concepts=file.concepts,
        groups=(),
        neighbourhoods=tuple(() for _ in file.concepts),
        cross=solutions["cross"],
        pooled=solutions.get("pooled"),
        residual=torch.empty(0),
        missed=torch.empty(0),
        drift=(),
        fingerprint=file.recipe["text_encoder"],
        seconds={},
    )


def _solution(factor: Factor, space: Any) -> Solution:
    condition, jitter, ridge = (float(space.get(name, 0.0)) for name in ("condition", "jitter", "ridge"))
    return Solution(factor, torch.empty(0), torch.empty(0), condition, jitter, ridge)
