"""A loaded diffusers pipeline: its text encoders, its text projections, and editing them in place, undoably."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from .checkpoint import ENCODER_CLASSES, encoder_widths
from .embeddings import PromptEncoder
from .errors import CheckpointError, ProjectionError, RealEraWarning, SolveError
from .history import PIPELINE
from .in_place import Hashes, Made, forget, in_force, note
from .projections import Projection, text_projections
from .tensorfile import DTYPES, all_finite
from .writer import digest

if TYPE_CHECKING:
    from .compute import Edit

_Place = tuple[str, str]
_COMPILED = "_orig_mod."


class LoadedPipeline:
    """A pipeline that is edited in place. The original weights of edited tensors are kept for `restore`.

    `tell`: what gives the record of the edit that is about to be made.
    """

    where = PIPELINE

    def __init__(self, pipe: Any, progress: bool = False, dtype: torch.dtype | None = None) -> None:
        components = _components(pipe)
        self.pipe = pipe
        self.encoder = _encoder(components, progress, dtype or torch.float32)
        self.tell: WeakMethod[Callable[[], dict[str, Any]]] | None = None
        widths = encoder_widths(self.encoder)
        self._parameters: dict[_Place, nn.Parameter] = {}
        self._found: dict[str, tuple[Projection, ...]] = {}
        for name, module in _networks(components):
            config = getattr(module, "config", None)
            # a text encoder's configuration is no mapping
            if isinstance(config, Mapping) and "cross_attention_dim" in config:
                self._open(name, module, config, widths)
        self._unet = unwrapped(components["unet"])
        self._made: list[tuple[Made, dict[_Place, Tensor]]] = []

    def _open(self, name: str, module: nn.Module, config: Mapping[str, Any], widths: tuple[int, int | None]) -> None:
        """Find the text projections of one network."""
        if any("Fused" in type(p).__name__ for p in getattr(module, "attn_processors", {}).values()):
            raise ProjectionError(
                f"{self.where}'s {name}: its attention projections are fused; call unfuse_qkv_projections() first"
            )
        _check_present(name, module)
        # the network may be compiled, or parts of it by themselves
        parameters = {key.replace(_COMPILED, ""): value for key, value in module.named_parameters()}
        shapes = {key: tuple(value.shape) for key, value in parameters.items()}
        try:
            self._found[name] = text_projections(shapes, config, *widths, f"{self.where}'s {name}")
        except ProjectionError:
            for key, weight in parameters.items():
                _check_dtype(name, key, weight)  # weights in 4 bits are packed, and have other shapes
            raise
        for projection in self._found[name]:
            self._parameters[name, projection.name] = parameters[projection.name]
        if any("lora_" in key for key in shapes):
            warnings.warn(
                f"{name} carries a LoRA: the base weights are edited, the LoRA's own change is not",
                RealEraWarning,
                stacklevel=5,
            )

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for group in self._found.values() for p in group)

    def original_weights(self) -> Iterator[tuple[str, Projection, Tensor]]:
        """(component, projection, weight) of every text projection, as it was before an edit."""
        originals = {key: weight for _, kept in reversed(self._made) for key, weight in kept.items()}
        for name, group in self._found.items():
            for p in group:
                weight = originals.get((name, p.name), self._parameters[name, p.name].data)
                _check_dtype(name, p.name, weight)
                yield name, p, weight

    def bytes(self) -> int:
        """Size of all weights."""
        modules = (m for m in self.pipe.components.values() if isinstance(m, nn.Module))
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def check_editable(self, selection: Sequence[Projection]) -> None:
        """Raise `CheckpointError` for a selected weight of a dtype that cannot be edited: quantised weights."""
        for name, p in self._keys(selection):
            _check_dtype(name, p.name, self._parameters[name, p.name])

    @torch.no_grad()
    def apply(self, edit: Edit, selection: Sequence[Projection]) -> Hashes:
        """Multiply the selected projections by the edit's factors; component -> weight -> hashes before and after.

        All new weights are computed and checked before the first is written.
        """
        from .edit import apply_by_role

        self.check_editable(selection)
        keys = self._keys(selection)
        weights = [self._parameters[name, p.name] for name, p in keys]
        for (name, p), weight in zip(keys, weights, strict=True):
            if not all_finite(weight.data):
                raise CheckpointError(f"{name}: {p.name} contains NaN or inf: the model is damaged")
        edited = apply_by_role(edit, [p.role for _, p in keys], [weight.data for weight in weights])
        hashes: Hashes = {}
        for (name, p), weight, new in zip(keys, weights, edited, strict=True):
            if not all_finite(new):
                raise SolveError(f"{name}: the edited {p.name} overflows {new.dtype}; raise ridge or lower strength")
            hashes.setdefault(name, {})[p.name] = {"before": digest(weight.data), "after": digest(new)}
        made = note(self._unet, self, self._parameters, hashes, self.tell() if self.tell else None)
        # one network may be in a pipeline twice: all originals are kept before the first weight is written
        originals = {(name, p.name): weight.data.clone() for (name, p), weight in zip(keys, weights, strict=True)}
        for weight, new in zip(weights, edited, strict=True):
            weight.data.copy_(new)
        self._made.append((made, originals))
        return hashes

    @torch.no_grad()
    def restore(self, hashes: Hashes) -> None:
        """Put the weights back that the edit of `hashes` found, to the bit; of one that was undone, nothing.

        Weights that were cast since become the cast of what it found. Raises `CheckpointError` where it is not the last
        edit that the weights carry.
        """
        for made, originals in self._made:
            if made.hashes is hashes and originals:
                self._check_last(made, cast=True)
                for place, original in originals.items():
                    self._parameters[place].data.copy_(original)
                originals.clear()
                forget(self._unet, made)

    def check_in_force(self, hashes: Hashes) -> None:
        """Raise `CheckpointError` where the edit of `hashes` was undone, or is not the last that the weights carry."""
        for made, originals in self._made:
            if made.hashes is hashes:
                if not originals:
                    raise CheckpointError(f"{self.where}: this edit was undone, and its weights are not there to save")
                self._check_last(made)

    def earlier(self, hashes: Hashes) -> tuple[dict[str, Any], ...]:
        """Records of the edits that were in force when the edit of `hashes` was made, oldest first."""
        return next((made.earlier for made, _ in self._made if made.hashes is hashes), ())

    def _keys(self, selection: Sequence[Projection]) -> list[tuple[str, Projection]]:
        wanted = set(selection)
        return [(name, p) for name, group in self._found.items() for p in group if p in wanted]

    def _check_last(self, made: Made, cast: bool = False) -> None:
        """Raise `CheckpointError` where an edit is not the last that the pipeline's weights carry.

        `cast`: also where they were cast since, they are taken for what it left.
        """
        held = {id(p) for _, module in _networks(_components(self.pipe)) for p in module.parameters()}
        for change in made.changes:
            if id(change.weight()) not in held:
                raise CheckpointError(
                    f"{self.where} has other weights than those that this edit changed: a component was replaced, or "
                    "its weights were offloaded since; put them back first"
                )
        edits = in_force(self._unet, cast)
        if made not in edits:
            raise CheckpointError(
                f"{self.where}'s weights are not as this edit left them: they were edited, cast, or fused with a LoRA "
                "since. Undo that first (save before a cast), or load the pipeline again"
            )
        if edits[-1] is not made:
            raise CheckpointError(
                f"{self.where}: another edit was made since this one: undo that first, or save its result"
            )


def unwrapped(module: Any) -> Any:
    """A module without what `torch.compile` put around it."""
    return getattr(module, _COMPILED.rstrip("."), module) if isinstance(module, nn.Module) else module


def open_encoder(pipe: Any) -> PromptEncoder:
    """The text encoders of a loaded pipeline, of whose U-Net nothing is read. Raises `CheckpointError`."""
    return _encoder(_components(pipe), False, torch.float32)


@contextlib.contextmanager
def fetched(pipe: Any) -> Iterator[None]:
    """Meanwhile the weights of text encoders that `enable_sequential_cpu_offload` took away are there, on the CPU."""
    parts = (unwrapped(part) for name, part in _components(pipe).items() if name.startswith("text_encoder"))
    hooked = [m for part in parts if isinstance(part, nn.Module) for m in part.modules() if hasattr(m, "_hf_hook")]
    with contextlib.ExitStack() as stack:
        if hooked:
            from accelerate.utils import align_module_device, has_offloaded_params

            for module in filter(has_offloaded_params, hooked):
                stack.enter_context(align_module_device(module, "cpu"))
        yield


def _components(pipe: Any) -> Mapping[str, Any]:
    """The components of a pipeline; `CheckpointError` for what is none, or has no U-Net."""
    components: Mapping[str, Any] = getattr(pipe, "components", None) or {}
    if not isinstance(components.get("unet"), nn.Module):
        raise CheckpointError(
            f"{type(pipe).__name__} has no U-Net: give a loaded Stable Diffusion 1.x, 2.x or XL pipeline, or a path"
        )
    return components


def _networks(components: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Each network of a pipeline, by the name of the folder that it is saved to: of several ControlNets each."""
    for name, part in components.items():
        nets = getattr(part, "nets", None)
        for place, module in enumerate(nets if isinstance(nets, nn.ModuleList) else [part]):
            if isinstance(module, nn.Module):
                yield f"{name}_{place}" if place else name, module


def _check_present(name: str, module: nn.Module) -> None:
    if any(weight.is_meta for weight in module.parameters()):
        raise CheckpointError(
            f"the weights of {name} are offloaded (meta tensors); edit before enable_sequential_cpu_offload()"
        )


def _check_dtype(name: str, key: str, weight: Tensor) -> None:
    """`CheckpointError` for a quantised weight: of a dtype that files, too, are refused for, or packed (torchao)."""
    packed = hasattr(weight, "__tensor_flatten__")
    if packed or weight.dtype not in DTYPES.values():
        kind = type(weight).__name__ if packed else str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{PIPELINE}'s {name}: {key} is {kind}; only fp64, fp32, fp16 and bf16 weights can be edited. Load it "
            "unquantised, or map what it reads: wrap_text_encoder(pipe, EDIT)"
        )


def _encoder(components: Mapping[str, Any], progress: bool, dtype: torch.dtype) -> PromptEncoder:
    pairs = []
    for suffix in ("", "_2", "_3"):
        model, tokenizer = unwrapped(components.get(f"text_encoder{suffix}")), components.get(f"tokenizer{suffix}")
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
