"""Judges say what a picture shows: the protocol, the small network that ships, and one's own function.

A judge for published figures must not have been used while the edit was tuned, nor attacked.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CheckpointError, ConfigError, RealEraError

SIZE = 32
SPECS = "reference, reference:FILE, clip:FOLDER, classifier:FOLDER, nudenet or python:MODULE:NAME"
SHIPPED = Path(__file__).with_name("models") / "judge-report.safetensors"
_BATCH = 256


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of n pictures.

    `concept` int64 [n]: the place in its labels, -1 for none of them. `style` int64 [n]: likewise in its styles, None
    of a judge that knows none. `features` float32 [n, k]: by which sets of pictures are compared, None without any.
    """

    concept: np.ndarray
    style: np.ndarray | None = None
    features: np.ndarray | None = None

    def rows(self, places: Sequence[int]) -> Verdicts:
        """The verdicts on the pictures at `places`."""
        style, features = (None if part is None else part[places] for part in (self.style, self.features))
        return Verdicts(self.concept[places], style, features)


class Judge(Protocol):
    """Anything with names of what it tells apart that turns uint8 pictures [n, H, W, 3] into `Verdicts`.

    A judge may have `templates`, prompts with "{}" or "{a}" for a concept's name, and `styled`, one with "{style}" as
    well, where it was made for pictures of such prompts; `evaluation.TEMPLATES` are used otherwise.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def styles(self) -> tuple[str, ...]: ...

    def __call__(self, pictures: np.ndarray) -> Verdicts: ...


class Network(nn.Module):
    """Four stages of two 3 x 3 convolutions; concept from the last stage, style from pooled features of all.

    `width` is the number of channels in the first stage; each later stage doubles it and halves the picture.
    """

    def __init__(self, width: int, concepts: int, styles: int) -> None:
        """Build it untrained, for so many concepts and styles."""
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(*self._layer(a, b), *self._layer(b, b)) for a, b in itertools.pairwise(sizes)
        )
        self.concept = nn.Linear(sizes[-1], concepts)
        self.style = nn.Sequential(nn.Linear(2 * sum(sizes[1:]), 128), nn.ReLU(), nn.Linear(128, styles))

    @staticmethod
    def _layer(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, 32, 32] in [-1, 1] to what concepts [n, 8 width] and styles [n, 30 width] are told from."""
        pooled: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if index else x)
            pooled += [x.mean((2, 3)), x.amax((2, 3))]
        return pooled[-2] + pooled[-1], torch.cat(pooled, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, 32, 32] in [-1, 1] to logits [n, concepts] and [n, styles]."""
        own, every = self.pool(x)
        return self.concept(own), self.style(every)


def to_input(images: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] to float [n, 3, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of `to_input`, rounded and clipped."""
    return x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def shrink(images: Tensor) -> Tensor:
    """uint8 pictures [n, H, W, 3] to [n, 32, 32, 3], each pixel the mean of an area."""
    if images.shape[1:3] == (SIZE, SIZE):
        return images
    return to_uint8(F.adaptive_avg_pool2d(to_input(images), SIZE))


