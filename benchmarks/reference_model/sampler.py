"""Fast sampling from a small Stable Diffusion checkpoint, and a store of the unedited model's pictures."""

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference_model.training import has_bfloat16
from realera_edit.hub import resolve
from realera_edit.judges import to_uint8

CPU_BATCH, GPU_BATCH = 64, 512  # pictures at once: what fits a processor's caches, and what fills a GPU


def load_pipeline(model: Path | str, device: str = "cpu") -> Any:
    """A folder, or `emoji`, as a float32 `StableDiffusionPipeline` without safety checker, in evaluation mode."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        resolve(model), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@torch.inference_mode()
def encode(pipe: Any, prompts: Sequence[str], batch: int = 256) -> Tensor:
    """Text states [prompts, length, width] of the text encoder's last layer, padded and truncated."""
    states = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        tokens = pipe.tokenizer(part, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states.append(pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0])
    return torch.cat(states)


def initial_noise(pipe: Any, seed: int) -> Tensor:
    """Latent noise [channels, h, w] that depends on the seed alone."""
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def denoise(
    pipe: Any, states: Tensor, empty: Tensor, x: Tensor, steps: int, guidance: float, fast: bool = False
) -> Tensor:
    """Latents from noise x [n, c, h, w] and states [n, length, width]; each step: u + guidance (c - u).

    `fast`: the U-Net in bfloat16, for processors that multiply it faster.
    """
    if fast and not has_bfloat16(x.device.type):
        warnings.warn(
            "no bfloat16 on this processor: drawing takes several times as long as without fast", stacklevel=2
        )
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    both = torch.cat([empty.expand_as(states), states])
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t).repeat(2, 1, 1, 1)
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=fast):
            free, guided = pipe.unet(scaled, t, both).sample.float().chunk(2)
        x = scheduler.step(free + guidance * (guided - free), t, x).prev_sample
    return x


@torch.inference_mode()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 18,
    guidance: float = 4.0,
    batch: int | None = None,
    fast: bool = False,
) -> np.ndarray:
    """One picture for each prompt and seed: uint8 [prompts, seeds, H, W, 3].

    The noise depends on the seed only, so pictures of one prompt and seed can be compared between models; the
    batch (None: what suits the device) changes them by rounding alone. Each distinct prompt is encoded once.
    """
    distinct = list(dict.fromkeys(prompts))
    pictures = draw(pipe, encode(pipe, distinct), seeds, steps, guidance, batch, fast)
    return pictures[[distinct.index(prompt) for prompt in prompts]]


@torch.inference_mode()
def draw(
    pipe: Any,
    states: Tensor,
    seeds: Sequence[int],
    steps: int = 18,
    guidance: float = 4.0,
    batch: int | None = None,
    fast: bool = False,
) -> np.ndarray:
    """As `generate`, of text states [n, length, width] in place of prompts: uint8 [n, seeds, H, W, 3]."""
    pairs = [(i, j) for i in range(len(states)) for j in range(len(seeds))]
    with torch.inference_mode(False), torch.no_grad():  # the weights stay such that gradients pass through them
        for part in (pipe.unet, pipe.vae):
            part.eval().to(memory_format=torch.channels_last)
    empty = encode(pipe, [""])
    noise = torch.stack([initial_noise(pipe, seed) for seed in seeds]).to(states.device)
    batch = batch or (CPU_BATCH if states.device.type == "cpu" else GPU_BATCH)
    drawn = []
    for start in range(0, len(pairs), batch):
        i, j = (list(index) for index in zip(*pairs[start : start + batch], strict=True))
        latent = denoise(pipe, states[i], empty, noise[j], steps, guidance, fast)
        latent = (latent / pipe.vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        drawn.append(to_uint8(pipe.vae.decode(latent).sample).cpu())
    pictures = torch.cat(drawn)
    return pictures.view(len(states), len(seeds), *pictures.shape[1:]).numpy()


def fingerprint(pipe: Any) -> str:
    """SHA-256 over every weight (as float32), the tokenizer's vocabulary and the configurations."""
    digest = hashlib.sha256()
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.float().contiguous().cpu().numpy())
    for config in (pipe.scheduler.config, pipe.vae.config, pipe.tokenizer.get_vocab()):
        kept = {key: value for key, value in config.items() if key != "_name_or_path"}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class PictureStore:
    """Pictures of one unedited model on disk, by prompt and seed, drawn when first asked for.

    The key holds the model's fingerprint, the steps, the guidance, the precision and the kind of a device that is no
    CPU, which rounds otherwise: an edited model shares no entry.
    """

    def __init__(self, pipe: Any, path: Path, steps: int = 18, guidance: float = 4.0, fast: bool = False) -> None:
        """Open or create the store at `path`; `pipe` must stay unedited."""
        self.pipe, self.steps, self.guidance, self.fast = pipe, steps, guidance, fast
        kind = pipe.unet.device.type
        self.key = f"{fingerprint(pipe)} {steps} {guidance}" + " bfloat16" * fast + f" {kind}" * (kind != "cpu")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, timeout=60)
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS pictures "
            "(key TEXT, prompt TEXT, seed INTEGER, shape TEXT, data BLOB, PRIMARY KEY (key, prompt, seed))"
        )

    def _find(self, prompt: str, seed: int) -> np.ndarray | None:
        query = "SELECT shape, data FROM pictures WHERE key = ? AND prompt = ? AND seed = ?"
        row = self.database.execute(query, (self.key, prompt, seed)).fetchone()
        return None if row is None else np.frombuffer(row[1], np.uint8).reshape(json.loads(row[0]))

    def get(self, prompts: Sequence[str], seeds: Sequence[int], chunk: int = 64) -> np.ndarray:
        """As `generate`; only what is missing is drawn, and saved after every `chunk` prompts."""
        wanted = dict.fromkeys(prompts)
        missing = [p for p in wanted if any(self._find(p, s) is None for s in seeds)]
        if missing and not self.key.startswith(fingerprint(self.pipe)):
            raise RuntimeError("the stored model was changed in place; edit a second pipeline instead")
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            drawn = generate(self.pipe, part, seeds, self.steps, self.guidance, fast=self.fast)
            rows = [
                (self.key, prompt, seed, json.dumps(picture.shape), picture.tobytes())
                for prompt, pictures in zip(part, drawn, strict=True)
                for seed, picture in zip(seeds, pictures, strict=True)
            ]
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)", rows)
        found = {p: np.stack([f for s in seeds if (f := self._find(p, s)) is not None]) for p in wanted}
        return np.stack([found[prompt] for prompt in prompts])
