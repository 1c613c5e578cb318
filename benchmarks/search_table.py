"""The settings that were tried on development concepts, from their stored rows: rates, H_4, and how H_4 differs.

`python -m benchmarks.search_table --concepts 10 --against s0.7` reads `benchmarks/results/search-emoji.jsonl`. A row is
one setting on one set of concepts. `editors` are applied one after the other: a configuration of ours as JSON, or a
peer's name; `patch` and `mod` name what code that was not kept changed. `edited` holds hits and counts of each rate,
`h4` and `h4_unseen` the sum over concepts and their number. The difference to another setting is taken set by set, with
a bootstrap interval over the sets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realera_edit.metrics import bootstrap

ROWS = Path(__file__).parent / "results" / "search-emoji.jsonl"
RATES = ("acc_e", "acc_g", "acc_g_unseen", "acc_s", "acc_n")


def read(path: Path, concepts: int) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Setting -> draw -> row, of the sets of so many concepts."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in map(json.loads, path.read_text("utf-8").splitlines()):
        if row["concepts"] == concepts:
            found.setdefault(row["setting"], {})[row["draw"]] = row
    return found


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """A rate or an H_4 over several rows: all hits over all counts."""
    pairs = [row[name] if name.startswith("h4") else row["edited"][name] for row in rows]
    return float(sum(hits for hits, _ in pairs) / max(sum(count for _, count in pairs), 1))


def table(found: Mapping[str, Mapping[int, Mapping[str, Any]]], against: str) -> str:
    """A Markdown table, the highest H_4 first."""
    base, lines = found[against], []
    for setting, rows in found.items():
        draws = [draw for draw in rows if draw in base]
        gaps = np.array([mean([rows[draw]], "h4") - mean([base[draw]], "h4") for draw in draws])
        low, high = bootstrap(gaps)
        every = [*rows.values()]
        cells = [f"{mean(every, name):.3f}" for name in (*RATES, "h4", "h4_unseen")]
        gap = f"{gaps.mean():+.3f} [{low:+.3f}, {high:+.3f}]" if setting != against and draws else ""
        lines.append((-mean(every, "h4"), "| " + " | ".join([setting, str(len(rows)), *cells, gap]) + " |"))
    head = ["setting", "sets", *RATES, "h4", "h4_unseen", f"h4 against {against}"]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(line for _, line in sorted(lines))])


def main() -> None:
    """Print the table of one number of concepts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=10)
    parser.add_argument("--against", default="s0.7", help="the setting that the others are compared with")
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    found = read(options.rows, options.concepts)
    if options.against not in found:
        parser.error(f"no setting {options.against!r} with {options.concepts} concepts; there are {', '.join(found)}")
    print(table(found, options.against))


if __name__ == "__main__":
    main()