class ReferenceJudge:
    """The network that is trained apart for the emoji models, with the names of its classes."""

    templates = ("an emoji of a {}", "{}")
    styled = "a {style} emoji of a {}"

    def __init__(self, network: Network, labels: Sequence[str], styles: Sequence[str], name: str = "reference") -> None:
        """Class i of each head is `labels[i]` or `styles[i]`."""
        self.network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.labels, self.styles, self.name = tuple(labels), tuple(styles), name

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Verdicts:
        """Top-1 concept and style of uint8 pictures [n, H, W, 3], and the features of the concept head [n, 8 width]."""
        width = self.network.concept.in_features
        concept, style, features = [torch.zeros(0).long()], [torch.zeros(0).long()], [torch.zeros(0, width)]
        for start in range(0, len(pictures), _BATCH):
            part = torch.as_tensor(pictures[start : start + _BATCH])
            own, every = self.network.pool(to_input(shrink(part.to(self.network.concept.weight.device))))
            concept.append(self.network.concept(own).argmax(1).cpu())
            style.append(self.network.style(every).argmax(1).cpu())
            features.append(own.cpu())
        return Verdicts(*(torch.cat(parts).numpy() for parts in (concept, style, features)))

    @classmethod
    def load(cls, path: str | Path, name: str = "reference") -> ReferenceJudge:
        """Read what `benchmarks.reference_model.judge` saved: a safetensors file. Raises `CheckpointError`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["judge"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            network = Network(meta["recipe"]["width"], len(meta["labels"]), len(meta["styles"]))
            network.load_state_dict(state)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a judge is needed here") from None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(f"{path}: not a judge of realera-edit: {first}") from error
        return cls(network, meta["labels"], meta["styles"], name)


def reference_judge() -> ReferenceJudge:
    """The judge that ships for the reference model. `CheckpointError` if the installation left it out."""
    if not SHIPPED.is_file():
        raise CheckpointError(
            f"{SHIPPED}: the reference judge is not installed; install realera-edit with its data, or name another "
            f"judge: {SPECS}"
        )
    return ReferenceJudge.load(SHIPPED)


@dataclass(frozen=True)
class FunctionJudge:
    """One's own function as a judge.

    `function` gets uint8 pictures [n, H, W, 3] and returns n labels, or n places in `labels` (-1: none of them), or
    `Verdicts`. A label that is not among `labels` counts as none of them.
    """

    function: Callable[[np.ndarray], Any]
    labels: tuple[str, ...]
    styles: tuple[str, ...] = ()
    name: str = "function"

    def __call__(self, pictures: np.ndarray) -> Verdicts:
        """What the function says. `ConfigError` where its answer has another form."""
        found = self.function(pictures)
        if not isinstance(found, Verdicts):
            index = {label: place for place, label in enumerate(self.labels)}
            found = Verdicts(np.array([index.get(a, -1) if isinstance(a, str) else int(a) for a in found], np.int64))
        sizes = {len(part) for part in (found.concept, found.style, found.features) if part is not None}
        if sizes != {len(pictures)}:
            raise ConfigError(f"judge {self.name}: gave {sorted(sizes)} verdicts on {len(pictures)} pictures")
        if len(pictures) and not -1 <= found.concept.min() <= found.concept.max() < len(self.labels):
            raise ConfigError(f"judge {self.name}: a verdict is outside of its {len(self.labels)} labels")
        return found


def open_judge(spec: str, labels: Sequence[str], device: str = "cpu") -> Judge:
    """The judge that `spec` (see `SPECS`) names; `labels` for a judge that has none of its own.

    `python:MODULE:NAME` imports MODULE, which **runs its code**, and takes NAME from it: a `Judge`, or a function for
    `FunctionJudge`, whose labels are its attribute `labels` if it has one. Nothing else runs code of the user's.
    Raises `ConfigError` or `CheckpointError`.
    """
    kind, _, rest = spec.partition(":")
    if kind == "reference":
        return ReferenceJudge.load(rest, f"reference:{Path(rest).name}") if rest else reference_judge()
    if kind == "python":
        return _from_python(rest, labels)
    from . import judges_pretrained as pretrained

    if kind == "clip" and rest:
        return pretrained.ClipJudge(rest, labels, device=device)
    if kind == "classifier" and rest:
        return pretrained.ClassifierJudge(rest, device=device)
    if kind == "nudenet" and not rest:
        return pretrained.NudeNetJudge()
    raise ConfigError(f"judge {spec!r}: expected {SPECS}")


def _from_python(place: str, labels: Sequence[str]) -> Judge:
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except RealEraError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"judge python:{place}: cannot be imported ({type(error).__name__}: {error})") from error
    if hasattr(found, "labels") and hasattr(found, "styles") and hasattr(found, "name"):
        judge: Judge = found
        return judge
    if not callable(found):
        raise ConfigError(f"judge python:{place}: is a {type(found).__name__}, not a function of pictures")
    return FunctionJudge(found, tuple(getattr(found, "labels", labels)), name=f"python:{place}")
