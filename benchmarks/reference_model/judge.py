"""Judges: small classifiers that say which concept, in which drawing style, a picture shows (seen at 32 x 32).

Two are trained apart: "development" may be used while methods are tuned, "report" only for published figures.

    python -m benchmarks.reference_model.judge --model CHECKPOINT --which development
    python -m benchmarks.reference_model.calibration --model CHECKPOINT --which development
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reference_model.pictures import (
    DEFAULT_CACHE,
    PictureSet,
    load,
    read_concepts,
    write_atomically,
)
from benchmarks.reference_model.splits import Split
from benchmarks.reference_model.training import autocast
from realera_edit import reference_model
from realera_edit.hub import resolve
from realera_edit.judges import SHIPPED, Network, ReferenceJudge, shrink, to_input, to_uint8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one judge is built and trained; `strength` scales every augmentation."""

    seed: int
    width: int
    strength: float
    steps: int = 2000
    batch: int = 96
    rate: float = 2e-3


RECIPES: dict[Split, Recipe] = {
    "development": Recipe(seed=11, width=24, strength=1.0),
    "report": Recipe(seed=23, width=32, strength=0.7, steps=1500),
}


def saved_at(which: Split, model: Path, cache: Path) -> Path:
    """Where the judge of a checkpoint is kept: it knows that checkpoint's concepts and its decoder's artefacts."""
    return cache / f"judge-{which}-{_weights_key(model)}.safetensors"


