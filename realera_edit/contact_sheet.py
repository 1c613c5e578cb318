"""The pairs of an evaluation's page as one picture. Imports no torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from . import svg
from .errors import ReportError
from .evaluation_file import pairs, read, read_png, replaced
from .html_report import KINDS, choose, opened

PNG = "report.png"


def write(folder: Path) -> Path:
    """Write `folder/report.png`: the page's pairs, before left and after right, with prompts; returns its path.

    Raises `ReportError`.
    """
    from PIL import Image, ImageDraw, ImageFont

    data = read(folder)
    featured, _ = choose(pairs(folder, data), data.texts("erased"))
    featured.sort(key=lambda pair: pair.index)
    groups = [(head, [pair for pair in featured if pair.kind == kind]) for kind, (head, _) in KINDS.items()]
    groups = [(head, chosen) for head, chosen in groups if chosen]
    if not groups:
        raise ReportError(f"{folder}: the evaluation names no pictures; run it again with pictures kept")
    side, gap, edge, across = 112, 20, 24, 4
    cell, step, head_height = 2 * side + 4, side + 46, 40
    height = 64 + sum(head_height + step * -(-len(chosen) // across) for _, chosen in groups) + edge
    sheet = Image.new("RGB", (2 * edge + across * cell + (across - 1) * gap, height), "white")
    pen, fonts = ImageDraw.Draw(sheet), {size: ImageFont.load_default(size) for size in (13, 16, 20)}
    title = f"Erased: {', '.join(data.texts('erased'))}"
    pen.text((edge, 20), svg.shorten(title, 70), "black", fonts[20])
    pen.text((sheet.width - edge, 26), "left: before, right: after", "#57606a", fonts[13], anchor="ra")
    top = 64
    for head, chosen in groups:
        pen.text((edge, top + 8), head, "black", fonts[16])
        top += head_height
        for i, pair in enumerate(chosen):
            x, y = edge + (i % across) * (cell + gap), top + (i // across) * step
            for at, path in ((x, pair.before), (x + side + 4, pair.after)):
                sheet.paste(_tile(path, side), (at, y))
                pen.rectangle((at - 1, y - 1, at + side, y + side), outline="#d5d9df")
            pen.text((x, y + side + 4), svg.shorten(pair.prompt, 34), "black", fonts[13])
            verdicts = f"{pair.before_verdict} > {pair.after_verdict}"
            pen.text((x, y + side + 20), svg.shorten(verdicts, 34), "#57606a", fonts[13])
        top += step * -(-len(chosen) // across)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return replaced(folder / PNG, buffer.getvalue())


def _tile(path: Path, side: int) -> Any:
    from PIL import Image

    image = opened(path, read_png(path)[0]).convert("RGB")
    # small pictures are shown with the pixels they have
    way = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
    return image.resize((side, side), way)
