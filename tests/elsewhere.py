"""A device to test with where there is none: tensors that say they are elsewhere, and refuse to meet the CPU's.

They are computed on the CPU, so that a result there is that of the CPU to the bit. PyTorch's own "meta" device lends
its name, as it is the only one that every build knows of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
# As on a GPU, places may be given by indices of the CPU; and whatever goes from one device to the other.
UNORDERED = ("index_add", "index_add_", "scatter_add", "scatter_add_", "cumsum")  # a GPU adds in any order: other bits
MIXED = ("index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy", "set_")


class Distant(torch.Tensor):
    """`inner`, a tensor of the CPU, that is elsewhere."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Distant:
        size = inner.size()
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        found = torch.Tensor._make_wrapper_subclass(cls, size, **options, device=torch.device(DEVICE))
        found.inner = inner
        return found

    def __getitem__(self, places: Any) -> torch.Tensor:
        """As `_Values`, of a list of places."""
        return super().__getitem__(torch.tensor(places) if isinstance(places, list) else places)

    def tolist(self) -> Any:
        """The values: PyTorch has this for plain tensors alone."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(function, args, dict(kwargs or {}))


class _Values(TorchFunctionMode):
    """PyTorch gives a new tensor of its "meta" device no values: they are put into one of the CPU, which then moves."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


_refused: set[torch.dtype] = set()


class Elsewhere(TorchDispatchMode):
    """Within it, `DEVICE` is a device like any other; one that knows no dtype of `without`."""

    def __init__(self, *without: torch.dtype) -> None:
        super().__init__()
        self.values, self.without = _Values(), without

    def __enter__(self) -> Elsewhere:
        _refused.update(self.without)
        self.values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _refused.clear()
        self.values.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(function, args, dict(kwargs or {}))


def _call(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    distant = [tensor for tensor in tensors if isinstance(tensor, Distant)]
    near = [tensor for tensor in tensors if not isinstance(tensor, Distant) and tensor.dim()]
    if distant and near and name not in MIXED:
        raise RuntimeError(f"tensors of two devices meet in {function}")
    if name in UNORDERED and any(tensor.is_floating_point() for tensor in distant):
        raise RuntimeError(f"{function} gives other bits each time")
    away = bool(distant) and not (name == "copy_" and near and near[0] is args[0])
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == DEVICE
        kwargs["device"] = torch.device("cpu")
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Distant) else x, (args, kwargs))
    found = function(*inner_args, **inner_kwargs)
    if not away:
        return found
    if strange := _refused & {leaf.dtype for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)}:
        raise TypeError(f"{function}: there is no {strange.pop()} there")
    known = {id(tensor.inner): tensor for tensor in distant}  # what is changed in place stays the same tensor
    return tree_map(lambda x: _again(x, known) if isinstance(x, torch.Tensor) else x, found)


def _again(inner: torch.Tensor, known: Mapping[int, Distant]) -> Distant:
    found = known.get(id(inner))
    return Distant(inner) if found is None else found
