"""The rows of `benchmarks.compare` pooled: rates and harmonic means with their intervals, tables, curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.quality import Rate
from realera_edit import svg
from realera_edit.metrics import bootstrap_groups

FEWEST = 20  # pictures of far concepts of a point of a curve
RATES = ("acc_e", "acc_g", "acc_g_unseen", "acc_s", "acc_n", "acc_n_retained", "acc_n_unseen", "style_kept")
LED = ("H_4", "H_4_unseen")
HARMONIC = (*LED, "H_o", "H_c")
Row = dict[str, Any]


def tidy(value: Any) -> Any:
    """JSON types only, NaN as null."""
    if isinstance(value, Mapping):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def label(row: Row) -> str:
    """The editor as it was written, the target if one was named for all, and whether it was told of all that stays."""
    target = "" if row.get("target") is None else f" to {row['target']!r}"
    return f"{row['editor']}{target}{', told of all' if row.get('told') else ''}"


def pooled(rows: Sequence[Row]) -> Row:
    """The rows of one editor and count of concepts as one: rates with Wilson's, H_4 with a bootstrap interval."""
    good = [row for row in rows if "error" not in row]
    line: Row = {"concepts": rows[0]["concepts"], "editor": label(rows[0]), "draws": len(good)}
    for side, prefix in (("edited", ""), ("original", "unedited_")):
        for name in RATES:
            rate = total(found for row in good if (found := part_of(row[side], name)))
            line[prefix + name] = {"mean": rate.value, "ci": rate.interval, "count": rate.count}
    for name in HARMONIC:
        line[column(name)] = mean_of(by_concept(good, name))
    line["drift"] = float(np.mean([row["drift"] for row in good if row["drift"] is not None] or [np.nan]))
    line["seconds"] = common.median([row["edit_seconds"] for row in good]) if good else float("nan")
    return tidy(line)


def part_of(side: Row, name: str) -> Row | None:
    """A stored rate; of older rows, which lack the later ones, None. Retained neighbours: those that are not unseen."""
    if name != "acc_n_retained":
        return side.get(name)
    every, unseen = side["acc_n"], side.get("acc_n_unseen")
    return unseen and {key: every[key] - unseen[key] for key in ("hits", "count")}


def total(parts: Iterable[Row]) -> Rate:
    """Stored rates as one."""
    counts = [(part["hits"], part["count"]) for part in parts]
    return Rate(sum(hits for hits, _ in counts), sum(count for _, count in counts))


def shown(rate: Rate) -> str:
    """A rate with its interval, for a table."""
    return "-" if not rate.count else f"{rate.value:.3f} [{rate.interval[0]:.3f}, {rate.interval[1]:.3f}]"


def column(name: str) -> str:
    """The key of a harmonic mean in a pooled row: "h4_unseen" of "H_4_unseen"."""
    return name.lower().replace("h_4", "h4")


def by_concept(rows: Sequence[Row], name: str) -> dict[tuple[int, str], float]:
    """(draw, concept) -> a harmonic mean, of the concepts that have all its parts."""
    found = {(row["draw"], c): parts.get(name) for row in rows for c, parts in row["by_concept"].items()}
    return {key: value for key, value in found.items() if value is not None}


def mean_of(values: Mapping[tuple[int, str], float]) -> Row:
    """Mean of (draw, concept) -> value, its interval by resampling concepts, and how many values there are."""
    groups: dict[str, list[float]] = {}
    for (_, concept), value in values.items():
        groups.setdefault(concept, []).append(value)
    mean = float(np.mean([*values.values()])) if values else float("nan")
    return {"mean": mean, "ci": bootstrap_groups([*groups.values()]), "count": len(values), "concepts": len(groups)}


def summary(rows: Sequence[Row]) -> list[Row]:
    """One pooled row for each count of concepts and editor, in the order of their first rows.

    `h4_lead`, `h4_unseen_lead`: how much higher the first editor of that count stands, concept by concept.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["concepts"], label(row)), []).append(row)
    lines, first = [], dict[int, list[Row]]()
    for (count, _), group in sorted(groups.items(), key=lambda item: item[0][0]):
        good = [row for row in group if "error" not in row]
        leader, line = first.setdefault(count, good), pooled(group)
        for name in LED if leader is not good else ():
            ours, its = by_concept(leader, name), by_concept(good, name)
            led = {key: ours[key] - value for key, value in its.items() if key in ours}
            line[column(name) + "_lead"] = tidy(mean_of(led))
        lines.append(line)
    return lines


def table(lines: Sequence[Row]) -> str:
    """A Markdown table of the pooled rows, every rate with its 95 % interval, and the unedited model's beside them."""
    columns = [*RATES, "h4", "h4_lead", "h4_unseen", "h4_unseen_lead", "h_o"]
    head = ["concepts", "editor", "draws", *columns, "drift", "seconds"]

    def cell(part: Row | None) -> str:
        if part is None or part["mean"] is None:
            return "-"
        return f"{part['mean']:.3f} [{part['ci'][0]:.3f}, {part['ci'][1]:.3f}]"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    seen: set[int] = set()
    for line in lines:
        if line["concepts"] not in seen:
            seen.add(line["concepts"])
            before = [cell(line["unedited_" + name]) for name in RATES]
            blank = ["-"] * (len(head) - 3 - len(before))
            out.append("| " + " | ".join([str(line["concepts"]), "unedited", "-", *before, *blank]) + " |")
        cells = [str(line["concepts"]), line["editor"], str(line["draws"]), *(cell(line.get(c)) for c in columns)]
        out.append("| " + " | ".join([*cells, number(line["drift"]), number(line["seconds"])]) + " |")
    return "\n".join(out)


def by_metric(lines: Sequence[Row]) -> dict[str, Any]:
    """Metric -> editor -> number of concepts -> mean, interval and count."""
    found: dict[str, Any] = {}
    for line in lines:
        for name, part in line.items():
            if isinstance(part, dict):
                found.setdefault(name, {}).setdefault(line["editor"], {})[str(line["concepts"])] = part
    for name in ("drift", "seconds"):
        for line in lines:
            found.setdefault(name, {}).setdefault(line["editor"], {})[str(line["concepts"])] = {"mean": line[name]}
    return found


def curves(lines: Sequence[Row], metric: str = "h4") -> str:
    """An SVG of a metric over the number of concepts, a curve for each editor.

    Where so much is erased that hardly a far concept is left, its few pictures would decide the point: it is left out.
    """
    series: dict[str, list[svg.Point]] = {}
    for line in lines:
        part = line[metric]
        if part["mean"] is not None and line["acc_s"]["count"] >= FEWEST:
            series.setdefault(line["editor"], []).append((line["concepts"], part["mean"], *part["ci"]))
    style = (Path(svg.__file__).parent / "templates" / "report.css").read_text("utf-8")
    drawn = svg.lines(list(series.items()), "erased concepts", "H_4", "H_4 over the number of erased concepts")
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{style} svg {{ background: var(--page) }}</style>", 1
    )