def _weights_key(model: Path) -> str:
    digest = hashlib.sha256((model / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    digest.update((model / "concepts.json").read_bytes())
    return digest.hexdigest()[:12]


class Judge:
    """A `ReferenceJudge` of one checkpoint, which answers in tensors."""

    def __init__(self, network: Network, labels: Sequence[str], styles: Sequence[str]) -> None:
        """Class i of each head is `labels[i]` or `styles[i]`."""
        self.judge = ReferenceJudge(network, labels, styles)
        self.network, self.labels, self.styles = self.judge.network, self.judge.labels, self.judge.styles
        self.index = {label: i for i, label in enumerate(self.labels)}

    def __call__(self, images: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Top-1 concept and style index, each int64 [n], of uint8 pictures [n, H, W, 3]."""
        found = self.judge(np.asarray(images))
        return torch.as_tensor(found.concept), torch.as_tensor(found.style)

    @classmethod
    def load(cls, which: Split, model: Path, cache: Path = DEFAULT_CACHE, device: str = "cpu") -> "Judge":
        """Read the judge that `train` saved for a checkpoint, or the reporting judge that ships with its model."""
        path = saved_at(which, model, cache)
        if not path.exists() and which == "report" and _weights_key(model) == _weights_key(reference_model()):
            path = SHIPPED
        if not path.exists():
            command = f"python -m benchmarks.reference_model.judge --which {which} --model {model}"
            raise FileNotFoundError(f"no {which} judge at {path}; train it with `{command}`")
        found = ReferenceJudge.load(path)
        return cls(found.network.to(device), found.labels, found.styles)


@torch.inference_mode()
def reconstruct(vae: Any, images: Tensor, levels: Tensor, generator: torch.Generator, batch: int = 64) -> Tensor:
    """Encode, add noise of std `levels` [n] to the scaled latent (its own std is about 1), decode: uint8."""
    done = []
    for part, level in zip(images.split(batch), levels.split(batch), strict=True):
        x = to_input(part).contiguous(memory_format=torch.channels_last)
        with autocast():
            latent = vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor
            noise = torch.randn(latent.shape, generator=generator) * level[:, None, None, None]
            drawn = vae.decode((latent + noise) / vae.config.scaling_factor).sample
        done.append(to_uint8(drawn.float()))
    return torch.cat(done)


@dataclasses.dataclass(frozen=True)
class Data:
    """Real pictures uint8 [n, 32, 32, 3], reconstructions [k, n, 32, 32, 3], targets [n], class names."""

    real: Tensor
    decoded: Tensor
    concept: Tensor
    style: Tensor
    labels: tuple[str, ...]
    styles: tuple[str, ...]


def load_data(model: Path, cache: Path, copies: int = 5, seed: int = 0) -> Data:
    """Pictures of the checkpoint's concepts at 32 x 32, and `copies` reconstructions of them, noise 0 to 0.3."""
    found, full, vae = pictures_of(model, cache)
    path = cache / f"decoded-{_weights_key(model)}-{copies}-{seed}.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        levels = torch.rand(copies, len(full), generator=generator) * 0.3
        decoded = torch.stack([shrink(reconstruct(vae, full, level, generator)) for level in levels])
        write_atomically(path, save({"decoded": decoded}))
    concept, style = torch.arange(len(full)) // len(found.styles), torch.arange(len(full)) % len(found.styles)
    labels = tuple(concept.label for concept in found.concepts)
    return Data(shrink(full), load_file(path)["decoded"], concept, style, labels, found.styles)


def pictures_of(model: Path, cache: Path) -> tuple[PictureSet, Tensor, Any]:
    """The checkpoint's concepts, their pictures uint8 [n, H, H, 3] at its own size, and its autoencoder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32)
    vae = vae.eval().to(memory_format=torch.channels_last)
    found = load(cache)
    rows = {concept.label: i for i, concept in enumerate(found.concepts)}
    concepts = read_concepts(model / "concepts.json")
    pictures = found.pictures[[rows[concept.label] for concept in concepts]]
    full = torch.from_numpy(pictures).flatten(0, 1)
    if vae.config.sample_size != full.shape[1]:
        full = to_uint8(F.avg_pool2d(to_input(full), full.shape[1] // vae.config.sample_size))
    return PictureSet(pictures, concepts, found.styles), full, vae


def augment(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random turn, scale, shift, blur, contrast, brightness and noise of pictures [n, 3, H, W] in [-1, 1]."""

    def uniform(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(len(x), *shape, generator=generator) - 1)

    angle, scale, shift = uniform() * 0.2, 1 + uniform() * 0.15, uniform(2, 1) * 0.12
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    matrix = torch.cat([turn * scale[:, None, None], shift], 2)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    x = 1 + F.grid_sample(x - 1, grid, align_corners=False)  # what comes in from outside is white
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + uniform(1, 1, 1).clamp_min(0) * (blurred - x)
    x = x * (1 + 0.2 * uniform(3, 1, 1)) + 0.1 * uniform(3, 1, 1)
    return x + 0.1 * uniform(1, 1, 1).abs() * torch.randn(x.shape, generator=generator)


def batches(data: Data, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Endless augmented batches: a third real, the rest reconstructed."""
    while True:
        for index in torch.randperm(len(data.real), generator=generator).split(recipe.batch):
            copy = torch.randint(len(data.decoded), index.shape, generator=generator)
            real = torch.rand(len(index), 1, 1, 1, generator=generator) < 1 / 3
            picked = torch.where(real, data.real[index], data.decoded[copy, index])
            x = augment(to_input(picked), recipe.strength, generator)
            yield x, data.concept[index], data.style[index]


def fit(data: Data, recipe: Recipe) -> Judge:
    """Minimise concept plus style cross-entropy (labels smoothed by 0.1) with AdamW on a one-cycle rate."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    network = Network(recipe.width, len(data.labels), len(data.styles)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, recipe.steps, pct_start=0.2)
    start = time.perf_counter()
    for step, (x, concept, style) in zip(range(recipe.steps), batches(data, recipe, generator), strict=False):
        with autocast():
            concepts, styles = (logits.float() for logits in network(x))
        loss = F.cross_entropy(concepts, concept, label_smoothing=0.1) + F.cross_entropy(styles, style)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            elapsed = time.perf_counter() - start
            print(f"{step + 1:5d} {elapsed:5.0f} s loss {loss.item():.3f}", flush=True)
    return Judge(network, data.labels, data.styles)


def train(which: Split, model: Path, cache: Path = DEFAULT_CACHE) -> Judge:
    """Train one judge and save it in the cache with its recipe and class names."""
    data = load_data(model, cache)
    judge = fit(data, RECIPES[which])
    meta = {"recipe": dataclasses.asdict(RECIPES[which]), "labels": judge.labels, "styles": judge.styles}
    state = {name: value.contiguous() for name, value in judge.network.state_dict().items()}
    write_atomically(saved_at(which, model, cache), save(state, {"judge": json.dumps(meta)}))
    return judge


def main() -> None:
    """Train a judge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    parser.add_argument("--which", choices=list(RECIPES), default="development")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.which, resolve(options.model), options.cache)


if __name__ == "__main__":
    main()
