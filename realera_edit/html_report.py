"""One self-contained page from the folder of an evaluation.

`write` makes `report.html`: everything is inside it, its content security policy allows no request and no script but
its own, and every text of `evaluation.json` is escaped. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import svg
from .errors import ReportError
from .evaluation_file import Pair, Part, pairs, read, read_png, replaced

HTML = "report.html"
BUDGET = 15 * 10**6  # characters of embedded pictures
MAX_REST = 600  # pairs in the folded grid
SIDE = 384  # wider pictures are shrunk to this and embedded as JPEG
CONCEPTS = 12  # erased concepts with pairs of their own on the page; the others' are in the grid
PER_CONCEPT = {"e": 4, "g": 4, "r": 2}
OTHERS = 24  # pairs of neighbours and unrelated concepts together
# kind -> heading, whether the picture should still show its truth
KINDS = {
    "e": ("The erased concept, by its own name", False),
    "g": ("By other names", False),
    "r": ("Prompts that never name it", False),
    "n": ("Neighbours, which must stay", True),
    "s": ("Unrelated concepts, which must stay", True),
}
# key, name, whether low is good, what it says
RATES = (
    ("acc_e", "Efficacy", True, "the concept is still drawn under its own name"),
    ("acc_g", "Generality", True, "it is still drawn under aliases and synonyms"),
    ("residue", "Residue", True, "it is still drawn by prompts that never name it"),
    ("acc_n", "Neighbours", False, "concepts near by are drawn right"),
    ("acc_n_unseen", "Neighbours, unseen", False, "near concepts that the edit was not told to preserve"),
    ("acc_s", "Specificity", False, "concepts far away are drawn right"),
    ("style_kept", "Style kept", False, "the style in the concept's own prompts is still right"),
)
MEANS = (
    ("H_4", "per concept, of efficacy, generality, specificity and neighbours"),
    ("H_o", "of efficacy, specificity and generality (MACE)"),
    ("H_c", "of efficacy and specificity (MACE)"),
)
DISTANCES = (
    ("pixel", "Pixels", "mean difference at the same prompt and seed, 1 is black against white"),
    ("feature", "Features", "the same between the judge's features, as a share of their norm"),
    ("frechet", "Fréchet", "between the two sets of pictures"),
    ("kernel", "Kernel", "between the two sets of pictures, unbiased"),
)
# a verdict: key, question, answers (yes, partly, no), what is counted, its place in the headline
VERDICTS = (
    (
        "acc_e",
        "Is it gone?",
        ("gone", "partly gone", "still there"),
        "still show it when asked by its name",
        "By name:",
    ),
    (
        "acc_g",
        "By other names too?",
        ("gone", "partly gone", "still there"),
        "still show it when asked by another name",
        "by other names:",
    ),
    (
        "acc_n",
        "Are neighbours kept?",
        ("kept", "partly kept", "damaged"),
        "of near concepts are drawn right",
        "neighbours:",
    ),
    (
        "acc_s",
        "Is the rest kept?",
        ("kept", "partly kept", "damaged"),
        "of unrelated concepts are drawn right",
        "unrelated concepts:",
    ),
)
GONE = (0.1, 0.5)  # at most this share drawn is "gone", "partly gone"
KEPT = (0.9, 0.6)  # at least this share of what the unedited model draws is "kept", "partly kept"
_NONE = "\u2013"
LOW_IS_GOOD = {key: low for key, _, low, _ in RATES}


@dataclass(frozen=True)
class Shown:
    """A pair with its pictures as data URIs. `good`: as wished, or None where the unedited model missed it as well."""

    pair: Pair
    before: str
    after: str
    width: int
    height: int
    good: bool | None
    kept: bool


def write(folder: Path) -> Path:
    """Write `folder/report.html` from `folder/evaluation.json` and its pictures; returns its path.

    An older report is replaced, in one step. Of the pairs, a few of each concept and kind stand on the page and others
    in a folded grid, until `BUDGET` is spent. The same folder gives the same bytes. Raises `ReportError`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    data = read(folder)
    featured, rest = choose(pairs(folder, data), data.texts("erased"))
    shown, spent = _embed(featured, 0)
    more, _ = _embed(rest[:MAX_REST], spent)
    environment = Environment(
        loader=PackageLoader("realera_edit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=lambda x: _NONE if x is None else svg.percent(x), shorten=svg.shorten)
    environment.filters.update(plain=_plain, span=_span)
    environment.globals.update(svg={name: _markup(Markup, getattr(svg, name)) for name in ("interval", "marker")})
    script, style = (environment.get_template(f"report.{kind}").render() for kind in ("js", "css"))
    page = environment.get_template("report.html").render(
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        groups=[(head, [s for s in shown if s.pair.kind == kind]) for kind, (head, _) in KINDS.items()],
        rest=more,
        left_out=len(featured) + len(rest) - len(shown) - len(more),
        charts={name: Markup(chart) for name, chart in _charts(data).items()},
        thresholds={"gone": GONE, "kept": KEPT},
        **_numbers(data),
    )
    return replaced(folder / HTML, page.encode("utf-8", "replace"))  # a lone surrogate has no bytes


def choose(found: Sequence[Pair], erased: Sequence[str]) -> tuple[list[Pair], list[Pair]]:
    """The pairs that stand on the page, most telling first, and all others in their order.

    Of each prompt the first seed; of each of the first `CONCEPTS` erased concepts as many prompts as `PER_CONCEPT`
    says; of neighbours and unrelated concepts half of `OTHERS` each, or more where the other has fewer.
    """
    ranks: Counter[tuple[str, str]] = Counter()
    ranked: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for i, pair in enumerate(found):
        if pair.first and pair.kind in KINDS:
            rank = ranks[pair.kind, pair.owner]
            ranks[pair.kind, pair.owner] += 1
            if rank < PER_CONCEPT.get(pair.kind, OTHERS) and (KINDS[pair.kind][1] or pair.owner in erased[:CONCEPTS]):
                ranked[pair.kind].append((rank, i))
    near, far = sorted(ranked["n"]), sorted(ranked["s"])
    near = near[: max(OTHERS // 2, OTHERS - len(far))]
    taken = [*ranked["e"], *ranked["g"], *ranked["r"], *near, *far[: OTHERS - len(near)]]
    chosen = {i for _, i in taken}
    # the first of every concept and kind come before the second of any, should the budget end
    return [found[i] for _, i in sorted(taken)], [pair for i, pair in enumerate(found) if i not in chosen]


def _embed(chosen: Iterable[Pair], spent: int) -> tuple[list[Shown], int]:
    """The pairs as data URIs until `BUDGET` characters are spent, in the order of the file; and what is spent."""
    shown = []
    for pair in chosen:
        (before, width, height), (after, _, _) = _data_uri(pair.before), _data_uri(pair.after)
        if spent + len(before) + len(after) > BUDGET:
            break
        spent += len(before) + len(after)
        kept = KINDS.get(pair.kind, ("", True))[1]
        good = (pair.after_verdict == pair.truth) == kept if pair.before_verdict == pair.truth else None
        shown.append(Shown(pair, before, after, width, height, good, kept))
    return sorted(shown, key=lambda item: item.pair.index), spent


def _data_uri(path: Path) -> tuple[str, int, int]:
    """A picture as it is, or shrunk where it is wide; and its size."""
    data, width, height = read_png(path)
    kind = "png"
    if max(width, height) > SIDE:
        image = opened(path, data).convert("RGB")
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        data, kind, (width, height) = buffer.getvalue(), "jpeg", image.size
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height


def opened(path: Path, data: bytes) -> Any:
    """A PNG picture by Pillow. Raises `ReportError`."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            image.load()
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ReportError(f"{path}: not a readable PNG picture ({error}); run the evaluation again") from error
    return image


def _numbers(data: Part) -> dict[str, Any]:
    """What the template shows besides pictures and charts, as plain values."""
    rates, harmonic, distances = (data.part(key) for key in ("rates", "harmonic", "distances"))
    table = [(name, key, low, says, _rate(rates.part(key))) for key, name, low, says in RATES if rates.part(key)]
    means = [(key, says, _values(harmonic.part(key), "value", "low", "high", "concepts")) for key, says in MEANS]
    gaps = [(name, says, _values(distances.part(key), "value", "floor")) for key, name, says in DISTANCES]
    columns = ("acc_e", "acc_g", "acc_s", "acc_n", "H_4", "H_o", "H_c")
    extras = {key: data.part(key).data for key in ("recipe", "settings", "versions")}
    return {
        "erased": data.texts("erased"),
        "model": {key: data.part("model").text(key) for key in ("original", "edited")},
        "judge": (data.part("judge").text("name"), data.part("judge").number("concepts")),
        "verdicts": [verdict for spec in VERDICTS if (verdict := _verdict(rates, *spec))],
        "rates": table,
        "means": [row for row in means if row[2]["value"] is not None],
        "distances": [row for row in gaps if row[2]["value"] is not None],
        "columns": columns,
        "concepts": [(c.text("name"), [c.number(key) for key in columns]) for c in data.parts("concepts")],
        "recipe": json.dumps(extras["recipe"], indent=2, ensure_ascii=False) if extras["recipe"] else "",
        "settings": {key: _short(value) for key, value in extras["settings"].items()},
        "versions": {key: _short(value) for key, value in extras["versions"].items()},
        "command": data.text("command") and str(data.data["command"]),  # with the spaces inside its quotes
        "seconds": data.number("seconds"),
        "date": data.text("date"),
        "attack": _series(data, "attack", "budget", "success"),
        "curves": _series(data, "curves", "count", "value"),
        "roles": svg.ROLES,
    }


def _plain(value: float | None) -> str:
    """A count in full, any other number to four digits."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _values(part: Part, *keys: str) -> dict[str, float | None]:
    return {key: part.number(key) for key in keys}


def _rate(part: Part) -> dict[str, dict[str, float | None]]:
    return {side: _values(part.part(side), "value", "low", "high", "hits", "count") for side in ("edited", "original")}


def _verdict(
    rates: Part, key: str, question: str, answers: tuple[str, ...], says: str, summary: str
) -> dict[str, Any] | None:
    """The answer to one question, and the others that the interval leaves open; None where it was not measured.

    What must stay is judged against what the unedited model draws of it; where that is next to nothing, no answer is
    given.
    """
    rate = _rate(rates.part(key))
    edited, most = rate["edited"], rate["original"]["value"]
    if edited["value"] is None:
        return None

    def level(value: float) -> int:
        if LOW_IS_GOOD[key]:
            return sum(value > limit for limit in GONE)
        return sum(value < limit * (1 if most is None else most) for limit in KEPT)

    at = level(edited["value"])
    ends = [level(end) for end in (edited["low"], edited["high"]) if end is not None]
    reach = range(min([at, *ends]), max([at, *ends]) + 1)
    if most is not None and most <= GONE[0]:
        answers, at, reach = (*answers, "cannot be told"), len(answers), range(0)
    return {
        "question": question,
        "answer": answers[at],
        "level": at,
        "open": [answers[i] for i in reach if i != at],
        "says": says,
        "summary": summary,
        "rate": rate,
    }


def _span(values: dict[str, float | None]) -> str:
    low, high = values["low"], values["high"]
    return "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"


def _series(data: Part, key: str, x: str, y: str) -> dict[str, list[tuple[str, list[tuple[Any, ...]]]]]:
    """Metric -> (name, points) of `attack` or `curves`; a point without a budget (no limit) has None for x."""
    found: dict[str, list[tuple[str, list[tuple[Any, ...]]]]] = {}
    for part in data.parts(key):
        points = [tuple(point.number(name) for name in (x, y, "low", "high")) for point in part.parts("points")]
        name, metric = part.text("name") or part.text("editor"), part.text("metric")
        if known := [point for point in points if point[1] is not None]:
            found.setdefault(metric, []).append((name, known))
    return found


def _charts(data: Part) -> dict[str, str]:
    """Every chart that there are numbers for, by name."""
    charts = {}
    axes = {"attack": ("budget", "success", "attack budget, share of the state's norm", "the concept comes back")}
    axes["curves"] = ("count", "value", "concepts erased at once", "")
    for key, (at, value, across, up) in axes.items():
        for metric, series in _series(data, key, at, value).items():
            plain = [(name, [point for point in points if point[0] is not None]) for name, points in series]
            if not any(points for _, points in plain):
                continue
            charts[f"{key} {metric}".strip()] = svg.lines(plain, across, up or metric, f"{up or metric} by {across}")
    words = []
    for word in data.parts("neighbourhood"):
        x, y = word.number("x"), word.number("y")
        role = word.text("role")
        if x is not None and y is not None:
            known = role if role in svg.ROLES else "vocabulary"
            words.append((word.text("word"), x, y, known, word.number("moved") or 0.0))
    if words:
        charts["neighbourhood"] = svg.scatter(words, "Map of words around the erased concepts")
    moved = [(word.text("word"), shift) for word in data.parts("moved") if (shift := word.number("shift")) is not None]
    if moved:
        charts["moved"] = svg.bars(sorted(moved, key=lambda item: -item[1])[:20], "The words that moved most")
    return charts


def _markup(markup: Callable[[str], str], draw: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: markup(draw(*args))
