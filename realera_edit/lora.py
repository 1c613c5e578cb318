"""An edit as a LoRA of one checkpoint: dW = W (M - I) of each projection, in the layouts that pipelines and UIs read.

`diffusers`: `unet.<path>.lora_A.weight` (down) and `lora_B.weight` (up), as `pipe.load_lora_weights` reads them; all of
one rank, with zeros where a layer has less, since older diffusers scale a layer by another one's rank over its own.
`kohya`: `lora_unet_<path>.lora_down.weight`, `.lora_up.weight`, `.alpha`, for A1111, Forge and ComfyUI; the path is
diffusers' own for Stable Diffusion 1.x and 2.x, and the original U-Net's for XL, as kohya's trainer writes them.
`full`: `lora_unet_<path>.diff`, the whole dW, for UIs that read it (A1111, ComfyUI).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .algebra import orthonormal, truncated
from .card_text import title
from .checkpoint import Checkpoint, Denoiser
from .editfile import EditFile
from .errors import CheckpointError, ConfigError, RealEraWarning
from .folder import chosen_weights, read_json
from .layouts import EMA, unet_prefixes
from .lora_layout import Layout, original_path, single_layout
from .modelspec import check_given, kind_of, of_lora, seal
from .projections import Projection, selected
from .provenance import METADATA_KEY, origin
from .singlefile import SingleFile
from .solve import Factor
from .tensorfile import DTYPES, TensorFile, all_finite, write_tensors
from .transfer import open_target
from .writer import check_outside, staged_file

FORMATS = ("diffusers", "kohya", "full")
# Energy that is kept of a dense edit where neither a rank nor an energy is asked for.
DENSE_ENERGY = 0.99
# kohya's own default.
ALPHA = 1.0
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Layer:
    """One exported layer: its name in the U-Net, the rank that was kept, and |dW - up down|_F / |dW|_F as stored."""

    name: str
    rank: int
    lost: float


@dataclass(frozen=True)
class LoraReport:
    """What an export wrote, and what it left out."""

    path: str
    format: str
    bytes: int
    layers: tuple[Layer, ...]
    left_out: tuple[str, ...]

    @property
    def worst(self) -> float:
        """The greatest relative error of any layer."""
        return max(layer.lost for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst": self.worst}

    def report(self) -> str:
        """The export as text: each layer with its rank and what was lost."""
        lines = [f"{layer.name:<72} rank {layer.rank:>4}   lost {layer.lost:.1e}" for layer in self.layers]
        lines += [f"{name:<72} left out" for name in self.left_out]
        ranks = [layer.rank for layer in self.layers]
        total = f"{len(self.layers)} layers, rank {min(ranks)} to {max(ranks)}, {self.bytes:,} bytes"
        return "\n".join([*lines, f"written    {self.path}   ({self.format}, {total}, at most {self.worst:.1e} lost)"])


def export_lora(
    edit: EditFile | str | Path,
    model: str | Path,
    out: str | Path,
    *,
    format: str = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    force_encoder: bool = False,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> LoraReport:
    """Write `edit` as a LoRA of `model` (unedited: a folder, hub id or single file), to be loaded on it at scale 1.

    Each layer is the best approximation of W (M - I) of its rank in the Frobenius norm. `rank`: the most that is kept
    of each layer; `energy`: keep the least rank that holds this share of each layer's squared norm. With neither, a
    low-rank edit is exact (up to `dtype`) and a dense one keeps 99 %, a relative error of at most 0.1. The scale at
    which the LoRA is loaded is a dial: s gives W (I + s (M - I)). `metadata` goes into the header, beside what it
    says of itself (`modelspec`). Raises `ConfigError`, `CheckpointError`, `ProjectionError`.
    """
    _check_options(format, rank, energy, dtype)
    given = dict(metadata or {})
    check_given(given)
    file = edit if isinstance(edit, EditFile) else EditFile.load(edit)
    out = Path(out)
    source = open_target(
        file,
        model,
        text_encoder=text_encoder,
        variant=variant,
        revision=revision,
        force_encoder=force_encoder,
    )
    if not isinstance(source, Checkpoint):
        raise CheckpointError(f"{source.where}: a LoRA is exported for a model on the disk; give its path")
    check_outside(out, source.root)
    if isinstance(source, SingleFile):
        unet, others = source.denoisers[0], _others(source.denoisers[1:])
        layout = single_layout(source.file, unet)
        files = dict.fromkeys(layout.paths, source.file)
        kind = _single_kind(source.file)
    else:
        unet = next(denoiser for denoiser in source.denoisers if denoiser.name == "unet")
        others = _others(denoiser for denoiser in source.denoisers if denoiser.name != "unet")
        layout = Layout(unet.config, {p.name: p.name.removesuffix(".weight") for p in unet.projections})
        files = _weights(source, unet, variant)
        kind = _folder_kind(source.root, unet, files)
    if others:
        warnings.warn(f"{source.where}: a LoRA reaches the U-Net alone, not {', '.join(others)}", RealEraWarning, 2)
    plan = _Plan(file, layout, format, rank, energy, dtype)
    wanted = [(p, files[p.name]) for p in selected(unet.projections, file.config.edit, file.config.pooled)]
    plan.level(wanted)
    most = {name: row for projection, where in wanted for name, row in plan.most(projection, where).items()}
    recipe = _recipe(file, format, source)

    def told() -> dict[str, str]:
        ranks = [layer.rank for layer in plan.layers]
        spec = of_lora(kind, format, title(recipe), ranks, ALPHA, given)
        return {"format": "pt", **spec, METADATA_KEY: json.dumps(recipe, ensure_ascii=False)}

    # a truncation may take far less than its bound, for which nobody should have to make room
    bound = sum(_size(shape) for _, shape in most.values()) * dtype.itemsize
    with staged_file(out, force=force, needed=0 if plan.truncates else bound) as temporary:
        write_tensors(temporary, (item for row in wanted for item in plan.layer(*row)), most, told, slack=64)
        seal(temporary)
    report = LoraReport(str(out), format, out.stat().st_size, tuple(plan.layers), others)
    _warn(report)
    return report


def _others(denoisers: Iterable[Denoiser]) -> tuple[str, ...]:
    """Networks that a LoRA does not reach; EMA copies are never drawn with."""
    return tuple(denoiser.name for denoiser in denoisers if denoiser.name != EMA)


class _Plan:
    """The tensors of an export, layer by layer, and what was lost of each."""

    def __init__(
        self,
        file: EditFile,
        layout: Layout,
        format: str,
        rank: int | None,
        energy: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.layout, self.format, self.rank, self.energy, self.dtype = layout, format, rank, energy, dtype
        self.factors = {name: orthonormal(factor) for name, factor in file.factors().items()}
        dense = any(factor.right is None for factor in self.factors.values())
        self.truncates = format != "full" and (dense or energy is not None)
        self.layers: list[Layer] = []
        self.common: int | None = None

    def level(self, wanted: Iterable[tuple[Projection, TensorFile]]) -> None:
        """Find the one rank of the diffusers format: the most that any layer needs."""
        if self.format == "diffusers":
            splits = (self.split(self.product(*row), self.factor(row[0].role)) for row in wanted)
            self.common = max(up.shape[1] for up, _ in splits)

    def factor(self, role: str) -> Factor:
        return self.factors["pooled" if role == "pooled" else "cross"]

    def most(self, projection: Projection, file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, the largest shape) of one layer's tensors."""
        factor, (rows, columns) = self.factor(projection.role), file.entries[projection.name].shape
        rank = self.common or min(rows, factor.width, factor.rank, self.rank or factor.rank)
        shapes = {"diff": (rows, columns), "alpha": (), "down": (rank, columns), "up": (rows, rank)}
        return {key: (_NAMES[self.dtype], shapes[part]) for part, key in self.names(projection.name).items()}

    def names(self, name: str) -> dict[str, str]:
        """Part -> key of one layer's tensors, in the order in which they are stored."""
        key = self.key(self.layout.paths[name])
        if self.format == "full":
            return {"diff": f"{key}.diff"}
        if self.format == "diffusers":
            return {"down": f"{key}.lora_A.weight", "up": f"{key}.lora_B.weight"}
        return {"alpha": f"{key}.alpha", "down": f"{key}.lora_down.weight", "up": f"{key}.lora_up.weight"}

    def product(self, projection: Projection, file: TensorFile) -> Tensor:
        """W left of a layer, float64: dW over its text columns, but for the factor's right side."""
        factor = self.factor(projection.role)
        return file.read(projection.name)[:, : factor.width].to(torch.float64) @ factor.left

    def split(self, product: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
        """(up, down) of a layer over its text columns, float64, of the rank that is kept."""
        default = DENSE_ENERGY if self.rank is None and factor.right is None else None
        up, down = truncated(product, self.rank, default if self.energy is None else self.energy)
        return up, down if factor.right is None else down @ factor.right

    def layer(self, projection: Projection, file: TensorFile) -> list[tuple[str, Tensor]]:
        """The tensors of one layer, by key."""
        name, factor = projection.name, self.factor(projection.role)
        path, product = self.layout.paths[name], self.product(projection, file)
        change = product if factor.right is None else product @ factor.right
        # of the pooled path, the other columns are size ids
        beyond = file.entries[name].shape[1] - factor.width
        if self.format == "full":
            stored = self.cast(change, path)
            parts, rank, error = {"diff": _wider(stored, beyond)}, min(factor.rank, *change.shape), stored - change
        else:
            up, down = self.split(product, factor)
            rank = up.shape[1]
            # kohya's readers multiply by alpha / rank. One alpha for all: diffusers mixes up different ones
            factor_up = 1.0 if self.format == "diffusers" else rank / ALPHA
            more = 0 if self.common is None else self.common - rank
            up, down = self.cast(_wider(up * factor_up, more), path), self.cast(_longer(down, more), path)
            parts = {"alpha": torch.tensor(ALPHA, dtype=self.dtype), "down": _wider(down, beyond), "up": up}
            error = (up.double() / factor_up) @ down.double() - change
        self.layers.append(Layer(path, rank, float(error.norm() / change.norm().clamp_min(1e-300))))
        return [(key, parts[part]) for part, key in self.names(name).items()]

    def cast(self, tensor: Tensor, path: str) -> Tensor:
        stored = tensor.to(self.dtype)
        if not all_finite(stored):
            raise ConfigError(f"{path}: the LoRA overflows {self.dtype}; use --dtype float32 or bfloat16")
        return stored

    def key(self, path: str) -> str:
        """The name of a layer in the chosen format."""
        if self.format == "diffusers":
            return f"unet.{path}"
        if self.layout.config.get("addition_embed_type") == "text_time":
            layers = self.layout.config.get("layers_per_block", 2)
            if not isinstance(layers, int):
                raise CheckpointError(
                    f"layers_per_block = {layers}: no such U-Net in the original layout; export with --format diffusers"
                )
            path = original_path(path, layers)
        return "lora_unet_" + path.replace(".", "_")


def _wider(tensor: Tensor, columns: int) -> Tensor:
    """With so many columns of zeros behind its own."""
    return torch.cat([tensor, tensor.new_zeros(len(tensor), columns)], dim=1) if columns else tensor


def _longer(tensor: Tensor, rows: int) -> Tensor:
    """With so many rows of zeros below its own."""
    return torch.cat([tensor, tensor.new_zeros(rows, tensor.shape[1])]) if rows else tensor


def _recipe(file: EditFile, format: str, source: Checkpoint) -> dict[str, Any]:
    """The recipe in the file's header. A model that has no name on the hub is not named: its name tells nothing."""
    told = origin(source)
    return {
        "version": __version__,
        "lora": format,
        **{key: value for key, value in told.items() if "revision" in told or key == "license"},
        "concepts": [{"name": c.name, "target": c.target, "aliases": list(c.aliases)} for c in file.concepts],
        "preserve": list(file.recipe["preserve"]),
        "config": file.config.to_dict(),
    }


def _single_kind(file: TensorFile) -> str | None:
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    return kind_of(shapes, unet_prefixes(shapes)[0], told=file.metadata.get("modelspec.architecture"))


def _folder_kind(root: Path, unet: Denoiser, files: Mapping[str, TensorFile]) -> str | None:
    scheduler = root / "scheduler" / "scheduler_config.json"
    shapes = {name: file.entries[name].shape for name, file in files.items()}
    return kind_of(shapes, unet=unet.config, scheduler=read_json(scheduler) if scheduler.is_file() else None)


def _check_options(format: str, rank: int | None, energy: float | None, dtype: torch.dtype) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r}: expected one of {', '.join(FORMATS)}")
    if rank is not None and energy is not None:
        raise ConfigError("rank and energy are both given: each decides how much is kept; give one of them")
    if format == "full" and (rank is not None or energy is not None):
        raise ConfigError("format full holds the whole change; rank and energy have no meaning there, leave them out")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank = {rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy = {energy}: expected more than 0, at most 1")
    if dtype not in _NAMES:
        raise ConfigError(f"dtype = {dtype}: expected float32, float16, bfloat16 or float64")


def _weights(source: Checkpoint, unet: Denoiser, variant: str | None) -> dict[str, TensorFile]:
    """Weight name -> the file that holds it, among those of the variant that a pipeline would load."""
    _, paths = chosen_weights(source.root / unet.name, variant)
    return {name: file for file in unet.files if file.path in paths for name in file.entries}


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _warn(report: LoraReport) -> None:
    worst = max(report.layers, key=lambda layer: layer.lost)
    if worst.lost > 1e-2:
        warnings.warn(
            f"the LoRA is a truncation: up to {worst.lost:.1%} of a layer's change is lost ({worst.name}); raise rank "
            "or energy, or use --format full",
            RealEraWarning,
            stacklevel=3,
        )
