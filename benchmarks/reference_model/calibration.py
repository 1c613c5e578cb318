"""How far a judge can be trusted: its accuracy on real, reconstructed and generated pictures.

python -m benchmarks.reference_model.calibration --model CHECKPOINT --which development
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reference_model.judge import RECIPES, Judge, load_data, pictures_of, reconstruct
from benchmarks.reference_model.pictures import DEFAULT_CACHE
from benchmarks.reference_model.splits import Split
from realera_edit.hub import resolve

Row = tuple[str, int, float, float]


def _share(answer: Tensor, truth: Tensor) -> float:
    return (answer == truth).float().mean().item()


def _reconstructed_rows(judge: Judge, model: Path, cache: Path) -> list[Row]:
    data, (_, full, vae) = load_data(model, cache), pictures_of(model, cache)
    generator = torch.Generator().manual_seed(987)
    sets = {"real": data.real}
    for level in (0.0, 0.15, 0.3):
        levels = torch.full((len(data.real),), level)
        sets[f"reconstructed, noise {level}"] = reconstruct(vae, full, levels, generator)
    answers = {name: judge(images) for name, images in sets.items()}
    return [
        (name, len(data.real), _share(concept, data.concept), _share(style, data.style))
        for name, (concept, style) in answers.items()
    ]


def _generated_rows(judge: Judge, model: Path, sample: int, seeds: Sequence[int]) -> list[Row]:
    from benchmarks.reference_model.sampler import generate, load_pipeline

    pipe = load_pipeline(model)
    chosen = range(0, len(judge.labels), max(1, math.ceil(len(judge.labels) / sample)))
    styles = torch.arange(len(chosen)) % len(judge.styles)
    plain = [f"an emoji of a {judge.labels[i]}" for i in chosen]
    styled = [f"a {judge.styles[s]} emoji of a {judge.labels[i]}" for s, i in zip(styles, chosen, strict=True)]
    pictures = generate(pipe, plain + styled, seeds)
    concept, style = judge(pictures.reshape(-1, *pictures.shape[2:]))
    truth = torch.tensor(chosen).repeat_interleave(len(seeds))
    count = len(truth)
    right = _share(style[count:], styles.repeat_interleave(len(seeds)))
    return [
        ("generated, plain", count, _share(concept[:count], truth), math.nan),
        ("generated, with style", count, _share(concept[count:], truth), right),
    ]


def calibrate(which: Split, model: Path, cache: Path, sample: int, seeds: Sequence[int]) -> list[Row]:
    """Rows (pictures, count, concept accuracy, style accuracy): real, reconstructed afresh, generated."""
    judge = Judge.load(which, model, cache)
    rows = _reconstructed_rows(judge, model, cache)
    return rows + _generated_rows(judge, model, sample, seeds)


def main() -> None:
    """Print one line for each kind of picture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder with concepts.json, or emoji")
    parser.add_argument("--which", choices=list(RECIPES), default="development")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--sample", type=int, default=60, help="concepts to draw")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for row in calibrate(options.which, resolve(options.model), options.cache, options.sample, range(4)):
        print("{:<28}{:>6} concept {:.3f} style {:.3f}".format(*row))


if __name__ == "__main__":
    main()
