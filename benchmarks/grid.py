"""A picture grid before and after an edit: one row for each prompt, seeds before on the left, after on the right.

`python -m benchmarks.grid --model DIR --erase "cat face" --rows "cat face" "dog face" pizza --out docs/cat.png`
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reference_model.sampler import generate, load_pipeline

CELL = 96  # pixels of a picture on the sheet, about
TEMPLATE = "an emoji of a {}"
_MARGIN, _LABEL, _HEAD, _GAP, _FONT = 12, 190, 40, 28, 15


def draw(
    labels: Sequence[str],
    notes: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    title: str,
    scale: int | None = None,
) -> Any:
    """The grid as a PIL image. `before`, `after` uint8 [rows, seeds, H, W, 3]; `notes`: a small line per label."""
    from PIL import Image, ImageDraw, ImageFont

    rows, seeds, height, width = before.shape[:4]
    scale = scale or max(1, round(CELL / height))
    cell_x, cell_y = width * scale + 2, height * scale + 2
    half = seeds * cell_x
    canvas = Image.new("RGB", (_LABEL + 2 * half + _GAP + _MARGIN, _HEAD + rows * cell_y + _MARGIN), "white")
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT), ImageFont.load_default(_FONT - 3)
    pen.text((_MARGIN, 12), title, "black", font)
    sides = ((_LABEL, before, "before"), (_LABEL + half + _GAP, after, "after"))
    for left, pictures, name in sides:
        pen.text((left, 12), name, "black", font)
        for row in range(rows):
            for seed in range(seeds):
                picture = Image.fromarray(pictures[row, seed]).resize(
                    (width * scale, height * scale), Image.Resampling.NEAREST
                )
                canvas.paste(picture, (left + seed * cell_x, _HEAD + row * cell_y))
    for row, (label, note) in enumerate(zip(labels, notes, strict=True)):
        top = _HEAD + row * cell_y + cell_y // 2 - 18
        pen.text((_MARGIN, top), textwrap.shorten(label, 24), "black", font)
        pen.text((_MARGIN, top + 18), textwrap.shorten(note, 30), "gray", small)
    return canvas


def edit_and_draw(options: argparse.Namespace) -> Any:
    """Draw every row with the unedited model, edit it, and draw again."""
    from realera_edit import edit_model

    rows = [row.partition(":")[::2] for row in options.rows]
    labels = [label.strip() for label, _ in rows]
    prompts = [options.template.format(label) for label in labels]
    pipe = load_pipeline(options.model)
    sampling = {"steps": options.steps, "guidance": options.guidance}
    before = generate(pipe, prompts, options.seeds, **sampling)
    edit_model(pipe, options.erase, target=options.target, preserve=options.preserve)
    after = generate(pipe, prompts, options.seeds, **sampling)
    shown = ", ".join(options.erase[:2]) + (f" and {len(options.erase) - 2} more" if len(options.erase) > 2 else "")
    title = textwrap.shorten(f"erased: {shown}", 26)
    return draw(labels, [note.strip() for _, note in rows], before, after, title, options.scale)


def main() -> None:
    """Parse, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a folder, or emoji")
    add("--erase", action="append", required=True, help="a concept to erase; repeatable")
    add("--target", help="what the concepts become")
    add("--preserve", action="append", default=[], help="a concept that must stay; repeatable")
    add("--rows", nargs="+", required=True, help='labels to draw, each "label" or "label: a note beside it"')
    add("--template", default=TEMPLATE, help="prompt of a label  [default: %(default)s]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    add("--steps", type=int, default=18)
    add("--guidance", type=float, default=4.0)
    add("--scale", type=int, help=f"how many times a picture is enlarged  [default: to about {CELL} pixels]")
    add("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    edit_and_draw(options).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
