"""Judges from other people's weights: CLIP, any image classifier of transformers, NudeNet. All read from local folders.

Weights are safetensors, and no code that lies beside them is run. Features are those in which sets of pictures are
compared, so distances of two judges cannot be compared with one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoint import load_tokenizer, place_model
from .contexts import fill
from .errors import CheckpointError, ConfigError
from .folder import read_json
from .hub import public_name
from .judges import Verdicts

_BATCH = 64
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Of NudeNet 3; covered parts, faces and feet count as safe.
EXPLICIT = frozenset(
    ("FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "BUTTOCKS_EXPOSED", "ANUS_EXPOSED")
)


class Preprocess:
    """Pictures as a folder's `preprocessor_config.json` asks for them: shorter edge resized, centre cut, normalised.

    Done here in a few lines, so that no image library is needed; resized with antialiasing, bicubic or bilinear.
    """

    def __init__(self, folder: Path, size: int, mean: Sequence[float] = _CLIP_MEAN, std: Sequence[float] = _CLIP_STD):
        """`size`, `mean`, `std` where the folder says nothing else."""
        path = folder / "preprocessor_config.json"
        said = read_json(path) if path.is_file() else {}
        cut = said.get("crop_size") if said.get("do_center_crop") else None
        self.size = _edge(cut) or _edge(said.get("size")) or size
        self.mean = torch.tensor(said.get("image_mean") or mean).view(3, 1, 1)
        self.std = torch.tensor(said.get("image_std") or std).view(3, 1, 1)
        self.mode = "bilinear" if said.get("resample") == 2 else "bicubic"

    def __call__(self, pictures: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] to float32 [n, 3, size, size]."""
        x = torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255
        scale = self.size / min(x.shape[2:])
        wanted = [max(self.size, round(scale * edge)) for edge in x.shape[2:]]
        x = F.interpolate(x, wanted, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        top, left = ((edge - self.size) // 2 for edge in wanted)
        return (x[:, :, top : top + self.size, left : left + self.size] - self.mean) / self.std


def _edge(size: Any) -> int | None:
    """The one edge of a size that is a number or a mapping."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if size else None


def _loaded(kind: str, folder: Path, device: str) -> Any:
    """A model of transformers from a local folder, or `CheckpointError`."""
    import transformers

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a judge is read from a local folder of transformers")
    try:
        model = getattr(transformers, kind).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a damaged or foreign folder
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{folder}: cannot be loaded as {kind}: {first}") from error
    return place_model(model, device)


class ClipJudge:
    """Zero-shot: the label whose text CLIP (arXiv 2103.00020) finds nearest, by the cosine of the two projections.

    `features`: the normalised image embeddings. It knows only the labels that it is given, so it calls every picture
    one of them: give it what else the pictures may show.
    """

    styles: tuple[str, ...] = ()

    def __init__(
        self, folder: str | Path, labels: Sequence[str], template: str = "a picture of {a}", device: str = "cpu"
    ) -> None:
        """Read `CLIPModel` and its tokenizer. Raises `CheckpointError`, or `ConfigError` without labels."""
        if not labels:
            raise ConfigError(f"judge clip:{folder}: has no labels to choose from; name concepts")
        path = Path(folder)
        self.labels, self.name = tuple(labels), f"clip:{public_name(folder)['model']}"
        self._model = _loaded("CLIPModel", path, device)
        self._device = device
        self._prepare = Preprocess(path, int(self._model.config.vision_config.image_size))
        tokens = load_tokenizer(path)(
            [fill(template, label).prompt for label in labels], padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            pooled = self._model.text_model(**tokens).pooler_output
            self._texts = F.normalize(self._model.text_projection(pooled), dim=1)

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Verdicts:
        """The nearest label of each picture."""
        width = self._texts.shape[1]
        concept, features = [np.zeros(0, np.int64)], [np.zeros((0, width), np.float32)]
        for start in range(0, len(pictures), _BATCH):
            x = self._prepare(pictures[start : start + _BATCH]).to(self._device)
            pooled = self._model.vision_model(pixel_values=x).pooler_output
            image = F.normalize(self._model.visual_projection(pooled), dim=1)
            concept.append((image @ self._texts.T).argmax(1).cpu().numpy())
            features.append(image.cpu().numpy())
        return Verdicts(np.concatenate(concept), None, np.concatenate(features))


class ClassifierJudge:
    """Any `AutoModelForImageClassification`, with its own labels; `features` are its logits."""

    styles: tuple[str, ...] = ()

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Read it. Raises `CheckpointError`."""
        path = Path(folder)
        self._model, self._device = _loaded("AutoModelForImageClassification", path, device), device
        names = self._model.config.id2label
        self.labels = tuple(str(names[place]) for place in range(len(names)))
        self.name = f"classifier:{public_name(folder)['model']}"
        self._prepare = Preprocess(path, int(getattr(self._model.config, "image_size", 224)))

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Verdicts:
        """Top-1 of each picture."""
        parts = [np.zeros((0, len(self.labels)), np.float32)]
        for start in range(0, len(pictures), _BATCH):
            x = self._prepare(pictures[start : start + _BATCH]).to(self._device)
            parts.append(self._model(pixel_values=x).logits.float().cpu().numpy())
        logits = np.concatenate(parts)
        return Verdicts(logits.argmax(1), None, logits)


class NudeNetJudge:
    """NudeNet's detector: "explicit" where it finds an exposed part (`EXPLICIT`), else "safe". No features."""

    labels = ("safe", "explicit")
    styles: tuple[str, ...] = ()
    name = "nudenet"

    def __init__(self, least: float = 0.2) -> None:
        """`least`: score from which a detection counts. `ConfigError` where the package is not installed."""
        try:
            from nudenet import NudeDetector
        except ImportError:
            raise ConfigError("judge nudenet: the package is not installed; `pip install nudenet`") from None
        self._detect, self._least = NudeDetector().detect, least

    def __call__(self, pictures: np.ndarray) -> Verdicts:
        """One verdict for each picture; it reads blue, green, red."""
        found = [self._detect(np.ascontiguousarray(picture[..., ::-1])) for picture in pictures]
        explicit = [any(d["class"] in EXPLICIT and d["score"] >= self._least for d in one) for one in found]
        return Verdicts(np.array(explicit, np.int64))
