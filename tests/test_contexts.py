"""Templates, phrase positions and their alignment."""

from __future__ import annotations

import pytest

from realera_edit.contexts import Span, align, fill, find_span


@pytest.mark.parametrize(
    ("template", "phrase", "prompt"),
    [
        ("a photo of {a}", "cat", "a photo of a cat"),
        ("a photo of {a}", "owl", "a photo of an owl"),
        ("a photo of {a}", "the sea", "a photo of the sea"),
        ("a photo of {a}", "a cat", "a photo of a cat"),
        ("in {} style", "Van Gogh", "in Van Gogh style"),
        ("a photo of {}", "", "a photo of"),
    ],
)
def test_fill(template: str, phrase: str, prompt: str) -> None:
    assert fill(template, phrase).prompt == prompt


def test_find_span_between_head_and_tail() -> None:
    # start = 0, end = 9; head "5 6", phrase "7 7", tail "8"
    assert find_span([0, 5, 6, 7, 7, 8, 9], [0, 5, 6, 9], [0, 8, 9]) == Span(3, 5, 6)
    assert find_span([0, 7, 9], [0, 9], [0, 9]) == Span(1, 2, 2)
    # an empty phrase has no positions, and the text after it keeps its own
    assert find_span([0, 5, 8, 9], [0, 5, 9], [0, 8, 9]) == Span(2, 2, 3)
    # a phrase that repeats the words around it
    assert find_span([0, 5, 5, 8, 8, 9], [0, 5, 9], [0, 8, 9]) == Span(2, 4, 5)


def test_align_puts_last_on_last_and_everything_after_one_to_one() -> None:
    concept, target = Span(2, 5, 6), Span(2, 3, 4)
    assert align(concept, target, 2) == [(2, 2), (3, 2), (4, 2), (5, 3), (6, 4), (7, 5), (8, 6)]
    concept, target = Span(1, 2, 2), Span(1, 4, 4)
    assert align(concept, target, 1) == [(1, 3), (2, 4), (3, 5)]
    # equal lengths: position by position
    assert align(Span(1, 5, 5), Span(1, 5, 5), 0) == [(i, i) for i in range(1, 6)]
    assert align(Span(1, 5, 5), Span(1, 3, 3), 0) == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]


def test_align_with_an_empty_target_takes_its_next_position() -> None:
    assert align(Span(1, 3, 3), Span(1, 1, 1), 0) == [(1, 1), (2, 1), (3, 1)]
