"""The library call: `edit_model` for a folder, a hub id or a loaded pipeline, and the result that it returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import torch
from torch import Tensor

from .apply import apply_factor
from .checkpoint import Checkpoint
from .compute import Edit, compute_edit, strength_of
from .concepts import Concept, resolve_concepts
from .config import EditConfig
from .contexts import is_text
from .errors import CheckpointError, ConceptError, ConfigError, RealEraWarning
from .folder_output import save_folder, save_pipeline
from .history import previous_records
from .layers import metric
from .modelspec import check_given
from .pipeline import LoadedPipeline
from .projections import Projection, selected
from .provenance import header_metadata, record
from .report import render
from .single_output import save_single
from .singlefile import SingleFile
from .source import Source, open_source
from .targets import AVERAGE, style_names
from .tensorfile import TensorFile, rewrite
from .writer import check_outside, edited_tensors

if TYPE_CHECKING:
    from .geometry import Geometry

# What is left, this far above what was asked, is worth a warning.
RESIDUAL_SLACK = 0.1


@dataclass
class EditResult:
    """An edit of one model. For a loaded pipeline it is in force already; for a folder, `save` writes it.

    `tensors`: component -> weight -> SHA-256 before and after, once known. `prior`: prompts that were held in place of
    frequent words.
    """

    source: Source
    edit: Edit
    config: EditConfig
    preserve: tuple[str, ...]
    tensors: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    progress: bool = False
    prior: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.source, Checkpoint):
            self.source.tell = WeakMethod(self.to_dict)

    def save(
        self,
        out: str | Path,
        *,
        force: bool = False,
        link: bool = False,
        undo: bool = True,
        card: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the edited model to the folder `out` (of a single file: the file), which appears whole or not at all.

        `force` replaces an existing output, `link` hard-links unedited weights of a folder, `undo` stores the original
        weights of the edited tensors beside the model, so that `undo_folder` or `undo_file` restores them to the bit:
        delete `realera_edit_undo.safetensors` before you publish. `card` writes what was done into the README.md of a
        folder (`model_card`). `metadata` goes into the header of a single file, beside what it says of itself
        (`modelspec`). Raises `CheckpointError`, for a loaded pipeline also where the edit was undone or is not the last
        that its weights carry, or `ConfigError` for metadata that cannot be written.
        """
        out, given = Path(out), metadata or {}
        check_given(given)
        if isinstance(self.source, SingleFile):
            save_single(self, self.source, out, force=force, link=link, undo=undo, metadata=given)
        elif given:
            raise ConfigError(f"{out}: is a folder, whose files have no metadata to give; leave metadata out")
        elif isinstance(self.source, Checkpoint):
            save_folder(self, self.source, out, force=force, link=link, undo=undo, card=card)
        else:
            save_pipeline(self, self.source, out, force=force, card=card)
        return out

    def save_edit(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the edit by itself, as a `.safetensors` of its factors (`EditFile`), for `apply_edit` on other models.

        `force` replaces an existing file. Raises `CheckpointError`.
        """
        from .editfile import EditFile

        if isinstance(self.source, Checkpoint):
            check_outside(Path(path), self.source.root)
        return EditFile.of(self).save(path, force=force)

    def undo(self) -> None:
        """Restore a loaded pipeline to the bit; a second call does nothing.

        Raises `CheckpointError` where another edit was made since (undo that first) or the weights were changed, and
        for a folder: it was never changed.
        """
        if isinstance(self.source, Checkpoint):
            raise CheckpointError(
                f"{self.source.where}: was not changed; for a saved edit call undo_folder(OUT, RESTORED), or undo_file"
            )
        self.source.restore(self.tensors)

    def report(self) -> str:
        """The edit in a screen of text."""
        return render(self.to_dict())

    def geometry(self, *, weighted: bool = False, quick: bool = False) -> Geometry:
        """What the edit did to the text space, without a picture (`Geometry`, with `report()` and `to_dict()`).

        `weighted`: norms of what the layers read, for which the model's projections are read once. `quick`: worst
        cases over the ball of `config.radius` alone, whatever the cosines. Raises `CheckpointError` for an edit that
        was loaded from a file.
        """
        from .geometry import measure

        layers = metric(self.source, self.config.edit) if weighted else None
        return measure(self.edit, self.config, layers, cap=not quick)

    def to_dict(self) -> dict[str, Any]:
        """The record that is written to `realera_edit.json`."""
        return record(self)

    @property
    def previous(self) -> tuple[dict[str, Any], ...]:
        """Records of the edits that the model went through before this one, oldest first.

        Of a loaded pipeline: those that were made here, in place, and were in force.
        """
        return self._stored if isinstance(self.source, Checkpoint) else self.source.earlier(self.tensors)

    @cached_property
    def _stored(self) -> tuple[dict[str, Any], ...]:
        """Records of the edits before this one that a folder or a single file holds."""
        if not isinstance(self.source, Checkpoint):
            return ()
        return previous_records(self.source.root, [f for d in self.source.denoisers for f in d.files])

    def rewrite(
        self,
        file: TensorFile,
        projections: Sequence[Projection],
        target: Path,
        group: str,
        metadata: Mapping[str, str | None] | None = None,
    ) -> None:
        """Write the edited `file` to `target`; `projections` are all those in it, `group` is its name in `tensors`.

        `metadata`: further changes of the header (None: the key goes).
        """
        chosen = {p.name: p.role for p in selected(projections, self.config.edit, self.config.pooled)}

        def product(names: list[str], weights: list[Tensor]) -> list[Tensor]:
            return apply_by_role(self.edit, [chosen[name] for name in names], weights)

        names = [name for name in file.entries if name in chosen]
        hashes = self.tensors.setdefault(group, {})
        told = {**(metadata or {}), **header_metadata(self)}
        rewrite(file, target, told, names, edited_tensors(file, names, product, hashes))

    def counts(self) -> dict[str, int]:
        """How many projections of each role were found and how many are edited."""
        found = self.source.projections
        chosen = selected(found, self.config.edit, self.config.pooled)
        return {
            f"{role}_{what}": sum(p.role == role for p in group)
            for role in ("k", "v", "pooled")
            for what, group in (("found", found), ("edited", chosen))
        }


def apply_by_role(edit: Edit, roles: Sequence[str], weights: Sequence[Tensor]) -> list[Tensor]:
    """New weights, keys and values through the cross factor, the pooled path through its own."""
    result: list[Tensor] = list(weights)
    for pooled in (False, True):
        places = [i for i, role in enumerate(roles) if (role == "pooled") == pooled]
        if places:
            factor = edit.factor(roles[places[0]])
            for place, new in zip(
                places, apply_factor(factor, [weights[i] for i in places], factor.width), strict=True
            ):
                result[place] = new
    return result


def check_changed(where: str, tensors: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
    """`ConceptError` where every weight is as it was before: rounding ate the edit."""
    pairs = [pair for file in tensors.values() for pair in file.values()]
    if pairs and all(pair["before"] == pair["after"] for pair in pairs):
        raise ConceptError(
            f"{where}: the edit changed no weight; raise strength, or choose a target further from the concept"
        )


def edit_model(
    model: Any,
    concepts: str | Concept | Iterable[str | Concept | Mapping[str, Any]],
    *,
    target: str | None = None,
    preserve: Sequence[str] = (),
    config: EditConfig | None = None,
    prior: Sequence[str] = (),
    device: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    progress: bool = False,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> EditResult:
    """Erase `concepts` from `model`.

    `model`: a loaded diffusers pipeline, edited in place (undo with `result.undo()`), or the path or hub id of a
    diffusers folder, or the path of a single `.safetensors` file, of which only the text encoder is loaded
    (`result.save(OUT)` writes the edited copy). For a single file, `tokenizer` is a folder with CLIP's vocab.json and
    merges.txt (default: the local hub cache), and `text_encoder` a diffusers folder, for a file of the U-Net alone.
    `concepts`: names, `Concept`s or mappings with name, target, aliases, strength, kind. `target`: for concepts
    without one of their own. `preserve`: names or prompts that must stay. `prior`: prompts in place of the
    vocabulary's frequent words. `device`: of the text encoder of a folder (default: a GPU where there is one).
    `dtype`: what a text encoder computes in (default: float32, also where a pipeline was loaded in 16 bits, so that
    its edit is that of the file). Raises a `RealEraError`; warns with `RealEraWarning` about what deserves a look.
    """
    config = config or EditConfig()
    # one name alone is a list of one, not of its letters
    preserve = [preserve] if isinstance(preserve, str) else preserve
    prior = [prior] if isinstance(prior, str) else prior
    preserve = tuple(dict.fromkeys(" ".join(name.split()) for name in preserve))
    _check_preserve(preserve)
    wanted = resolve_concepts(concepts, kind=config.kind, target=target, preserve=preserve)
    source = open_source(
        model,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        variant=variant,
        revision=revision,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    selection = selected(source.projections, config.edit, config.pooled)
    has_pooled = any(p.role == "pooled" for p in selection)
    if isinstance(source, LoadedPipeline):
        source.check_editable(selection)
    layers = metric(source, config.edit) if config.robust else None
    edit = compute_edit(source.encoder, wanted, config, preserve, prior, layers)
    source.encoder.release()
    result = EditResult(source, edit, config, preserve, progress=progress, prior=tuple(prior))
    if has_pooled and edit.pooled is None:
        raise CheckpointError(
            f"{source.where}: its U-Net reads a pooled text state that the text encoder does not give"
        )
    _warn(result)
    _warn_of_styles(result)
    if isinstance(source, LoadedPipeline):
        result.tensors = source.apply(edit, selection)
        check_changed(source.where, result.tensors)
    return result


def _check_preserve(preserve: Sequence[str]) -> None:
    """Raise `ConceptError` for a name that cannot be held, before a model is opened."""
    for name in preserve:
        if not name:
            raise ConceptError("preserve: a name is empty; remove it (the empty prompt is always kept)")
        if not is_text(name):
            raise ConceptError(f"preserve: {name!r} is not text: half of a surrogate pair; give it as UTF-8")


def _warn(result: EditResult) -> None:
    """Warn of names that stay further from their target than was wanted."""
    edit = result.edit
    weak = []
    for group, left, missed in zip(edit.groups, edit.residual.tolist(), edit.missed.tolist(), strict=True):
        wanted = 1 - strength_of(edit.concepts[group.concept], result.config)
        if group.role != "word" and missed > RESIDUAL_SLACK:
            weak.append(f"{group.name} ({left:.2f} left, {wanted:.2f} wanted)")
    if weak:
        warnings.warn(
            f"{len(weak)} of {len(edit.groups)} names keep more than was asked: {', '.join(weak[:5])}"
            f"{' ...' if len(weak) > 5 else ''}. They share states with what is kept; raise strength or lower "
            "preserve_weight",
            RealEraWarning,
            stacklevel=3,
        )


def _warn_of_styles(result: EditResult) -> None:
    """Warn of styles that become the average of things: several times as much of them is left (docs/comparison.md)."""
    concepts = result.edit.concepts
    styles = [concept.name for concept in concepts if concept.kind == "style" and concept.target == AVERAGE]
    alone = all(concept.kind == "style" for concept in concepts)
    if not styles or (alone and style_names({n.lower() for c in concepts for n in c.names}, result.preserve)):
        return
    shown = ", ".join(styles[:5]) + " ..." * (len(styles) > 5)
    warnings.warn(
        f"{shown}: a style that becomes the average of things leaves more of itself than one that becomes other "
        f"styles. {'Preserve two styles or more, or name' if alone else 'Name'} one that stays as the target",
        RealEraWarning,
        stacklevel=3,
    )
