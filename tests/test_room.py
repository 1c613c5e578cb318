"""The benchmark of room in a text space measures what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.room import directions, left


def test_what_is_left_along_itself_and_added_across() -> None:
    parts = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    assert left(parts, 0 * eye) == (1.0, 0.0)
    assert left(parts, -0.7 * eye) == (pytest.approx(0.3), pytest.approx(0, abs=1e-6))
    turn = eye.new_zeros(8, 8)
    turn[range(0, 8, 2), range(1, 8, 2)], turn[range(1, 8, 2), range(0, 8, 2)] = 0.5, -0.5
    assert left(parts, turn) == (pytest.approx(1), pytest.approx(0.5))  # x^T A x = 0 for antisymmetric A


def test_directions_that_hold_the_variance() -> None:
    draw = torch.Generator().manual_seed(1)
    flat = torch.randn(50, 4, 3, generator=draw, dtype=torch.float64) @ torch.eye(3, 9, dtype=torch.float64)
    assert directions(flat, 0.999) == 3
    assert directions(flat * torch.tensor([10, 1, 1, 0, 0, 0, 0, 0, 0]), 0.9) == 1
