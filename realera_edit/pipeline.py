"""A loaded diffusers pipeline: its text encoders, its text projections, and editing them in place, undoably."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import ENCODER_CLASSES, encoder_widths
from .embeddings import PromptEncoder
from .errors import CheckpointError, ProjectionError, RealEraWarning, SolveError
from .projections import Projection, text_projections
from .tensorfile import all_finite
from .writer import digest

if TYPE_CHECKING:
    from .compute import Edit


class LoadedPipeline:
    """A pipeline that is edited in place. The original weights of edited tensors are kept for `restore`."""

    where = "the pipeline"

    def __init__(self, pipe: Any, progress: bool = False, dtype: torch.dtype | None = None) -> None:
        components: Mapping[str, Any] = getattr(pipe, "components", None) or {}
        if not isinstance(components.get("unet"), nn.Module):
            raise CheckpointError(
                f"{type(pipe).__name__} has no U-Net: give a loaded Stable Diffusion 1.x, 2.x or XL pipeline, or a path"
            )
        self.pipe = pipe
        self.encoder = _encoder(components, progress, dtype or torch.float32)
        widths = encoder_widths(self.encoder)
        self._parameters: dict[tuple[str, str], nn.Parameter] = {}
        self._found: dict[str, tuple[Projection, ...]] = {}
        for name, module in components.items():
            config = getattr(module, "config", None)
            if not isinstance(module, nn.Module) or not isinstance(config, Mapping):
                continue  # a text encoder's configuration is no mapping
            if "cross_attention_dim" not in config:
                continue
            if any("Fused" in type(p).__name__ for p in getattr(module, "attn_processors", {}).values()):
                raise ProjectionError(
                    f"{self.where}'s {name}: its attention projections are fused; call unfuse_qkv_projections() first"
                )
            parameters = dict(module.named_parameters())
            _check_present(name, module)
            shapes = {key: tuple(value.shape) for key, value in parameters.items()}
            self._found[name] = text_projections(shapes, config, *widths, f"{self.where}'s {name}")
            for projection in self._found[name]:
                self._parameters[name, projection.name] = parameters[projection.name]
            if any("lora_" in key for key in shapes):
                warnings.warn(
                    f"{name} carries a LoRA: the base weights are edited, the LoRA's own change is not",
                    RealEraWarning,
                    stacklevel=4,
                )
        self._originals: dict[tuple[str, str], Tensor] = {}

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for group in self._found.values() for p in group)

    def original_weights(self) -> Iterator[tuple[str, Projection, Tensor]]:
        """(component, projection, weight) of every text projection, as it was before an edit."""
        for name, group in self._found.items():
            for p in group:
                yield name, p, self._originals.get((name, p.name), self._parameters[name, p.name].data)

    def bytes(self) -> int:
        """Size of all weights."""
        modules = (m for m in self.pipe.components.values() if isinstance(m, nn.Module))
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    @torch.no_grad()
    def apply(self, edit: Edit, selection: Sequence[Projection]) -> dict[str, dict[str, dict[str, str]]]:
        """Multiply the selected projections by the edit's factors; component -> weight -> hashes before and after.

        All new weights are computed and checked before the first is written.
        """
        from .edit import apply_by_role

        wanted = set(selection)
        keys = [(name, p) for name, group in self._found.items() for p in group if p in wanted]
        weights = [self._parameters[name, p.name] for name, p in keys]
        for (name, p), weight in zip(keys, weights, strict=True):
            if not all_finite(weight.data):
                raise CheckpointError(f"{name}: {p.name} contains NaN or inf: the model is damaged")
        edited = apply_by_role(edit, [p.role for _, p in keys], [weight.data for weight in weights])
        for (name, p), new in zip(keys, edited, strict=True):
            if not all_finite(new):
                raise SolveError(f"{name}: the edited {p.name} overflows {new.dtype}; raise ridge or lower strength")
        hashes: dict[str, dict[str, dict[str, str]]] = {}
        for (name, p), weight, new in zip(keys, weights, edited, strict=True):
            hashes.setdefault(name, {})[p.name] = {"before": digest(weight.data), "after": digest(new)}
            self._originals.setdefault((name, p.name), weight.data.clone())
            weight.data.copy_(new)
        return hashes

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back, to the bit."""
        for key, original in self._originals.items():
            self._parameters[key].data.copy_(original)
        self._originals.clear()


def _check_present(name: str, module: nn.Module) -> None:
    if any(weight.is_meta for weight in module.parameters()):
        raise CheckpointError(
            f"the weights of {name} are offloaded (meta tensors); edit before enable_sequential_cpu_offload()"
        )


def _encoder(components: Mapping[str, Any], progress: bool, dtype: torch.dtype) -> PromptEncoder:
    pairs = []
    for suffix in ("", "_2", "_3"):
        model, tokenizer = components.get(f"text_encoder{suffix}"), components.get(f"tokenizer{suffix}")
        if model is None or tokenizer is None:
            continue
        if type(model).__name__ not in ENCODER_CLASSES:
            raise CheckpointError(
                f"text_encoder{suffix} is a {type(model).__name__}; supported: {', '.join(ENCODER_CLASSES)}"
            )
        _check_present(f"text_encoder{suffix}", model)
        pairs.append((tokenizer, model))
    if not pairs:
        raise CheckpointError("the pipeline has no text encoder loaded; the edit needs one")
    return PromptEncoder(tuple(pairs), penultimate="text_encoder_2" in components, progress=progress, dtype=dtype)
