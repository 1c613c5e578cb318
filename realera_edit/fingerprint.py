"""Which text encoders a model has, told by their weights, without loading a model: is an edit at home there?

The states that an edit maps depend on the encoder's weights, its activation and its number of heads; one encoder is
stored as float32, float16 or bfloat16 and under two spellings of its names. So each weight is hashed as rounded to
float16, and again as rounded to bfloat16: a float32 original and its float16 or bfloat16 copy agree in one of the two
at least (float16 and bfloat16 copies of one float32 original agree in none: neither can be told from the other).
The tokenizer is not part of it: an edit acts on states, whatever the prompt.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import ENCODER_CLASSES, encoder_parts
from .embeddings import PromptEncoder
from .errors import CheckpointError, ProjectionError, RealEraWarning
from .file_encoders import config_fields, find_encoders, weight_reader, weight_shapes
from .files import ahead
from .folder import chosen_weights, read_json
from .tensorfile import TensorFile, open_tensors, to_bytes

ROUNDINGS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_PREFIX = "text_model."
# What the weights alone do not tell, and yet decides the states; with the values that `CLIPTextConfig` starts from.
_FIELDS = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "quick_gelu"}


@dataclass(frozen=True)
class EncoderPrint:
    """One text encoder: the width of its states and of its pooled state (None: not used), and hashes by rounding."""

    width: int
    pooled: int | None
    structure: str
    float16: str
    bfloat16: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EncoderSource:
    """An encoder to be hashed: where it is, its widths and structure, and a call that yields (name, weight)."""

    where: str
    width: int
    pooled: int | None
    structure: str
    weights: Callable[[], Iterator[tuple[str, Tensor]]]

    def hash(self, rounding: str) -> str:
        """SHA-256 over structure, names, shapes and the weights as rounded to `rounding`, in the order of the names."""
        dtype = ROUNDINGS[rounding]
        digest = hashlib.sha256(self.structure.encode())
        for name, weight in ahead(self.weights()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(to_bytes(weight.to(dtype)))
        return digest.hexdigest()

    def print(self) -> EncoderPrint:
        """All of it."""
        return EncoderPrint(self.width, self.pooled, self.structure, *(self.hash(name) for name in ROUNDINGS))


def stored_encoders(root: Path, variant: str | None = None) -> tuple[EncoderSource, ...]:
    """The text encoders of a diffusers folder; of their weights nothing is read before they are hashed."""
    found = []
    index = read_json(root / "model_index.json")
    for name, kind in encoder_parts(root, index):
        config = read_json(root / name / "config.json")
        _, paths = chosen_weights(root / name, variant)

        def weights(paths: Sequence[Path] = paths, projects: bool = _projects(kind)) -> Iterator[tuple[str, Tensor]]:
            files = [open_tensors(path) for path in paths]
            places = {_plain(key): (file, key) for file in files for key in file.entries}
            for key in sorted(key for key in places if _matters(key, projects)):
                file, stored = places[key]
                yield key, file.read(stored)

        try:
            found.append(_source(str(root / name), config, kind, weights))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{root / name}/config.json: not of a CLIP text encoder: {error}") from error
    return tuple(found)


def file_encoders(file: TensorFile) -> tuple[EncoderSource, ...]:
    """The text encoders of a single file, or none; of their weights nothing is read before they are hashed."""
    found = []
    for place, stored in enumerate(find_encoders(file.entries, str(file.path))):
        config = config_fields(file, stored)
        shapes = weight_shapes(stored, config)
        read = weight_reader(file, stored, config["hidden_size"])

        def weights(
            shapes: Mapping[str, Sequence[int]] = shapes, read: Callable[[str, Sequence[int]], Tensor] = read
        ) -> Iterator[tuple[str, Tensor]]:
            for key in sorted(shapes):
                yield key, read(key, shapes[key])

        kind = ENCODER_CLASSES[stored.projects]
        found.append(_source(_name(place), config, kind, weights))
    return tuple(found)


def loaded_encoders(encoder: PromptEncoder) -> tuple[EncoderSource, ...]:
    """The text encoders of a loaded pipeline or checkpoint."""
    found = []
    for place, (_, model) in enumerate(encoder.pairs):
        kind = type(model).__name__

        def weights(model: Any = model, projects: bool = _projects(kind)) -> Iterator[tuple[str, Tensor]]:
            places = {_plain(key): tensor for key, tensor in model.state_dict().items()}
            for key in sorted(key for key in places if _matters(key, projects)):
                yield key, places[key]

        found.append(_source(_name(place), model.config.to_dict(), kind, weights))
    return tuple(found)


def _name(place: int) -> str:
    return "text_encoder" + (f"_{place + 1}" if place else "")


def _source(
    where: str, config: Mapping[str, Any], kind: str, weights: Callable[[], Iterator[tuple[str, Tensor]]]
) -> EncoderSource:
    pooled = int(config.get("projection_dim", 512)) if _projects(kind) else None
    fields = {name: config.get(name, default) for name, default in _FIELDS.items()}
    structure = ", ".join(f"{name} {value}" for name, value in fields.items()) + f", projection {pooled}"
    return EncoderSource(where, int(fields["hidden_size"]), pooled, structure, weights)


def _projects(kind: str) -> bool:
    return kind.endswith("WithProjection")


def _plain(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _matters(name: str, projects: bool) -> bool:
    """Whether a weight decides a state: buffers of positions, temperatures and unused projections do not."""
    if name == "text_projection.weight":
        return projects
    return name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) and not name.endswith("position_ids")


def widths(encoders: Sequence[EncoderSource | EncoderPrint]) -> tuple[int, int | None]:
    """(width of the states that the denoiser reads, width of the pooled state or None)."""
    return sum(encoder.width for encoder in encoders), encoders[-1].pooled


def same_encoders(first: Sequence[EncoderPrint], second: Sequence[EncoderPrint]) -> bool:
    """Whether two edits were made for the same text encoders, in whatever precision these were stored."""
    return len(first) == len(second) and all(
        a.structure == b.structure and (a.float16 == b.float16 or a.bfloat16 == b.bfloat16)
        for a, b in zip(first, second, strict=True)
    )


def check_encoders(
    wanted: Sequence[EncoderPrint], found: Sequence[EncoderSource], where: str, *, force: bool = False
) -> None:
    """Raise where the encoders of a model are not those that an edit was made for; with `force`, only warn.

    `ProjectionError` where the widths differ (`force` or not: no product could be formed), `CheckpointError` where
    the structure or the weights do.
    """
    if not found:
        raise CheckpointError(f"{where}: has no text encoder to compare with the one that the edit was made for")
    if [(e.width, e.pooled) for e in wanted] != [(e.width, e.pooled) for e in found]:
        raise ProjectionError(
            f"{where}: the edit was made for {_sizes(wanted)}, and this model has {_sizes(found)}: they are models of "
            "different kinds. Run `erase` on this model instead"
        )
    for want, have in zip(wanted, found, strict=True):
        reason = _reason(want, have)
        if reason is None:
            continue
        if not force:
            raise CheckpointError(
                f"{where}: {Path(have.where).name} is not the text encoder that the edit was made for ({reason}). Its "
                "states lie elsewhere, so the edit would erase something else, or nothing. Run `erase` on this model "
                "instead; to apply the edit all the same, pass --force-encoder (force_encoder=True)"
            )
        warnings.warn(
            f"{where}: {Path(have.where).name} is not the text encoder that the edit was made for ({reason}); applied "
            "because it was forced: look at what it draws",
            RealEraWarning,
            stacklevel=4,
        )


def _reason(want: EncoderPrint, have: EncoderSource) -> str | None:
    if want.structure != have.structure:
        return f"it has {have.structure}; the edit's had {want.structure}"
    # the second hash is taken only where the first one differs: a bfloat16 copy
    got = have.hash("float16")
    if got == want.float16 or have.hash("bfloat16") == want.bfloat16:
        return None
    return f"its weights differ: {got[:12]}, not {want.float16[:12]}, as rounded to float16"


def _sizes(encoders: Sequence[EncoderPrint | EncoderSource]) -> str:
    parts = [f"{e.width}" + (f" and {e.pooled} pooled" if e.pooled else "") for e in encoders]
    return f"{len(parts)} text encoder{'s' * (len(parts) > 1)} of width {', '.join(parts)}"
