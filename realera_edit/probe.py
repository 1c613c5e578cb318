"""Words that a model draws like a name: what its denoiser answers to them, not what their text states look like.

Captions teach a model words that are no likeness of the name in the text space: on the model that ships, "hail" draws
the oncoming taxi. The text states of such words lie anywhere; the denoiser's outputs tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .embeddings import PromptEncoder
from .errors import CheckpointError
from .vocabulary import load_ends, similarity, whole_words

# Where the content of a picture is decided: this share of the noise schedule.
TIME = 0.85
STEPS = 1000  # of a schedule that does not say
# Latent positions in one batch: what fits a CPU's caches, and what fills a GPU.
CPU_POSITIONS, GPU_POSITIONS, MOST_ROWS = 32768, 131072, 64
# Channels of an inpainting model's input: a latent, a mask and the latent of the masked picture.
INPAINTING = 9
# The most frequent whole words; to encode them takes about as long as the prior.
VOCABULARY = 10_000
# Least cosine of two answers that count as one picture (docs/evaluation.md).
ALIKE = 0.8


@dataclass(frozen=True)
class Probe:
    """The U-Net of a pipeline, asked what a prompt draws.

    The answer to p is what p adds to the output, f(z, t, p) - f(z, t, ""): the direction of classifier-free guidance,
    on one noise z at one noisy step t of `timesteps`. Two prompts whose answers have a cosine near one are drawn alike,
    however far apart their text states are.
    """

    unet: Any
    timesteps: int = STEPS

    @classmethod
    def of(cls, pipe: Any) -> Probe:
        """The U-Net of a loaded pipeline, as it is now."""
        schedule = getattr(getattr(pipe, "scheduler", None), "config", {})
        return cls(pipe.unet, int(schedule.get("num_train_timesteps", STEPS)))

    def answers(
        self, encoder: PromptEncoder, prompts: Sequence[str], progress: Callable[[int], object] = lambda done: None
    ) -> Tensor:
        """The answers [prompts, elements] at length one, float32 on the CPU. Raises `CheckpointError` for NaN.

        `progress` is called with the number of prompts done. The U-Net is left as it was.
        """
        noise = self._noise()
        positions = CPU_POSITIONS if next(self.unet.parameters()).device.type == "cpu" else GPU_POSITIONS
        rows = max(1, min(MOST_ROWS, positions // noise[0, 0].numel()))
        found: list[Tensor] = []
        with _running(self.unet):
            nothing = self._outputs(encoder, [""], noise)
            for at in range(0, len(prompts), rows):
                outputs = self._outputs(encoder, prompts[at : at + rows], noise)
                found.append(torch.nn.functional.normalize(outputs - nothing, dim=1))
                progress(min(at + rows, len(prompts)))
        result = torch.cat(found) if found else nothing[:0]
        if not bool(torch.isfinite(result).all()):
            raise CheckpointError("the U-Net answers with NaN: its weights or its precision are not sound")
        return result

    def _noise(self) -> Tensor:
        """The input [1, channels, height, width], the same each time; pictures beside the latent are of nothing."""
        config, sample = self.unet.config, self.unet.config.sample_size or 64
        height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
        shape = (1, int(config.out_channels), int(height), int(width))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return widened(noise, int(config.in_channels))

    def _outputs(self, encoder: PromptEncoder, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """U-Net outputs [prompts, elements], float32 on the CPU."""
        # a memory of its own: whole prompts, padding and all, are large
        encoded = replace(encoder, _known={}).encode(prompts, encoder.max_length)
        weight = next(p for p in self.unet.parameters() if p.is_floating_point())
        states = torch.stack([e.states for e in encoded]).to(weight)
        more: dict[str, Any] = {}
        if encoded[0].pooled is not None and getattr(self.unet.config, "addition_embed_type", None) == "text_time":
            pooled = torch.stack([e.pooled for e in encoded if e.pooled is not None]).to(weight)
            size = _time_ids(self.unet.config, pooled.shape[1], 8.0 * noise.shape[2], 8.0 * noise.shape[3])
            ids = torch.tensor(size).to(weight).expand(len(pooled), -1)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        if getattr(self.unet, "class_embedding", None) is not None:
            more["class_labels"] = torch.zeros(len(states), dtype=torch.long, device=weight.device)
        latents = noise.to(weight).expand(len(states), -1, -1, -1)
        step = int(TIME * self.timesteps)
        output = self.unet(latents, step, encoder_hidden_states=states, return_dict=False, **more)[0]
        flat: Tensor = output.flatten(1).to("cpu", torch.float32)
        return flat


def widened(latents: Tensor, channels: int) -> Tensor:
    """Latents [n, c, height, width] and what else a U-Net of so many input channels reads beside them.

    Of an inpainting model a mask by which all is to be drawn; pictures are of nothing.
    """
    if not (more := channels - latents.shape[1]):
        return latents
    extra = latents.new_zeros(len(latents), more, *latents.shape[2:])
    extra[:, 0] = float(channels == INPAINTING)
    return torch.cat([latents, extra], 1)


def _time_ids(config: Any, pooled: int, height: float, width: float) -> list[float]:
    """SDXL's size conditions, of a picture that is neither scaled nor cropped; its refiner reads a score in place of
    the last two.
    """
    count = (int(config.projection_class_embeddings_input_dim) - pooled) // int(config.addition_time_embed_dim)
    return [height, width, 0.0, 0.0, height, width] if count == 6 else [height, width, 0.0, 0.0, 6.0]


@contextlib.contextmanager
def _running(unet: Any) -> Iterator[None]:
    """Meanwhile the U-Net only runs, deterministically."""
    training = unet.training
    try:
        unet.eval()
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        unet.train(training)


@dataclass(frozen=True)
class WordFinder:
    """Finds vocabulary words that a pipeline draws like a name.

    `among`: how many it is asked about for each name; 0 finds none, and encodes nothing.
    """

    probe: Probe
    encoder: PromptEncoder
    among: int
    progress: Callable[[str, int, int], object] | None = None

    @cached_property
    def _vocabulary(self) -> tuple[list[str], Tensor]:
        words = whole_words(self.encoder.pairs[0][0], VOCABULARY)
        return words, load_ends(self.encoder, words, self.encoder.fingerprint())

    def __call__(self, name: str) -> list[str]:
        """The words whose answers have a cosine of `ALIKE` or more with the name's.

        The denoiser is asked about the words nearest to the name by end state. Of those that it draws alike the one
        that is furthest from the name comes first: an edit takes the near ones along, and they tell less.
        """
        if not self.among:
            return []
        words, ends = self._vocabulary
        [own] = self.encoder.encode([name])
        end = own.states[len(own.ids) - 1][None].cpu()
        near = similarity(end, ends, ends.mean(0))[0].topk(min(self.among, len(words))).indices.tolist()
        told, label = self.progress, f"asking about {name}"
        prompts = [name, *(words[place] for place in near)]
        answers = self.probe.answers(
            self.encoder, prompts, (lambda done: told(label, done, len(prompts))) if told else lambda done: None
        )
        alike = (answers[1:] @ answers[0] >= ALIKE).tolist()
        return [words[place] for place, good in zip(reversed(near), reversed(alike), strict=True) if good]
