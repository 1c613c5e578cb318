"""The reference model's U-Net: v-prediction on 8 x 8 latents, cross-attention to the text at both resolutions.

`python -m benchmarks.reference_model.denoiser` trains it on the latents and the text states that the trained
autoencoder and text encoder give; both stay as they are.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_model import text_encoder, vae
from benchmarks.reference_model.pictures import DEFAULT_CACHE, load
from benchmarks.reference_model.texts import captions, shown_aliases
from benchmarks.reference_model.training import Loss, Schedule, Trainer, autocast, best_device, command, device_of

SCHEDULE = Schedule(steps=5000, rate=8e-4, warmup=200, decay=0.6, average=0.998, seed=3)
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a batch is made of, and how its errors are weighed.

    empty, plain, label: shares of captions left out, for classifier-free guidance; without a style; with the label, not
    an alias. jitter: most noise on the text states, relative: words near a caption's words should draw the same. gamma:
    of the min-SNR weights (arXiv 2303.09556); None weighs every step's v-error the same. late: step t is drawn in
    proportion to this power of t; 0 draws all of them equally often.
    """

    empty: float = 0.1
    plain: float = 0.4
    label: float = 0.7
    jitter: float = 0.1
    gamma: float | None = 5.0
    late: float = 0.0


RECIPE = Recipe()


def scheduler() -> Any:
    """DDIM, v-prediction, Stable Diffusion's betas."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build(seed: int = 0) -> Any:
    """An untrained UNet2DConditionModel, channels last in memory."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=vae.SIZE // 8,
        in_channels=vae.CHANNELS,
        out_channels=vae.CHANNELS,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=text_encoder.WIDTH,
        attention_head_dim=4,
    )
    return unet.to(memory_format=torch.channels_last)


@dataclasses.dataclass(frozen=True)
class Data:
    """Latents float32 [concepts, styles, c, 8, 8]; states bfloat16 [captions, length, width], the empty one first.

    `rows[i][k]` lists concept i's captions: k = 0 without style, k > 0 in style k - 1; the first `labels[i][k]` of
    them use its label.
    """

    latents: Tensor
    states: Tensor
    rows: list[list[range]]
    labels: list[list[int]]


@torch.inference_mode()
def text_states(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 512) -> Tensor:
    """Last hidden states, bfloat16 [texts, length, width]."""
    parts = []
    for start in range(0, len(texts), batch):
        ids, _ = text_encoder.tokenize(tokenizer, texts[start : start + batch])
        with autocast(device_of(model)):
            parts.append(model(input_ids=ids).last_hidden_state.bfloat16())
    return torch.cat(parts)


def load_data(cache: Path, encoder: Any, tokenizer: Any, autoencoder: Any, names: Mapping[str, Sequence[str]]) -> Data:
    """Encode every picture and every caption once; `names`: further names of each label."""
    concepts, texts = load(cache, vae.SIZE).concepts, [""]
    rows, labels = [], []
    for concept in concepts:
        found = captions([concept.label.lower(), *names.get(concept.label, ())])
        first = [len(row) for row in captions([concept.label.lower()])]
        ranges = []
        for row in found:
            ranges.append(range(len(texts), len(texts) + len(row)))
            texts += row
        rows.append(ranges)
        labels.append(first)
    latents = vae.encode(autoencoder, vae.flat_pictures(cache))
    shape = (len(concepts), -1, *latents.shape[1:])
    return Data(latents.view(shape), text_states(encoder, tokenizer, texts), rows, labels)


def pick_captions(data: Data, concepts: Tensor, styles: Tensor, draw: random.Random, recipe: Recipe) -> Tensor:
    """A caption's index for each picture (concept, style)."""
    picked = []
    for concept, style in zip(concepts.tolist(), styles.tolist(), strict=True):
        kind = 0 if draw.random() < recipe.plain else style + 1
        row, labels = data.rows[concept][kind], data.labels[concept][kind]
        among = row[:labels] if len(row) == labels or draw.random() < recipe.label else row[labels:]
        picked.append(0 if draw.random() < recipe.empty else draw.choice(among))
    return torch.tensor(picked)


def step_weights(alphas: Tensor, gamma: float | None) -> Tensor:
    """The weight of each step's v-error, mean 1."""
    if gamma is None:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=gamma) / (snr + 1)
    return weights / weights.mean()


def batch_loss(unet: Any, data: Data, batch: int, recipe: Recipe = RECIPE) -> Loss:
    """The weighted v-prediction error of random pictures, captions, steps and noise."""
    alphas = scheduler().alphas_cumprod
    weights = step_weights(alphas, recipe.gamma)
    count, styles = data.latents.shape[:2]
    device = device_of(unet)

    def loss(generator: torch.Generator) -> Tensor:
        concept = torch.randint(count, (batch,), generator=generator)
        style = torch.randint(styles, (batch,), generator=generator)
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        states = data.states[pick_captions(data, concept, style, draw, recipe)].float()
        level = recipe.jitter * torch.rand(batch, 1, 1, generator=generator)
        states = states + level * states.std() * torch.randn(states.shape, generator=generator)
        clean = data.latents[concept, style]
        noise = torch.randn(clean.shape, generator=generator)
        # one step from each of `batch` equally likely parts of the schedule: less variance than independent ones
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        t = (t ** (1 / (1 + recipe.late)) * len(alphas)).long().clamp(max=len(alphas) - 1)
        t = t[torch.randperm(batch, generator=generator)]
        signal, sigma = (a.sqrt()[:, None, None, None] for a in (alphas[t], 1 - alphas[t]))
        noisy = (signal * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            v = unet(noisy.to(device), t.to(device), states.to(device)).sample
        error = (v.float() - (signal * noise - sigma * clean).to(device)).square().mean((1, 2, 3))
        return (weights[t].to(device) * error).mean()

    return loss


def trainer(
    cache: Path,
    schedule: Schedule = SCHEDULE,
    name: str = "unet",
    recipe: Recipe = RECIPE,
    unet: Any = None,
    start: str = "",
) -> Trainer:
    """The trainer of a new U-Net, or of `unet`, known by `start`; at the state that the cache holds."""
    from diffusers.models.attention_processor import AttnProcessor

    described = {"batch": BATCH, **dataclasses.asdict(recipe)} | ({"start": start} if start else {})
    unet = (build(schedule.seed) if unet is None else unet).to(best_device(), memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the fused one is slower here: its backward pass suits long sequences
    return Trainer(unet, schedule, cache / "training" / f"{name}.safetensors", described)


def train(cache: Path = DEFAULT_CACHE, schedule: Schedule = SCHEDULE, until: int | None = None) -> Any:
    """The trained U-Net."""
    run = trainer(cache, schedule)
    if run.step < (until or schedule.steps):
        encoder, autoencoder = text_encoder.train(cache).model, vae.train(cache)
        tokenizer = text_encoder.load_tokenizer(cache / "training" / "tokenizer")
        data = load_data(cache, encoder, tokenizer, autoencoder, shown_aliases())
        run.run(batch_loss(run.module, data, BATCH), until)
    run.finish()
    return run.module.eval().cpu()


if __name__ == "__main__":
    command("Train the U-Net.", train)
