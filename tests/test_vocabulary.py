"""The prior over vocabulary words, its cache, and the mined neighbourhood."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from realera_edit.checkpoint import open_checkpoint
from realera_edit.embeddings import PromptEncoder
from realera_edit.errors import RealEraWarning
from realera_edit.vocabulary import Prior, load_ends, load_prior, mine_words, prior_moments, whole_words

WORDS = ("cat", "dog", "horse", "a red house")


@pytest.fixture
def encoder(pristine: object) -> PromptEncoder:
    return open_checkpoint(pristine("sdxl")).encoder  # type: ignore[operator]


def test_whole_words_are_the_vocabulary_s_own_most_frequent_first(encoder: PromptEncoder) -> None:
    """The tiny tokenizer was made from a list of words; three letters or more of them come back."""
    known = {word for word in tiny_models.words() if len(word) >= 3}
    found = whole_words(encoder.pairs[0][0], 10_000)
    assert known <= set(found)
    ids = encoder.tokenize(found)
    assert all(len(row) == 3 for row in ids)
    assert [row[1] for row in ids] == sorted(row[1] for row in ids)
    assert whole_words(encoder.pairs[0][0], 5) == found[:5]


def test_the_share_of_some_words_can_be_taken_out_again(encoder: PromptEncoder) -> None:
    cross, pooled, last = prior_moments(encoder, WORDS, 2)
    some, some_pooled, _ = prior_moments(encoder, WORDS[1:3], 2)
    rest, rest_pooled, _ = prior_moments(encoder, (WORDS[0], WORDS[3]), 2)
    torch.testing.assert_close(cross - some, rest)
    torch.testing.assert_close(pooled - some_pooled, rest_pooled)
    assert last.shape == (4, cross.shape[0])


def test_every_entry_has_weight_one(encoder: PromptEncoder) -> None:
    """The trace is the mean square of an entry's states, summed over the entries, whatever their lengths."""
    cross, _, _ = prior_moments(encoder, ["a red house by the river"], 3)
    states = encoder.encode(["a red house by the river"], 3)[0].states[1:]
    assert float(cross.trace()) == pytest.approx(float(states.double().square().sum(1).mean()), rel=1e-6)


def count_forward(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = PromptEncoder._forward

    def counted(self: PromptEncoder, rows: list[tuple[int, ...]], length: int) -> object:
        calls.append(len(rows))
        return original(self, rows, length)

    monkeypatch.setattr(PromptEncoder, "_forward", counted)
    return calls


def test_the_cache_is_used_and_its_key_covers_what_the_prior_depends_on(
    encoder: PromptEncoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REALERA_EDIT_CACHE", str(tmp_path / "own"))
    calls = count_forward(encoder, monkeypatch)
    mark = encoder.fingerprint()
    first = load_prior(encoder, WORDS, 2, mark)
    assert first is not None
    encoder._known.clear()
    count = len(calls)
    again = load_prior(encoder, WORDS, 2, mark)
    assert again is not None
    assert len(calls) == count
    assert torch.equal(first.cross, again.cross)
    assert torch.equal(first.last, again.last)
    load_prior(encoder, WORDS, 1, mark)
    load_prior(encoder, WORDS[:3], 2, mark)
    with torch.no_grad():
        next(encoder.pairs[1][1].parameters()).view(-1)[0] += 1
    changed = encoder.fingerprint()
    assert changed != mark
    load_prior(encoder, WORDS, 2, changed)
    assert len(list((tmp_path / "own").glob("prior-*.safetensors"))) == 4


def test_a_damaged_cache_costs_time_and_not_the_edit(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REALERA_EDIT_CACHE", str(tmp_path))
    first = load_prior(encoder, WORDS, 2, "x")
    (path,) = tmp_path.glob("prior-*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(RealEraWarning, match="damaged cache"):
        again = load_prior(encoder, WORDS, 2, "x")
    assert first is not None
    assert again is not None
    assert torch.equal(first.cross, again.cross)


def test_end_states_are_cached_by_their_words(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REALERA_EDIT_CACHE", str(tmp_path / "own"))
    calls = count_forward(encoder, monkeypatch)
    ends = load_ends(encoder, WORDS, "x")
    torch.testing.assert_close(ends, prior_moments(encoder, WORDS, 2)[2])
    count = len(calls)
    assert torch.equal(load_ends(encoder, WORDS, "x"), ends)
    assert len(calls) == count
    torch.testing.assert_close(load_ends(encoder, WORDS[::-1], "x"), ends.flip(0))
    assert len(calls) > count
    # a file that lacks what it should hold is a damaged one
    for path in (tmp_path / "own").iterdir():
        save_file({"other": torch.ones(1)}, path)
    with pytest.warns(RealEraWarning, match="damaged cache"):
        assert torch.equal(load_ends(encoder, WORDS, "x"), ends)


def test_no_words_no_prior(encoder: PromptEncoder) -> None:
    assert load_prior(encoder, [], 2, "x") is None


def line_prior() -> Prior:
    """Eight words on a circle, 45 degrees apart; their mean is the origin."""
    angle = torch.arange(8) * torch.pi / 4
    last = torch.stack([angle.cos(), angle.sin()], 1)
    return Prior(tuple("abcdefgh"), last, torch.eye(2, dtype=torch.float64), None)


def at(degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()])[None]


def mine(name: float, kept: list[float], **options: object) -> tuple[list[str], list[str]]:
    settings = {"inside": 3, "outside": 2, "threshold": 0.5, "skip": [set()]} | options
    states = torch.cat([at(k) for k in kept]) if kept else torch.empty(0, 2)
    (hood,) = mine_words(at(name), states, line_prior(), **settings)  # type: ignore[arg-type]
    return [w for w, _ in hood.inside], [w for w, _ in hood.outside]


def test_mining_takes_the_near_words_and_holds_the_next() -> None:
    assert mine(10, []) == (["a", "b", "h"], ["c", "g"])
    assert mine(10, [], inside=1) == (["a"], ["b", "h"])
    assert mine(10, [], threshold=0.95) == (["a"], ["b", "h"])
    assert mine(10, [], skip=[{"a"}]) == (["b", "h"], ["c", "g"])
    assert mine(10, [], inside=0, outside=0) == ([], [])


def test_a_word_nearer_to_what_is_kept_is_not_taken() -> None:
    assert mine(10, [40]) == (["a", "h"], ["c", "g"])
    # control: a kept state on the far side changes nothing
    assert mine(10, [180]) == (["a", "b", "h"], ["c", "g"])
