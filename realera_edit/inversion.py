"""Gradient textual inversion against an edited model: what a learned word can still bring back.

One input embedding of the text encoder is fitted to pictures of the concept by the denoiser's own loss, everything else
stays as it is (textual inversion, arXiv 2208.01618; against erased models, arXiv 2310.12508 and 2308.01508). It needs
gradients and minutes where the closed-form attacks need neither, and it is the stronger: a word that was never in the
vocabulary is no word that an edit has seen. Whether it draws the concept again is for a judge.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, ConfigError, EncodingError
from .files import write_atomically
from .probe import widened

TEMPLATES = ("{}", "a picture of a {}", "a drawing of a {}", "an icon of a {}")
# Noise levels that are drawn: what a picture shows is decided early, its last details say nothing about a concept.
EARLIEST, LATEST = 0.2, 1.0


@dataclass(frozen=True)
class Inversion:
    """A learned word. `vector` [d] takes the place of the token `start` in a prompt; `losses`: one a step."""

    vector: Tensor
    start: str
    losses: tuple[float, ...]

    def save(self, path: str | Path, token: str = "<erased>") -> Path:
        """Write it as `pipe.load_textual_inversion(path)` reads it; the prompt then says `token`. `CheckpointError`."""
        from safetensors.torch import save

        path = Path(path)
        about = {"realera_edit_inversion": json.dumps({"start": self.start, "losses": self.losses})}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({token: self.vector[None].contiguous()}, about))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read what `save` wrote. Raises `CheckpointError`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["realera_edit_inversion"])
                (token,) = file.keys()
                return cls(file.get_tensor(token)[0], str(about["start"]), tuple(map(float, about["losses"])))
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(f"{path}: not a learned word of realera-edit: {first}") from error


def invert(
    pipe: Any,
    pictures: Tensor,
    *,
    start: str = "object",
    steps: int = 400,
    rate: float = 0.01,
    batch: int = 8,
    seed: int = 0,
    templates: Sequence[str] = TEMPLATES,
    progress: Callable[[int, float], None] | None = None,
) -> Inversion:
    """Fit a word to `pictures`, uint8 [n, H, W, 3] in the pipeline's own size. The pipeline is not changed.

    `start`: the word whose embedding it begins with, one token; the learned norm is free. `progress` is called with
    each step and its loss. Raises `ConfigError`, `EncodingError`, `CheckpointError`.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != torch.uint8 or not len(pictures):
        raise ConfigError(f"pictures: expected uint8 [n, H, W, 3], found {pictures.dtype} {list(pictures.shape)}")
    if steps < 1 or batch < 1 or not rate > 0:
        raise ConfigError(f"steps {steps}, batch {batch}, rate {rate}: expected positive numbers")
    place = start_token(pipe, start)
    latents = _latents(pipe, pictures)
    ids = _ids(pipe, [template.format(start) for template in templates])
    table = pipe.text_encoder.get_input_embeddings().weight
    vector = table[place].detach().clone().float().requires_grad_(True)
    optimizer = torch.optim.Adam([vector], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    alphas = pipe.scheduler.alphas_cumprod.to(latents.device)
    losses = []
    with _frozen(pipe.text_encoder, pipe.unet), word(pipe, start, vector):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            states = pipe.text_encoder(ids[torch.randint(len(ids), (batch,), generator=generator)])[0]
            clean = latents[torch.randint(len(latents), (batch,), generator=generator)]
            loss = _loss(pipe, states, clean, alphas, generator)
            (vector.grad,) = torch.autograd.grad(loss, [vector])
            if not bool(torch.isfinite(vector.grad).all()):
                raise CheckpointError(f"step {step}: the gradient is not finite; run the attack in float32")
            optimizer.step()
            losses.append(loss.item())
            if progress is not None:
                progress(step, losses[-1])
    return Inversion(vector.detach(), start, tuple(losses))


@torch.no_grad()
def denoising_error(
    pipe: Any, pictures: Tensor, prompts: Sequence[str], *, draws: int = 4, batch: int = 16, seed: int = 0
) -> float:
    """The denoiser's mean squared error on `pictures`, uint8 [n, H, W, 3], with `prompts` in turn.

    Each picture is met at `draws` noise levels; levels and noise depend on `seed` alone, so two models or words are
    compared on the same ones.
    """
    latents, ids = _latents(pipe, pictures).repeat(draws, 1, 1, 1), _ids(pipe, prompts)
    generator, alphas = torch.Generator().manual_seed(seed), pipe.scheduler.alphas_cumprod.to(latents.device)
    total = 0.0
    for at in range(0, len(latents), batch):
        clean = latents[at : at + batch]
        states = pipe.text_encoder(ids)[0][torch.arange(at, at + len(clean)) % len(ids)]
        total += len(clean) * float(_loss(pipe, states, clean, alphas, generator))
    return total / len(latents)


def turned(pictures: Tensor, *, back: bool = False) -> Tensor:
    """Pictures [n, H, W, 3] upside down with their colours rotated (red as green, green as blue); `back` undoes it.

    The control of an inversion: no prompt draws these, though they have every line and every grey of the concept. How
    often a word learned from them draws them, turned back before they are judged, is what pictures alone can teach.
    """
    return pictures.flip(1).roll(-1 if back else 1, 3)


@contextlib.contextmanager
def word(pipe: Any, start: str, vector: Tensor) -> Iterator[None]:
    """Within it, every occurrence of the token `start` in a prompt reads `vector` [d]."""
    place = start_token(pipe, start)

    def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == place)[..., None], vector.to(output), output)

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def start_token(pipe: Any, start: str) -> int:
    """The id of a word that is one token. Raises `EncodingError`; `CheckpointError` for pipelines of two encoders."""
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise CheckpointError(
            "textual inversion is for pipelines of one text encoder, such as Stable Diffusion 1.x, 2.x"
        )
    ids = pipe.tokenizer(start, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise EncodingError(f"{start!r} is {len(ids)} tokens; start from a word that is one token of this tokenizer")
    return int(ids[0])


def _ids(pipe: Any, prompts: Sequence[str]) -> Tensor:
    tokens = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids.to(pipe.text_encoder.device)
    return ids


@torch.no_grad()
def _latents(pipe: Any, pictures: Tensor) -> Tensor:
    """Scaled latent means, float32 [n, c, h, w]."""
    x = pictures.to(pipe.vae.device).permute(0, 3, 1, 2).to(pipe.vae.dtype) / 127.5 - 1
    latents: Tensor = pipe.vae.encode(x).latent_dist.mean.float() * pipe.vae.config.scaling_factor
    return latents


def _loss(pipe: Any, states: Tensor, clean: Tensor, alphas: Tensor, generator: torch.Generator) -> Tensor:
    """The denoiser's own error, for epsilon and v-prediction; noise is drawn on the CPU, the same for every device."""
    low, high = int(EARLIEST * len(alphas)), int(LATEST * len(alphas))
    t = torch.randint(low, high, (len(clean),), generator=generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    signal, sigma = (a.sqrt()[:, None, None, None] for a in (alphas[t], 1 - alphas[t]))
    noisy = widened((signal * clean + sigma * noise).to(pipe.unet.dtype), int(pipe.unet.config.in_channels))
    kind = pipe.scheduler.config.prediction_type
    wanted = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}.get(kind)
    if wanted is None:
        raise CheckpointError(f"scheduler: prediction_type {kind!r} is not known")
    drawn: Tensor = pipe.unet(noisy, t, encoder_hidden_states=states.to(pipe.unet.dtype)).sample
    return (drawn.float() - wanted).square().mean()


@contextlib.contextmanager
def _frozen(*modules: Any) -> Iterator[None]:
    """No gradients of weights, and evaluation mode; both are put back."""
    parameters = [p for module in modules for p in module.parameters()]
    wanted, modes = [p.requires_grad for p in parameters], [module.training for module in modules]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in modules:
            module.eval()
        yield
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
