"""Whole words of the tokenizer's own vocabulary: the neighbours of a concept, and the broad prior to keep."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contexts import fill
from .embeddings import PromptEncoder
from .errors import RealEraWarning
from .statistics import second_moment

CACHE_VERSION = "1"
PRIOR_CONTEXTS = ("{}", "a photo of {}", "a picture of {a}", "a drawing of {a}", "{a} in the background")


@dataclass(frozen=True)
class Prior:
    """What the prior remembers: the words or prompts, and the states of each bare word.

    `words`: its entries. `last` [words, d]: the end token's state of each bare entry, by which neighbours are found.
    `cross`, `pooled`: second moments of the two text spaces (pooled None without one).
    """

    words: tuple[str, ...]
    last: Tensor
    cross: Tensor
    pooled: Tensor | None


def whole_words(tokenizer: Any, limit: int) -> list[str]:
    """The `limit` most frequent whole words of a CLIP vocabulary: alphabetic, three letters or more.

    A byte-level BPE numbers its merges by frequency, so a lower id is a more frequent word. Of a plural or other
    form nothing is dropped: it is a word of its own.
    """
    entries = sorted((i, token) for token, i in tokenizer.get_vocab().items() if token.endswith("</w>"))
    words = (token[: -len("</w>")] for _, token in entries)
    return [word for word in words if len(word) >= 3 and word.isascii() and word.isalpha()][:limit]


def prior_prompts(words: Sequence[str]) -> list[tuple[str, str]]:
    """(entry alone, entry in a context) for each entry. A whole prompt is its own context.

    The context depends on the entry alone, so that its share can be taken out of the sum again.
    """
    return [(word, fill(_prior_context(word), word).prompt) for word in words]


def _prior_context(word: str) -> str:
    return "{}" if " " in word else PRIOR_CONTEXTS[zlib.crc32(word.encode()) % len(PRIOR_CONTEXTS)]


def prior_moments(encoder: PromptEncoder, words: Sequence[str], padding: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Second moments of the cross [d, d] and pooled space, and the end states [words, d] of the bare words.

    Each entry has weight one: its prompts share it, and so do the positions after the start token in a prompt.
    """
    prompts = [prompt for pair in prior_prompts(words) for prompt in pair]
    encoded = encoder.encode(prompts, padding, label="prior")
    rows = torch.cat([e.states[1:] for e in encoded])
    weight = torch.cat([e.states.new_full((len(e.states) - 1,), 0.5 / (len(e.states) - 1)) for e in encoded])
    pooled = None
    if encoded[0].pooled is not None:
        pooled = second_moment(torch.stack([e.pooled for e in encoded if e.pooled is not None])) / 2
    last = torch.stack([e.states[len(e.ids) - 1] for e in encoded[::2]])
    return second_moment(rows, weight), pooled, last


