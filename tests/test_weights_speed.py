"""The benchmark of the weights: its figures belong to the names and shares that it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import weights_speed


def test_joint_weights_come_nearer_to_the_common_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "weights_speed",
        "--width",
        "48",
        "--names",
        "2",
        "20",
        "--rows",
        "5",
        "--repeat",
        "1",
        "--threads",
        "1",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    weights_speed.main()
    table, line = capsys.readouterr().out.rsplit("\n{", 1)
    few, many = json.loads("{" + line)["results"]
    assert [(row["names"], row["rows"]) for row in (few, many)] == [(2, 10), (20, 100)]
    assert table.count("\n") == 3
    assert many["off_jointly"] < many["off_alone"] / 2
    assert all(row[name] > 0 for row in (few, many) for name in ("alone", "jointly", "solve", "solve_given"))
