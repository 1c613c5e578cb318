"""Prompts to text-encoder states, as the pipeline feeds them to its denoiser, at the least length that is needed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from .contexts import Filled, Span, find_span, is_text
from .errors import CheckpointError, EncodingError
from .precision import full_precision
from .prefixes import batches, encode_rows
from .tensorfile import all_finite

# Distinct prefixes in one batch: what fits a CPU's caches, and what fills a GPU.
CPU_PREFIXES = 1024
GPU_PREFIXES = 8192
CACHE_LINE = 64
SINGLE_PRECISION = ("mps",)  # devices without float64, in which all is solved: states from there are the CPU's


@dataclass(frozen=True)
class Encoded:
    """States of one prompt: `states` [positions, d] float32, `pooled` [d_pooled] or None.

    Positions are the prompt's tokens, start and end token included, then padding.
    """

    ids: tuple[int, ...]
    states: torch.Tensor
    pooled: torch.Tensor | None


@dataclass
class PromptEncoder:
    """The text encoders of one checkpoint, used together as its pipeline uses them.

    `pairs` are (tokenizer, CLIP text model). One encoder alone gives its last hidden state (Stable Diffusion 1.x and
    2.x); with `penultimate`, the last but one hidden state of each, concatenated over the width, and the pooled
    projection of the last encoder (SDXL). States of CLIP are causal: a position depends on none after it, so a
    prompt is encoded to its own length plus the padding that is asked for, never to the full 77.

    `dtype`: what to compute in, whatever the weights are stored in; None: as they are stored. The models are not
    changed: copies take their weights' places meanwhile.
    """

    pairs: Sequence[tuple[Any, Any]]
    penultimate: bool = False
    progress: bool = False
    dtype: torch.dtype | None = None
    _known: dict[tuple[str, int], Encoded] = field(default_factory=dict, repr=False)
    _copies: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def max_length(self) -> int:
        """Positions of the longest prompt, start and end token included."""
        return min(
            min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
            for tokenizer, model in self.pairs
        )

    def tokenize(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids with start and end token; `EncodingError` for a prompt that is too long or not representable."""
        if not prompts:
            return []
        for prompt in prompts:
            if not is_text(prompt):
                raise EncodingError(f"{_short(prompt)} is not text: half of a surrogate pair; give it as UTF-8")
        rows = [tuple(ids) for ids in _ids(self.pairs[0][0], prompts)]
        for tokenizer, _ in self.pairs[1:]:
            if [tuple(ids) for ids in _ids(tokenizer, prompts)] != rows:
                raise EncodingError("the model's two tokenizers split the same text differently; this is not supported")
        tokenizer = self.pairs[0][0]
        self._check_known(rows)
        for prompt, ids in zip(prompts, rows, strict=True):
            if len(ids) > self.max_length:
                raise EncodingError(
                    f"{_short(prompt)} is {len(ids)} tokens long, the text encoder reads {self.max_length}: what "
                    "follows would be cut off in silence. Shorten the name, or use shorter contexts"
                )
            if tokenizer.unk_token_id in ids[1:-1] or tokenizer.eos_token_id in ids[1:-1]:
                raise EncodingError(f"{_short(prompt)} has characters that the model's tokenizer cannot represent")
        return rows

    def _check_known(self, rows: Sequence[tuple[int, ...]]) -> None:
        """`CheckpointError` for a token that an encoder has no row for: of a damaged tokenizer, or another model's."""
        used = {token for ids in rows for token in ids}
        for tokenizer, model in self.pairs:
            count, where = int(model.get_input_embeddings().num_embeddings), _place(tokenizer, "the tokenizer")
            if tokenizer.pad_token_id is None:
                raise CheckpointError(f"{where}: has no padding token; take a sound copy")
            strange = [token for token in (tokenizer.pad_token_id, *sorted(used)) if not 0 <= token < count]
            if strange:
                raise CheckpointError(
                    f"{where}: gives {tokenizer.convert_ids_to_tokens(strange[0])!r} the number {strange[0]}, and the "
                    f"text encoder knows {count} tokens: it is damaged, or another model's; take a sound copy"
                )

    def spans(self, filled: Sequence[Filled]) -> list[Span]:
        """Token positions of the phrase in each filled template."""
        texts = list(dict.fromkeys(t for f in filled for t in (f.prompt, f.head.strip(), f.tail.strip())))
        ids = dict(zip(texts, self.tokenize(texts), strict=True))
        return [find_span(ids[f.prompt], ids[f.head.strip()], ids[f.tail.strip()]) for f in filled]

    def encode(self, prompts: Sequence[str], padding: int = 0, label: str = "encoding") -> list[Encoded]:
        """States of each prompt with up to `padding` padding positions. Nothing is encoded twice."""
        wanted = [prompt for prompt in dict.fromkeys(prompts) if (prompt, padding) not in self._known]
        rows = self.tokenize(wanted)
        lengths = [min(len(ids) + padding, self.max_length) for ids in rows]
        limit = CPU_PREFIXES if self.pairs[0][1].device.type == "cpu" else GPU_PREFIXES
        padded = [ids + (-1,) * (length - len(ids)) for ids, length in zip(rows, lengths, strict=True)]
        bar = tqdm(total=len(rows), desc=label, unit="prompt", delay=1, leave=False, disable=not self.progress)
        with bar, self._prepared():
            for batch in batches(padded, limit):
                states, pooled = self._forward([rows[i] for i in batch], [lengths[i] for i in batch])
                for place, i in enumerate(batch):
                    top = None if pooled is None else pooled[place].clone()
                    self._known[wanted[i], padding] = Encoded(rows[i], states[place], top)
                bar.update(len(batch))
        return [self._known[prompt, padding] for prompt in prompts]

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """Meanwhile weights are of `dtype`, and on the CPU start at a cache line; then each is as and where it was.

        Where a mapped file puts a weight depends on the file's header, and products of weights that start elsewhere
        round otherwise on some processors: one encoder would give other bits from another file.
        """
        weights = [w for _, model in self.pairs for w in model.parameters() if w.is_floating_point()]
        moved = [(w, w.data) for w in weights if not self._fits(w)]
        try:
            for weight, data in moved:
                if id(weight) not in self._copies:
                    self._copies[id(weight)] = data.to(self.dtype or data.dtype, copy=True)
                weight.data = self._copies[id(weight)]
            yield
        finally:
            for weight, data in moved:
                weight.data = data

    def _fits(self, weight: torch.Tensor) -> bool:
        return weight.dtype == (self.dtype or weight.dtype) and (
            weight.device.type != "cpu" or weight.data_ptr() % CACHE_LINE == 0
        )

    def release(self) -> None:
        """Free the copies of weights; they are made anew when they are needed."""
        self._copies.clear()

    @full_precision()
    @torch.inference_mode()
    def _forward(
        self, rows: list[tuple[int, ...]], lengths: list[int]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """States [length, d] of each token row, padded to its length, and pooled [n, d_pooled]."""
        parts, pooled = [], None
        for tokenizer, model in self.pairs:
            pad = tokenizer.pad_token_id
            padded = [row + (pad,) * (length - len(row)) for row, length in zip(rows, lengths, strict=True)]
            # SDXL's pipeline never passes a mask, whatever its encoders' configurations say
            if getattr(model.config, "use_attention_mask", False) and not self.penultimate:
                states, top = self._masked(model, rows, padded), None
            else:
                states, top = encode_rows(model, padded, self.penultimate, [len(row) - 1 for row in rows])
            # of finite weights, too: a damaged configuration, or half precision that overflows
            if not all_finite(torch.cat(states)) or not (top is None or all_finite(top)):
                raise CheckpointError(
                    f"{_place(model, 'the text encoder')}: its states contain NaN or inf, though its weights do not: "
                    f"config.json is damaged, or {model.dtype} too narrow; take a sound copy, or compute in float32"
                )
            parts.append(states)
            pooled = top.float() if top is not None else pooled
        found = [torch.cat([part[i] for part in parts], dim=-1).float() for i in range(len(rows))]
        if found[0].device.type in SINGLE_PRECISION:
            return [states.cpu() for states in found], None if pooled is None else pooled.cpu()
        return found, pooled

    def _masked(self, model: Any, rows: list[tuple[int, ...]], padded: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """As `encode_rows`, for an encoder that does not attend to padding: the model's own forward, with its mask."""
        length = max(map(len, padded))
        ids = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in padded], device=model.device)
        sizes = torch.tensor([len(row) for row in rows], device=model.device)
        mask = (torch.arange(length, device=model.device)[None] < sizes[:, None]).long()
        states = model(ids, attention_mask=mask).last_hidden_state
        return [states[i, : len(row)] for i, row in enumerate(padded)]

    def fingerprint(self) -> str:
        """SHA-256 over the tokenizers and every encoder weight (dtype, shape and bytes): what a state depends on.

        The weights are those that it computes with, so one encoder has one fingerprint, from a file or a pipeline.
        """
        digest = hashlib.sha256(f"penultimate={self.penultimate}".encode())
        with self._prepared():
            for tokenizer, model in self.pairs:
                digest.update(repr((tokenizer.pad_token_id, sorted(tokenizer.get_vocab().items()))).encode())
                digest.update(str(getattr(model.config, "hidden_act", "")).encode())
                for name, tensor in sorted(model.state_dict().items()):
                    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _place(part: Any, otherwise: str) -> str:
    """Where a tokenizer or model was loaded from, as far as it tells."""
    return str(getattr(part, "name_or_path", "") or otherwise)


def _ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    # verbose=False: the length is checked by us, with an error in place of the tokenizer's log line
    ids: list[list[int]] = tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
