"""The edit on the prompt's side: W' x = W (M x), so mapping the text states draws what edited weights would draw.

For pipelines whose weights must not change: shared, compiled, quantised, or served from elsewhere.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .editfile import EditFile
from .errors import CheckpointError, ConfigError
from .fingerprint import check_encoders, loaded_encoders
from .history import PIPELINE
from .pipeline import fetched, open_encoder
from .solve import Factor

# What `encode_prompt` of a Stable Diffusion 1.x, 2.x or XL pipeline returns, in this order, and the arguments in which
# a caller gives the same states ready-made.
_STATES = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_METHOD = "encode_prompt"


class WrappedEncoder:
    """A pipeline whose text states are mapped by an edit, until `remove` is called or a `with` block ends."""

    def __init__(self, pipe: Any, edit: EditFile) -> None:
        self._pipe = pipe
        self._factors = dict.fromkeys(_STATES, edit.cross)
        if edit.pooled is not None:
            self._factors |= dict.fromkeys(_POOLED, edit.pooled)
        self._cast: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        # the very tensors that were returned: given back to the pipeline, they must not be mapped twice
        self._mapped: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._had = pipe.__dict__.get(_METHOD)
        self._inner: Callable[..., Any] = getattr(pipe, _METHOD)
        self._signature = inspect.signature(self._inner)

        @functools.wraps(self._inner)
        def encode(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
            return self._encode(*args, **kwargs)

        self._outer: Callable[..., Any] | None = encode
        setattr(pipe, _METHOD, encode)

    def remove(self) -> None:
        """Give the pipeline back as it was. A second call does nothing; wrappers come off in the reverse order."""
        if self._outer is None:
            return
        if self._pipe.__dict__.get(_METHOD) is not self._outer:
            raise CheckpointError(
                "the pipeline's encode_prompt was wrapped again since: remove the later wrapper first"
            )
        if self._had is None:
            delattr(self._pipe, _METHOD)
        else:
            setattr(self._pipe, _METHOD, self._had)
        self._outer = None
        self._cast.clear()

    def __enter__(self) -> WrappedEncoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def _encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        given = self._signature.bind(*args, **kwargs).arguments
        done = {name for name in self._factors if self._is_mapped(given.get(name))}
        found = self._inner(*args, **kwargs)
        names = (*_STATES, *_POOLED)
        if not isinstance(found, tuple) or len(found) not in (len(_STATES), len(names)):
            raise CheckpointError(f"{type(self._pipe).__name__}: its {_METHOD} returns something else; use apply_edit")
        result = []
        for name, states in zip(names, found, strict=False):
            new = states
            if states is not None and name in self._factors:
                new = states if name in done else self._map(self._factors[name], states)
                self._mapped[id(new)] = new
            result.append(new)
        return tuple(result)

    def _is_mapped(self, states: Any) -> bool:
        return states is not None and self._mapped.get(id(states)) is states

    def _map(self, factor: Factor, states: Tensor) -> Tensor:
        """M x of each state [..., d], in float32 (a float64 state in float64), in the states' own dtype."""
        dtype = torch.promote_types(torch.float32, states.dtype)
        key = (id(factor), states.device, dtype)
        if key not in self._cast:
            right = None if factor.right is None else factor.right.to(states.device, dtype).T
            self._cast[key] = (factor.left.to(states.device, dtype).T, right)
        left, right = self._cast[key]
        x = states.to(dtype)
        moved = x @ left if right is None else (x @ right) @ left
        return (x + moved).to(states.dtype)


def wrap_text_encoder(pipe: Any, edit: EditFile | str | Path, *, force_encoder: bool = False) -> WrappedEncoder:
    """Make a loaded pipeline map its text states by `edit`; its weights stay as they are, to the bit.

        with wrap_text_encoder(pipe, "no-van-gogh.safetensors"):
            pipe("a starry night by Van Gogh")

    Wraps `pipe.encode_prompt`, so keys, values and, for SDXL, the pooled path read M x for x: prompt, negative prompt,
    also with `clip_skip`, and states that the caller gives ready-made (`prompt_embeds`), unless this wrapper has
    returned these very tensors. Of the U-Net nothing is read: it may be compiled, quantised or offloaded. Raises
    `ConfigError` for an edit of keys or values alone, which no map of the states expresses; `CheckpointError` for
    another text encoder (`force_encoder`: only warns) and for what is no pipeline.
    """
    file = edit if isinstance(edit, EditFile) else EditFile.load(edit)
    if file.config.edit != "kv":
        alone = {"k": "keys", "v": "values"}[file.config.edit]
        raise ConfigError(
            f"the edit changes {alone} alone, and keys and values read the same states: it has no prompt-side form. "
            'Use apply_edit, or erase with edit = "kv"'
        )
    if isinstance(pipe, (str, Path)):
        raise CheckpointError(f"{pipe}: is a path; load the pipeline first, or use apply_edit for a folder")
    _check_encoder(pipe, file, force_encoder)
    if not callable(getattr(pipe, _METHOD, None)):
        raise CheckpointError(f"{type(pipe).__name__} has no {_METHOD} to wrap; use apply_edit")
    return WrappedEncoder(pipe, file)


def _check_encoder(pipe: Any, file: EditFile, force: bool) -> None:
    """`CheckpointError` where the pipeline's text encoder is not the one that `file` was made for."""
    with fetched(pipe):
        check_encoders(file.encoders, loaded_encoders(open_encoder(pipe)), PIPELINE, force=force)
