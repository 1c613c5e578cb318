"""What the reference model reaches: concepts, styles and unseen aliases by the reporting judge, and a picture grid.

    python -m benchmarks.reference_model.figures --model emoji --json FIGURES.json --grid docs/emoji.png

Every concept is drawn from its plain label and from prompts with a style, four pictures of each with fixed seeds.
Of each alias there are two.
An unseen alias takes part where its concept reaches 0.95 and where the sentence encoder that taught the text encoder
ranks that concept's label first: names that even the teacher takes for something else say nothing about the model.
Most of them are nouns of WordNet, which the text encoder has read, never with a picture; the others have a line of
their own as well.
"""

import argparse
import json
import platform
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference_model.judge import Judge
from benchmarks.reference_model.pictures import DEFAULT_CACHE, write_atomically
from benchmarks.reference_model.sampler import generate, load_pipeline
from benchmarks.reference_model.splits import Split, find_wordnet
from benchmarks.reference_model.text_encoder import teach
from benchmarks.reference_model.texts import read_nouns, unseen_aliases
from realera_edit.hub import resolve
from realera_edit.metrics import Rate

SEEDS = (0, 1, 2, 3)
GUIDANCE = 2.0  # chosen by the development judge: more of it keeps the things and loses styles
SURE, WEAK = 0.95, 0.75


def understood(labels: Sequence[str], cache: Path) -> list[tuple[str, str]]:
    """(label, unseen alias) for each alias whose teacher's vector is nearest to that label's."""
    index = {label: i for i, label in enumerate(labels)}
    pairs = [(label, name) for label, names in unseen_aliases().items() if label in index for name in names]
    known = teach([label.lower() for label in labels], cache).float()
    near = (teach([name for _, name in pairs], cache).float() @ known.T).argmax(1).tolist()
    return [pair for pair, place in zip(pairs, near, strict=True) if place == index[pair[0]]]


def judged(pipe: Any, judge: Judge, prompts: Sequence[str], seeds: Sequence[int], fast: bool) -> tuple[Tensor, Tensor]:
    """Concept and style verdicts [prompts, seeds]."""
    pictures = generate(pipe, prompts, seeds, guidance=GUIDANCE, fast=fast)
    concept, style = judge(pictures.reshape(-1, *pictures.shape[2:]))
    return concept.view(len(prompts), -1), style.view(len(prompts), -1)


def rate(right: Tensor) -> dict[str, Any]:
    """Share, Wilson interval and count."""
    found = Rate(int(right.sum()), right.numel())
    return {"value": found.value, "interval": found.interval, "count": found.count}


def measure(pipe: Any, judge: Judge, cache: Path, fast: bool) -> dict[str, Any]:
    """All figures, with the weak concepts and the aliases by name."""
    labels, styles = judge.labels, judge.styles
    truth = torch.arange(len(labels))[:, None]
    plain, _ = judged(pipe, judge, [f"an emoji of a {label}" for label in labels], SEEDS, fast)
    own = plain == truth
    turns = [torch.tensor([(i + s) % len(styles) for i in range(len(labels))]) for s in range(4)]
    verdicts = []
    for seed, turn in zip(SEEDS, turns, strict=True):
        prompts = [f"a {styles[s]} emoji of a {label}" for s, label in zip(turn.tolist(), labels, strict=True)]
        verdicts.append(judged(pipe, judge, prompts, [seed], fast))
    styled = torch.cat([concept == truth for concept, _ in verdicts], 1)
    kept = torch.cat([style == turn[:, None] for (_, style), turn in zip(verdicts, turns, strict=True)], 1)
    reached = torch.cat([own, styled], 1).float().mean(1)
    names = [pair for pair in understood(labels, cache) if reached[judge.index[pair[0]]] >= SURE]
    drawn, _ = judged(pipe, judge, [f"an emoji of a {name}" for _, name in names], SEEDS[:2], fast)
    hits = drawn == torch.tensor([judge.index[label] for label, _ in names])[:, None]
    nouns = {noun.lemma for noun in read_nouns(find_wordnet(cache))}
    unread = torch.tensor([name not in nouns for _, name in names])
    return {
        "concept, plain label": rate(own),
        "concept, style prompts": rate(styled),
        "style": rate(kept),
        "unseen aliases": rate(hits),
        "those that are no noun": rate(hits[unread]),
        "concepts that reach 0.95": int((reached >= SURE).sum()),
        "weak": {labels[i]: float(reached[i]) for i in (reached < WEAK).nonzero().flatten().tolist()},
        "aliases": [[*pair, float(hit.float().mean())] for pair, hit in zip(names, hits, strict=True)],
    }


def grid(pipe: Any, judge: Judge, path: Path, fast: bool, columns: int = 10, scale: int = 1) -> None:
    """A hundred concepts, evenly picked, two of each style in turn."""
    from PIL import Image, ImageDraw, ImageFont

    picked = torch.linspace(0, len(judge.labels) - 1, 100).round().long().tolist()
    labels = [judge.labels[i] for i in picked]
    prompts = [f"a {judge.styles[i % len(judge.styles)]} emoji of a {label}" for i, label in enumerate(labels)]
    pictures = generate(pipe, prompts, [0], guidance=GUIDANCE, fast=fast)[:, 0]
    size = pictures.shape[1] * scale
    cell_x, cell_y = size + 32, size + 26
    sheet = Image.new("RGB", (columns * cell_x, cell_y * (len(labels) // columns)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for i, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
        left, top = i % columns * cell_x, i // columns * cell_y
        sheet.paste(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS), (left + 16, top + 2))
        pen.text((left + 4, top + size + 6), textwrap.shorten(label, 20), "black", font)
    sheet.save(path, optimize=True)


def table(found: Mapping[str, Any]) -> str:
    """The rates in lines."""
    lines = []
    for name, row in found.items():
        if isinstance(row, dict) and "interval" in row:
            low, high = row["interval"]
            lines.append(f"{name:<24} {row['value']:.3f} [{low:.3f}, {high:.3f}] n {row['count']}")
    weak = ", ".join(f"{label} {value:.2f}" for label, value in found["weak"].items())
    return "\n".join([*lines, f"under {WEAK}: {weak or 'none'}"])


def main() -> None:
    """Draw, judge, print, save."""
    import diffusers
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--which", choices=["development", "report"], default="report")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--fast", action="store_true", help="draw in bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, which, start = resolve(options.model), options.which, time.perf_counter()
    chosen: Split = which
    judge, pipe = Judge.load(chosen, model, options.cache), load_pipeline(model)
    if options.grid:
        grid(pipe, judge, options.grid, options.fast)
    found = measure(pipe, judge, options.cache, options.fast)
    print(table(found))
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers, np)}
    record = {
        "command": "python -m benchmarks.reference_model.figures " + " ".join(sys.argv[1:]),
        "judge": which,
        "seeds": SEEDS,
        "guidance": GUIDANCE,
        "bfloat16": options.fast,
        "versions": {"python": platform.python_version(), **versions},
        "threads": options.threads,
        "seconds": time.perf_counter() - start,
        **found,
    }
    if options.json:
        write_atomically(options.json, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
