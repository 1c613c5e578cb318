"""The loop that trains every part: resumable to the bit, averaged weights, a log, state in safetensors.

The batch of a step depends on the seed and the step alone, so a run that was killed goes on as if it had not been.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.reference_model.pictures import DEFAULT_CACHE, write_atomically

Loss = Callable[[torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """AdamW steps: warm-up, constant rate, then a cosine to zero over the last `decay` share of them."""

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.5
    weight_decay: float = 0.01
    average: float = 0.998
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        tail = self.steps * self.decay
        left = min(1.0, (self.steps - step) / tail) if tail else 1.0
        return self.rate * min(1.0, (step + 1) / self.warmup) * (1 - math.cos(math.pi * left)) / 2


class Trainer:
    """Trains one module; `average` holds the exponential mean of its weights, which is what ships.

    The state at `path` belongs to one recipe (schedule and `recipe`): another one is an error, not a restart.
    """

    def __init__(self, module: nn.Module, schedule: Schedule, path: Path, recipe: dict[str, Any] | None = None) -> None:
        """Start anew, or from the state at `path` if there is one."""
        self.module, self.schedule, self.path, self.step = module, schedule, path, 0
        self.parameters = dict(module.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), schedule.rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay, fused=True
        )
        described = json.dumps([dataclasses.asdict(schedule), recipe or {}], sort_keys=True)
        self.recipe = hashlib.sha256(described.encode()).hexdigest()
        if path.exists():
            self._read()

    def _read(self) -> None:
        with safe_open(self.path, "pt") as file:
            meta = file.metadata()
            if meta["recipe"] != self.recipe:
                raise ValueError(f"{self.path} was trained by another recipe; remove it to start anew")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step = int(meta["step"])
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state[f"weight.{name}"])
                self.average[name].copy_(state[f"average.{name}"])
                self.optimizer.state[value] = {
                    "step": torch.tensor(float(self.step), device=value.device),
                    # in the weight's own memory format: the fused optimiser walks all of them as they lie
                    "exp_avg": torch.empty_like(value).copy_(state[f"first.{name}"]),
                    "exp_avg_sq": torch.empty_like(value).copy_(state[f"second.{name}"]),
                }

    def save(self) -> None:
        """Write weights, averages and optimiser moments."""
        state = {}
        for name, value in self.parameters.items():
            moments = self.optimizer.state[value]
            parts = {
                "weight": value.detach(),
                "average": self.average[name],
                "first": moments["exp_avg"],
                "second": moments["exp_avg_sq"],
            }
            state |= {f"{part}.{name}": tensor.contiguous() for part, tensor in parts.items()}
        write_atomically(self.path, save(state, {"step": str(self.step), "recipe": self.recipe}))

    def _advance(self, loss: Loss) -> float:
        generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step)
        value = loss(generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{self.path.stem}: the gradient of step {self.step} is not finite")
        self.optimizer.step()
        self.step += 1
        keep = min(self.schedule.average, self.step / (self.step + 10))
        with torch.no_grad():
            names = list(self.average)
            targets = [self.average[name] for name in names]
            torch._foreach_lerp_(targets, [self.parameters[name] for name in names], 1 - keep)
        return value.item()  # also waits for the device, so that the log's seconds are true

    def run(self, loss: Loss, until: int | None = None, every: int = 50, save_every: int = 250) -> list[float]:
        """Go on to step `until` (the schedule's end by default); return the losses of these steps."""
        end, losses, start, first = until or self.schedule.steps, [], time.perf_counter(), self.step
        while self.step < end:
            losses.append(self._advance(loss))
            if self.step % every == 0 or self.step == end:
                recent = losses[-every:]
                speed = (time.perf_counter() - start) / (self.step - first)
                mean = sum(recent) / len(recent)
                print(f"{self.path.stem} {self.step}/{end} loss {mean:.4f}, {speed:.3f} s a step", flush=True)
            if self.step % save_every == 0 or self.step == end:
                self.save()
        return losses

    def finish(self) -> None:
        """Put the averaged weights into the module."""
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(self.average[name])


def command(description: str, train: Callable[[Path], Any]) -> None:
    """The command line of one part's training."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.cache)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device


def best_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16(kind: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32; a processor without it is many times slower."""
    return torch.cpu._is_avx512_bf16_supported() if kind == "cpu" else True


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """bfloat16 for the matrix products, where the device has it."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=has_bfloat16(kind))
