"""The reference model's autoencoder: 64 x 64 pictures to 8 x 8 x 8 latents, trained on the picture set.

`python -m benchmarks.reference_model.vae` trains it. Each latent channel ends with mean 0 and standard deviation 1
over the set, which is folded into the 1 x 1 convolutions around it, so the scaling factor is 1.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reference_model.pictures import DEFAULT_CACHE, load
from benchmarks.reference_model.training import Loss, Schedule, Trainer, autocast, best_device, command, device_of
from realera_edit.judges import to_input

SIZE, CHANNELS = 64, 8
SCHEDULE = Schedule(steps=3200, rate=1.2e-3, warmup=100, decay=0.7, seed=2)
FINE = Schedule(steps=900, rate=6e-4, warmup=50, decay=0.9, average=0.99, seed=4)  # the same with `colour_loss` added
BATCH = 24
NOISE = 0.1  # fixed latent noise in training; a learned one drowns the signal at the start
COLOUR = 3.0
SHRINK = 1e-3  # keeps latents near 1, or their growth would escape the noise


def build(seed: int = 0) -> Any:
    """An untrained AutoencoderKL, channels last in memory."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    widths = (32, 64, 128, 128)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=CHANNELS,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def flat_pictures(cache: Path = DEFAULT_CACHE) -> Tensor:
    """uint8 [concepts * styles, 64, 64, 3], the styles of a concept together."""
    return torch.from_numpy(load(cache, SIZE).pictures).flatten(0, 1)


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures mirrored half of the time and moved up to 3 pixels; what comes in is white."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    top, left = torch.randint(7, (2,), generator=generator).tolist()
    padded = F.pad(x, (3, 3, 3, 3), value=1.0)
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def difference_loss(drawn: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of the pixels, and of their differences along both axes."""
    error = drawn.float() - x
    along = [error.diff(dim=axis).abs().mean() for axis in (2, 3)]
    return error.abs().mean() + sum(along, torch.zeros((), device=x.device))


def colour_loss(drawn: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of 4 x 4 areas: the absolute error of pixels alone leaves rare colours gray."""
    return F.avg_pool2d(drawn.float() - x, 4).abs().mean()


def batch_loss(vae: Any, pictures: Tensor, batch: int, colour: float = 0.0) -> Loss:
    """The loss of a random batch; `colour` weighs `colour_loss`."""
    device = device_of(vae)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        x = shift(to_input(pictures[rows]), generator).contiguous(memory_format=torch.channels_last)
        x = x.to(device)
        with autocast(device):
            latent = vae.encode(x).latent_dist.mean.float()
            noisy = latent + NOISE * torch.randn(latent.shape, generator=generator).to(device)
            drawn = vae.decode(noisy).sample
        return difference_loss(drawn, x) + colour * colour_loss(drawn, x) + SHRINK * latent.square().mean()

    return loss


@torch.inference_mode()
def encode(vae: Any, pictures: Tensor, batch: int = 100) -> Tensor:
    """Latent means, float32 [n, channels, 8, 8], of uint8 pictures [n, 64, 64, 3]."""
    parts = []
    for part in pictures.split(batch):
        x = to_input(part).contiguous(memory_format=torch.channels_last)
        parts.append(vae.encode(x).latent_dist.mean.float().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def normalize(vae: Any, pictures: Tensor) -> None:
    """Give each latent channel mean 0 and standard deviation 1; the decoder draws what it drew before."""
    latent = encode(vae, pictures)
    mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:CHANNELS].div_(std[:, None, None, None])
    inner.bias[:CHANNELS].sub_(mean).div_(std)
    inner.weight[CHANNELS:].zero_()  # the second half is the log variance, which was not trained
    inner.bias[CHANNELS:].fill_(2 * math.log(NOISE / std.mean()))
    outer.bias.add_(outer.weight.flatten(1) @ mean)
    outer.weight.mul_(std[:, None, None])


def trainer(cache: Path, schedule: Schedule = SCHEDULE, name: str = "vae") -> Trainer:
    """The autoencoder's trainer, at the state that the cache holds."""
    recipe = {"batch": BATCH, "noise": NOISE, "shrink": SHRINK}
    return Trainer(build(schedule.seed).to(best_device()), schedule, cache / "training" / f"{name}.safetensors", recipe)


def train(cache: Path = DEFAULT_CACHE, schedule: Schedule = SCHEDULE, until: int | None = None) -> Any:
    """The trained autoencoder, with normalised latents."""
    pictures = flat_pictures(cache)
    run = trainer(cache, schedule)
    run.run(batch_loss(run.module, pictures, BATCH), until)
    run.finish()
    fine = Trainer(run.module, FINE, cache / "training" / "vae_fine.safetensors", {"colour": COLOUR})
    fine.run(batch_loss(run.module, pictures, BATCH, COLOUR), until)
    fine.finish()
    normalize(run.module.eval().cpu(), pictures)
    return run.module


if __name__ == "__main__":
    command("Train the autoencoder.", train)
