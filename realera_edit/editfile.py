"""The edit as a file of its own: the factors, the recipe, and the text encoder that they belong to.

A `.safetensors` of float32 tensors: `cross.left` [d, r] and `cross.right` [r, d] where M = I + left @ right, or
`cross.delta` [d, d] = M - I; `pooled.*` likewise for SDXL's pooled path. The header's `realera_edit_file` is the recipe
as JSON. The factor is rounded to float32 before an edit is measured or applied, so the file holds the very numbers that
`erase` used: to apply it is the same edit, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__, algebra, forms
from .concepts import COLUMNS, Concept
from .config import EditConfig
from .errors import CheckpointError, ConfigError, ProjectionError
from .fingerprint import EncoderPrint, loaded_encoders, same_encoders, widths
from .provenance import EDIT_FILE_KEY
from .report import render_edit
from .solve import Factor
from .tensorfile import TensorFile, open_tensors, write_tensors
from .writer import staged_file

if TYPE_CHECKING:
    from .edit import EditResult

FORMAT = 1
_SIDES = ("left", "right", "delta")
_PRINT = tuple(spec.name for spec in fields(EncoderPrint))


@dataclass(frozen=True)
class EditFile:
    """An edit apart from any denoiser. `recipe` holds config, concepts, preserve, the solve's diagnostics, history."""

    cross: Factor
    pooled: Factor | None
    encoders: tuple[EncoderPrint, ...]
    recipe: Mapping[str, Any]

    @classmethod
    def of(cls, result: EditResult) -> EditFile:
        """The edit of a result of `edit_model`."""
        data = result.to_dict()
        other = ("projections", "tensors", "previous")  # of one model, not of the edit
        recipe = {name: value for name, value in data.items() if name not in other} | {"history": []}
        edit = result.edit
        encoders = tuple(source.print() for source in loaded_encoders(result.source.encoder))
        cross, pooled = edit.cross.factor.cpu(), None if edit.pooled is None else edit.pooled.factor.cpu()
        return cls(cross, pooled, encoders, recipe)

    @classmethod
    def load(cls, path: str | Path) -> EditFile:
        """Read and check an edit file. Raises `CheckpointError`."""
        file = open_tensors(Path(path))
        text = file.metadata.get(EDIT_FILE_KEY)
        if text is None:
            raise CheckpointError(f"{path}: not an edit file; write one with `erase MODEL CONCEPT --save-edit {path}`")
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError("its recipe is not a mapping")
            version = data.pop("format", None)
            if version != FORMAT:
                raise CheckpointError(
                    f"{path}: has format {version!r}, this version reads {FORMAT}; update realera-edit"
                )
            forms.check(data, forms.edit)
            encoders = tuple(EncoderPrint(**{name: entry[name] for name in _PRINT}) for entry in data.pop("encoders"))
            edit = cls(_required(file), _factor(file, "pooled"), encoders, data)
            _check(edit, path)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); take a sound copy") from error
        return edit

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the file, whole or not at all; `force` replaces an existing one. Raises `CheckpointError`."""
        path = Path(path)
        recipe = {**self.recipe, "format": FORMAT, "encoders": [encoder.to_dict() for encoder in self.encoders]}
        told = {EDIT_FILE_KEY: json.dumps(recipe, ensure_ascii=False)}
        tensors = self.tensors()
        shapes = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        with staged_file(path, force=force, needed=self.bytes()) as temporary:
            write_tensors(temporary, tensors.items(), shapes, lambda: told)
        return path

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, float32, as stored."""
        found: dict[str, Tensor] = {}
        for space, factor in self.factors().items():
            sides = {"delta": factor.left} if factor.right is None else {"left": factor.left, "right": factor.right}
            found |= {f"{space}.{side}": tensor.to(torch.float32) for side, tensor in sides.items()}
        return found

    def factors(self) -> dict[str, Factor]:
        """The factor of each text space: "cross", and "pooled" where the edit has it."""
        return {"cross": self.cross} | ({} if self.pooled is None else {"pooled": self.pooled})

    def factor(self, role: str) -> Factor:
        """The factor that a projection of `role` ("k", "v" or "pooled") is multiplied with."""
        if role != "pooled":
            return self.cross
        if self.pooled is None:
            raise ProjectionError("this edit has no pooled text space: it was made with pooled = false")
        return self.pooled

    def bytes(self) -> int:
        """Size of the stored tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def to_dict(self) -> dict[str, Any]:
        """The recipe with width, rank and form of each text space, the size, and the text encoders."""
        spaces = {
            name: {**self.recipe["spaces"].get(name, {}), "width": f.width, "rank": f.rank, "form": form(f)}
            for name, f in self.factors().items()
        }
        encoders = [encoder.to_dict() for encoder in self.encoders]
        return {**self.recipe, "spaces": spaces, "bytes": self.bytes(), "encoders": encoders}

    def report(self) -> str:
        """The edit in a screen of text."""
        return render_edit(self.to_dict())

    @property
    def config(self) -> EditConfig:
        """The configuration (of a composed edit: that of the first part; the others' are in its history)."""
        config = EditConfig.of(self.recipe["config"])
        return config if self.encoders[-1].pooled is None else replace(config, pooled=self.pooled is not None)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The erased concepts, targets filled in."""
        rows = [{name: row.get(name) for name in COLUMNS} for row in self.recipe["concepts"]]
        return tuple(Concept(**{**row, "aliases": tuple(row["aliases"] or ())}) for row in rows)

    def scale(self, by: float) -> EditFile:
        """M_s = I + `by` (M - I): 0 is no edit, 1 this edit, 0.5 half of the way."""
        return self._changed(lambda factor: algebra.scale(factor, by), {"scale": by})

    def invert(self, max_condition: float = algebra.MAX_INVERTED) -> EditFile:
        """The edit that undoes this one: W M M^-1 = W. Raises `SolveError` where it is too ill-conditioned."""
        return self._changed(lambda factor: algebra.invert(factor, max_condition), {"invert": True})

    def compose(self, *others: EditFile) -> EditFile:
        """This edit, then each of `others` in order, as one edit: W' = W M_1 M_2 ... See `algebra.compose`.

        Raises `ProjectionError` for other text encoders, `ConfigError` where one edits keys alone and another does not.
        """
        return compose([self, *others])

    def _changed(self, change: Callable[[Factor], Factor], note: Mapping[str, Any]) -> EditFile:
        pooled = None if self.pooled is None else algebra.rounded(change(self.pooled))
        history = [*self.recipe.get("history", ()), dict(note)]
        return replace(
            self,
            cross=algebra.rounded(change(self.cross)),
            pooled=pooled,
            recipe={**self.recipe, **_unmeasured([self]), "history": history},
        )


def compose(edits: Sequence[EditFile]) -> EditFile:
    """Several edits as one, in the order in which they would be applied (`EditFile.compose`)."""
    if not edits:
        raise ConfigError("compose: no edit given; name at least one")
    first = edits[0]
    for other in edits[1:]:
        _check_alike(first, other)
    factors: dict[str, Factor] = {}
    for edit in edits:
        for space, factor in edit.factors().items():
            known = factors.get(space)
            factors[space] = factor if known is None else algebra.rounded(algebra.compose(known, factor))
    if len(edits) == 1:
        return first
    parts = [
        {**{name: edit.recipe[name] for name in ("config", "history")}, "concepts": [c.name for c in edit.concepts]}
        for edit in edits
    ]
    recipe = {**first.recipe, **_unmeasured(edits), "history": [{"compose": parts}]}
    recipe["preserve"] = list(dict.fromkeys(name for edit in edits for name in edit.recipe["preserve"]))
    return EditFile(factors["cross"], factors.get("pooled"), first.encoders, recipe)


def _check_alike(first: EditFile, other: EditFile) -> None:
    if first.cross.width != other.cross.width or not same_encoders(first.encoders, other.encoders):
        raise ProjectionError(
            f"the edits were made for different text encoders ({_names(first)}: width {first.cross.width}, "
            f"{first.encoders[0].float16[:12]}; {_names(other)}: width {other.cross.width}, "
            f"{other.encoders[0].float16[:12]}); only edits of one text encoder can be composed"
        )
    if first.config.edit != other.config.edit:
        raise ConfigError(
            f"one edit changes {first.config.edit!r} and another {other.config.edit!r} of keys and values: their "
            "product is not one matrix for both. Apply them one after the other"
        )


def _names(edit: EditFile) -> str:
    return ", ".join(c.name for c in edit.concepts[:3]) + (" ..." if len(edit.concepts) > 3 else "")


def _unmeasured(edits: Sequence[EditFile]) -> dict[str, Any]:
    """The recipe of an edit that was computed from `edits`: residuals and drifts are no longer known, so not told."""
    spaces: dict[str, dict[str, Any]] = {}
    for edit in edits:
        for name, space in edit.recipe["spaces"].items():
            known = spaces.setdefault(name, dict(space))
            known |= {key: max(known[key], space[key]) for key in ("condition", "jitter", "ridge")}
    rows = [{**row, "residual": {}} for edit in edits for row in edit.recipe["concepts"]]
    return {"realera_edit": __version__, "concepts": rows, "drift": {}, "spaces": spaces}


def form(factor: Factor) -> str:
    """How a factor is stored."""
    return "dense" if factor.right is None else "low-rank"


def _required(file: TensorFile) -> Factor:
    factor = _factor(file, "cross")
    if factor is None:
        raise LookupError("it has no factor of the cross-attention")
    return factor


def _factor(file: TensorFile, space: str) -> Factor | None:
    names = [f"{space}.{side}" for side in _SIDES if f"{space}.{side}" in file.entries]
    if not names:
        return None
    sides = {name.partition(".")[2]: file.read(name).to(torch.float64) for name in names}
    shapes = {name: tuple(tensor.shape) for name, tensor in sides.items()}
    if set(sides) == {"delta"} and shapes["delta"] == shapes["delta"][::-1] and len(shapes["delta"]) == 2:
        return Factor(sides["delta"], None)
    if set(sides) == {"left", "right"} and len(shapes["left"]) == 2 and shapes["left"] == shapes["right"][::-1]:
        return Factor(sides["left"], sides["right"])
    raise ValueError(f"the tensors of {space} do not fit together: {shapes}")


def _check(edit: EditFile, path: str | Path) -> None:
    """What the forms of the parts do not tell: that they belong together, and that this version knows them all."""
    width, pooled = widths(edit.encoders)
    if edit.cross.width != width or (edit.pooled is not None and edit.pooled.width != pooled):
        raise ValueError(f"its factors do not fit text spaces of width {width} and {pooled}")
    try:
        _ = edit.config
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
