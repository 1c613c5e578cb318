"""A CLIP tokenizer with a vocabulary of its own: byte-level BPE, trained on generated text.

Layout as in the public one: 256 bytes, 256 bytes that end a word, the merges in order, then the start and the end
token as the last two ids. The words are common English ones, then pronounceable invented ones.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 256
# Words of the embedded text, frequent ones first; prompts are made of them.
_TEXT = """
a of the in an photo picture painting drawing icon style by with on and image portrait art simple table background
object person event smiling man woman child people face cat dog bird horse fish bear lion tiger wolf fox rabbit mouse
cow sheep pig goat duck chicken elephant monkey snake frog turtle bee butterfly flower tree grass leaf forest mountain
river lake ocean beach island desert sky cloud rain snow storm sun moon star earth fire water ice stone sand wood metal
glass gold silver paper cloth red orange yellow green blue purple pink brown black white gray dark light bright small
large big little old new young tall short long round square flat deep high low hot cold warm cool wet dry soft hard
house home building castle church bridge tower road street city town village park garden room kitchen door window wall
floor roof chair bed lamp clock mirror book pen pencil letter map box bag cup plate bowl bottle knife fork spoon food
bread cheese meat egg milk apple banana lemon cherry grape strawberry pizza burger cake cookie chocolate candy coffee
tea juice wine beer car truck bus train plane boat ship bike wheel engine rocket robot phone computer camera screen
keyboard music guitar piano drum violin song dance game ball toy doll card king queen knight soldier doctor nurse
teacher student farmer artist singer actor chef pilot sailor hand foot head eye ear nose mouth hair arm leg heart
summer winter spring autumn day night morning evening time year happy sad angry funny cute pretty beautiful ugly
strong weak fast slow
"""
ENGLISH = tuple(_TEXT.split())
_ONSETS = ("b", "br", "ch", "d", "dr", "f", "g", "h", "j", "k", "kl", "l", "m", "n", "p", "r", "s", "st", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "", "", "n", "l", "r", "s", "m", "k")


def invented_words(seed: int = 0) -> Iterator[str]:
    """Distinct pronounceable words of two or three syllables, none of them in `ENGLISH`."""
    draw, seen = random.Random(seed), set(ENGLISH)
    for _ in itertools.repeat(None):
        sounds = [(draw.choice(_ONSETS), draw.choice(_VOWELS), draw.choice(_CODAS)) for _ in range(draw.choice((2, 3)))]
        word = "".join(itertools.chain.from_iterable(sounds))
        if word not in seen:
            seen.add(word)
            yield word


def invented_names(count: int, seed: int = 1) -> list[str]:
    """`count` distinct names of two words, as concepts to erase: one that is a token of its own, one that is not."""
    return [f"{a} {b}" for a, b in itertools.islice(zip(invented_words(0), invented_words(seed), strict=True), count)]


def byte_symbols() -> list[str]:
    """The character that stands for each byte, in the order of the public vocabulary ("!" first)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(BYTES) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(BYTES + place) for place in range(len(rest))]


def train_merges(words: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Up to `count` merges of a BPE trained on `words`, the frequent first: word r occurs about 1 / r as often."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.trainers import BpeTrainer

    symbols = byte_symbols()
    first = [*symbols, *(symbol + "</w>" for symbol in symbols)]  # fixed ids, or ties are broken at random
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=len(first) + count,
        min_frequency=0,
        special_tokens=first,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    lines = (f"{word} " * max(1, 5000 // (rank + 1)) for rank, word in enumerate(words))
    tokenizer.train_from_iterator(lines, trainer)
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]][:count]


def vocabulary(size: int, seed: int = 0) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges) of a vocabulary of exactly `size` tokens."""
    count = size - 2 * BYTES - 2
    extra = count if count > 4000 else max(0, (count - len(ENGLISH)) // 4)
    words = [*ENGLISH, *itertools.islice(invented_words(seed), extra)]
    merges = train_merges(words, count)
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(a + b for a, b in merges)]
    tokens += [f"<|unused{place}|>" for place in range(size - 2 - len(tokens))]
    tokens += [START, END]
    table = {token: place for place, token in enumerate(tokens)}
    if len(table) != size:
        raise RuntimeError(f"the vocabulary has {len(table)} distinct tokens, not {size}")
    return table, merges


def write_tokenizer(folder: Path, size: int, pad: str = END, length: int = 77, seed: int = 0) -> None:
    """Write a tokenizer folder of the public layout: vocab.json, merges.txt and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    table, merges = vocabulary(size, seed)
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {**special, "model_max_length": length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")


def load_tokenizer(size: int, pad: str = END, length: int = 77, seed: int = 0) -> Any:
    """A `CLIPTokenizer` of `size` tokens."""
    import tempfile

    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), size, pad, length, seed)
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
