"""The table of the stored search: pooled rates, and H_4 against another setting, set by set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import search_table


def test_settings_are_compared_on_the_sets_that_both_have(tmp_path: Path) -> None:
    def row(setting: str, draw: int, h4: float, hits: int, concepts: int = 10) -> str:
        edited = {name: [hits, 10] for name in search_table.RATES}
        found = {"setting": setting, "concepts": concepts, "draw": draw, "edited": edited}
        return json.dumps({**found, "h4": [h4 * 4, 4], "h4_unseen": [0.0, 0]})

    rows = [row("a", 0, 0.8, 1), row("a", 1, 0.6, 3), row("b", 1, 0.7, 5), row("b", 2, 0.9, 5), row("a", 0, 0.1, 9, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    found = search_table.read(tmp_path / "rows.jsonl", 10)
    lines = search_table.table(found, "a").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["b", "a"]  # 0.8 and 0.7
    assert lines[2].endswith("| +0.100 [+0.100, +0.100] |")
    assert lines[3].split("|")[3].strip() == "0.200"  # 4 of 20


def test_the_stored_rows_can_be_read() -> None:
    found = search_table.read(search_table.ROWS, 10)
    assert len(found["s0.7"]) == 12
    assert 0 < search_table.mean([*found["s0.7"].values()], "acc_e") < 0.02
    assert search_table.mean([*found["s0.7"].values()], "h4") == pytest.approx(0.881, abs=5e-4)
