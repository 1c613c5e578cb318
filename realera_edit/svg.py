"""Inline SVG charts as text: pure functions of numbers and names, coloured by the classes of the page's style sheet.

Colour is never alone: a series also has a dash and a marker, a role a shape. All text is escaped.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from html import escape

_Box = tuple[float, float, float, float]
Point = tuple[float, float, float | None, float | None]

_SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
ROLES = {"erased": "diamond", "neighbour": "triangle", "preserved": "square", "vocabulary": "circle"}
_LABELLED = 120  # most labels that are tried
_TEXT = 7.2  # about the width of a letter at the charts' 12 px


def shorten(text: str, length: int) -> str:
    """`text`, or its start and an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def percent(share: float, digits: int = 1) -> str:
    """A share as the page writes it everywhere."""
    return f"{100 * share:.{digits}f}\u00a0%"


def _width(text: str) -> float:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text) * _TEXT


def _svg(width: float, height: float, title: str, body: Iterable[str]) -> str:
    """`title` is the accessible name; the numbers themselves stand in a table beside the chart."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def _label(x: float, y: float, text: str, anchor: str = "start", css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def marker(shape: str, x: float, y: float, r: float, css: str, title: str = "") -> str:
    """A mark of area about pi r^2 around (x, y); `title` shows under the pointer."""
    hover = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" class="{css}">{hover}</circle>'
    corners = {
        "square": ((-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)),
        "triangle": ((0, -1.4), (1.25, 0.8), (-1.25, 0.8)),
        "down": ((0, 1.4), (1.25, -0.8), (-1.25, -0.8)),
        "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "cross": ((-1.1, -0.4), (-0.4, -0.4), (-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4))
        + ((1.1, 0.4), (0.4, 0.4), (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4)),
    }[shape]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" class="{css}">{hover}</polygon>'


def interval(value: float, low: float | None, high: float | None, before: float | None) -> str:
    """A share as a dot, its interval as a bar, on a track from 0 to 1; `before` is a tick."""

    def at(share: float) -> float:
        return 6 + 128 * min(max(share, 0.0), 1.0)

    body = [_line(at(0), 9, at(1), 9, "track")]
    if low is not None and high is not None:
        body.append(
            f'<rect x="{at(low):.1f}" y="5" width="{max(at(high) - at(low), 1):.1f}" height="8" class="range"/>'
        )
    if before is not None:
        body.append(_line(at(before), 1, at(before), 17, "tick"))
    body.append(marker("circle", at(value), 9, 4, "dot"))
    return f'<svg viewBox="0 0 140 18" width="140" aria-hidden="true">{"".join(body)}</svg>'


def lines(series: Sequence[tuple[str, Sequence[Point]]], x_name: str, y_name: str, title: str) -> str:
    """Shares (x, value, low, high) against x, one line a series with its interval as a band, named at its end.

    The x axis is logarithmic where the greatest x is at least twenty times the least.
    """
    width, height, left, right, top, bottom = 860.0, 360.0, 64.0, 220.0, 32.0, 48.0
    xs = sorted({point[0] for _, points in series for point in points})
    log = bool(xs) and xs[0] > 0 and xs[-1] >= 20 * xs[0]
    scale: Callable[[float], float] = math.log if log else float

    def across(x: float) -> float:
        span = scale(xs[-1]) - scale(xs[0])
        return left + (width - left - right) * ((scale(x) - scale(xs[0])) / span if span else 0.5)

    def down(share: float) -> float:
        return top + (height - top - bottom) * (1 - min(max(share, 0.0), 1.0))

    body = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        body.append(_line(left, down(tick), width - right, down(tick), "grid"))
        body.append(_label(left - 8, down(tick) + 4, percent(tick, 0), "end", "axis"))
    last = -math.inf
    for x in xs:
        if across(x) - last >= 34:  # no tick is written over the one before it
            last = across(x)
            body.append(_label(last, height - bottom + 18, f"{x:g}", "middle", "axis"))
    body.append(_label((left + width - right) / 2, height - 8, x_name, "middle", "axis"))
    body.append(_label(left - 8, 12, y_name, "start", "axis"))
    ends: list[tuple[float, str, str]] = []
    for i, (name, unsorted) in enumerate(series):
        points, css = sorted(unsorted, key=lambda point: point[0]), f"s{i % len(_SHAPES)}"
        if not points:
            continue
        band = [(x, low, high) for x, _, low, high in points if low is not None and high is not None]
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        body.append(f'<polygon points="{_path(edge, across, down)}" class="band {css}"/>' if len(band) > 1 else "")
        path = _path([(x, value) for x, value, _, _ in points], across, down)
        body.append(f'<polyline points="{path}" class="line {css}"/>')
        for x, value, low, high in points:
            known = "" if low is None or high is None else f" [{percent(low)}, {percent(high)}]"
            tip = f"{name}, {x:g}: {percent(value)}{known}"
            body.append(marker(_SHAPES[i % len(_SHAPES)], across(x), down(value), 4.5, f"mark {css}", tip))
        ends.append((down(points[-1][1]), name, css))
    spot = -math.inf
    for y, name, css in sorted(ends):
        spot = max(y, spot + 16)
        body.append(_label(width - right + 12, spot + 4, shorten(name, 26), "start", f"name {css}"))
    return _svg(width, max(height, spot + 12), title, body)


def _path(
    points: Iterable[tuple[float, float]], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    return " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)


def bars(items: Sequence[tuple[str, float]], title: str) -> str:
    """Horizontal bars from zero, one below the other, with name and number."""
    width, left, right, step = 480.0, 130.0, 52.0, 24.0
    top = max((abs(value) for _, value in items), default=0) or 1
    body = []
    for i, (name, value) in enumerate(items):
        y, long = i * step, (width - left - right) * abs(value) / top
        body.append(_label(left - 8, y + 16, shorten(name, 17), "end", "name"))
        body.append(f'<rect x="{left:.1f}" y="{y + 4:.1f}" width="{long:.1f}" height="16" rx="2" class="bar">')
        body.append(f"<title>{escape(name)}: {value:.3f}</title></rect>")
        body.append(_label(left + long + 6, y + 16, f"{value:.3f}", "start", "axis"))
    return _svg(width, len(items) * step + 4, title, body)


def scatter(words: Sequence[tuple[str, float, float, str, float]], title: str) -> str:
    """A map of (word, x, y, role, moved): shape and colour by role, area by `moved`, equal scale on both axes.

    Labels are placed greedily, erased words first, where they meet no other label and no mark; a word that finds no
    room has its name under the pointer only.
    """
    width, height, margin = 860.0, 580.0, 46.0
    xs, ys = [word[1] for word in words] or [0.0], [word[2] for word in words] or [0.0]
    spans = (max(xs) - min(xs), max(ys) - min(ys))
    scales = [room / span for room, span in zip((width - 2 * margin, height - 2 * margin), spans, strict=True) if span]
    scale = min(scales, default=1.0)
    width = min(width, max(spans[0] * scale + 2 * margin + 140, 420.0))  # no wider than the words and their labels
    middle = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    most = max((abs(word[4]) for word in words), default=0) or 1
    order = sorted(words, key=lambda word: (list(ROLES).index(word[3]), -abs(word[4]), word[0]))
    marks = []
    boxes: list[_Box] = []
    for word, x, y, role, moved in order:
        at = (width / 2 + (x - middle[0]) * scale, height / 2 - (y - middle[1]) * scale)
        r = 3 + 7 * math.sqrt(abs(moved) / most)
        reach = 1.35 * r  # how far its corners go
        marks.append((word, *at, r, role, f"{word}: {role}, moved {moved:.2f}"))
        boxes.append((at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach))
    # small and unimportant marks lie below the large ones
    body = [marker(ROLES[role], x, y, r, f"mark {role}", tip) for _, x, y, r, role, tip in reversed(marks)]
    for word, x, y, r, role, _ in marks[:_LABELLED]:
        text = shorten(word, 28)
        long, e = _width(text), 1.35 * r
        for dx, dy in ((e + 2, 4), (-e - 2 - long, 4), (-long / 2, -e - 4), (-long / 2, e + 11), (e, -e), (e, e + 9)):
            box = (x + dx, y + dy - 10, x + dx + long, y + dy + 3)
            if box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height and not _meets(box, boxes):
                boxes.append(box)
                body.append(_label(x + dx, y + dy, text, "start", f"halo {role}"))
                break
    return _svg(width, height, title, body)


def _meets(box: _Box, others: Iterable[_Box]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)