def cache_folder() -> Path:
    """Where prior statistics are kept: `REALERA_EDIT_CACHE`, else `XDG_CACHE_HOME` or `~/.cache`, `/realera_edit`."""
    own = os.environ.get("REALERA_EDIT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realera_edit"


def load_prior(encoder: PromptEncoder, words: Sequence[str], padding: int, fingerprint: str) -> Prior | None:
    """The prior over `words`, from the disk cache or computed and cached; None for no words. Its tensors are the CPU's.

    The cache's key covers the encoder's weights, dtype and tokenizer (`fingerprint`), the prompts, the padding, the
    kind of the device and the version of this code. A damaged or unwritable cache costs time, never the edit.
    """
    if not words:
        return None

    def compute(alone: PromptEncoder) -> dict[str, Tensor]:
        cross, pooled, last = prior_moments(alone, words, padding)
        return {"cross": cross, "last": last} | ({} if pooled is None else {"pooled": pooled})

    found = _cached("prior", ("cross", "last"), encoder, (fingerprint, padding, prior_prompts(words)), compute)
    return Prior(tuple(words), found["last"], found["cross"], found.get("pooled"))


def load_ends(encoder: PromptEncoder, words: Sequence[str], fingerprint: str) -> Tensor:
    """The end token's state [words, d] of each bare word, on the CPU, cached as the prior is."""

    def compute(alone: PromptEncoder) -> dict[str, Tensor]:
        encoded = alone.encode(words, label="vocabulary")
        return {"last": torch.stack([e.states[len(e.ids) - 1] for e in encoded])}

    return _cached("ends", ("last",), encoder, (fingerprint, tuple(words)), compute)["last"]


def _cached(
    name: str,
    needed: Sequence[str],
    encoder: PromptEncoder,
    about: tuple[Any, ...],
    compute: Callable[[PromptEncoder], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Tensors of the CPU that `about` decides, `needed` and maybe others, from the disk cache or from `compute`."""
    kind = encoder.pairs[0][1].device.type
    where = () if kind == "cpu" else (kind,)  # another device rounds otherwise
    key = hashlib.sha256(repr((CACHE_VERSION, torch.__version__, *about, *where)).encode()).hexdigest()
    path = cache_folder() / f"{name}-{key[:32]}.safetensors"
    try:
        from safetensors.torch import load_file

        stored: dict[str, Tensor] = load_file(path)
        if lacking := [part for part in needed if part not in stored]:
            raise KeyError(lacking[0])
        return stored
    except FileNotFoundError:
        pass
    except Exception as error:  # whatever is wrong with a cache file, computing again mends it
        warnings.warn(f"{path}: damaged cache ({error}); computed again", RealEraWarning, stacklevel=3)
    # a memory of its own: with the cache warm or cold, the rest of the edit sees the same batches, to the bit
    found = {part: tensor.cpu() for part, tensor in compute(replace(encoder, _known={})).items()}
    _store(path, found, name)
    return found


def _store(path: Path, tensors: dict[str, Tensor], name: str) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except Exception as error:
        warnings.warn(f"{path}: the {name} could not be cached ({error})", RealEraWarning, stacklevel=2)


def similarity(states: Tensor, bank: Tensor, centre: Tensor) -> Tensor:
    """Centred cosine [n, m] between the rows of `states` [n, d] and `bank` [m, d].

    End-token states share a large common part; without `centre` [d] (the bank's mean) removed, every word is near
    to every other.
    """
    return torch.nn.functional.normalize(states - centre, dim=1) @ torch.nn.functional.normalize(bank - centre, dim=1).T


@dataclass(frozen=True)
class Neighbourhood:
    """Vocabulary words around one name, with their similarities: those erased with it, and those just outside."""

    inside: tuple[tuple[str, float], ...]
    outside: tuple[tuple[str, float], ...]


def mine_words(
    names: Tensor, kept: Tensor, prior: Prior, *, inside: int, outside: int, threshold: float, skip: Sequence[set[str]]
) -> list[Neighbourhood]:
    """The vocabulary neighbourhood of each name.

    `names` [n, d] and `kept` [k, d] are end states. A word goes with the name when its similarity reaches
    `threshold`, it is among the `inside` nearest, and it is nearer to the name than to any kept state; the next
    `outside` words are the rim that is held. `skip`: words that are the name, its target or an alias.
    """
    centre = prior.last.mean(0)
    near = similarity(names, prior.last, centre)
    rival = similarity(kept, prior.last, centre).amax(0) if len(kept) else near.new_full((len(prior.words),), -2.0)
    result = []
    for row, forbidden in zip(near, skip, strict=True):
        chosen: list[tuple[str, float]] = []
        rim: list[tuple[str, float]] = []
        for place in torch.argsort(row, descending=True).tolist():
            word, value = prior.words[place], float(row[place])
            if word in forbidden:
                continue
            if value >= threshold and len(chosen) < inside:
                if value > float(rival[place]):
                    chosen.append((word, value))
            elif len(rim) < outside:
                rim.append((word, value))
            else:
                break
        result.append(Neighbourhood(tuple(chosen), tuple(rim)))
    return result
