"""Prompts to text-encoder states, as the pipeline feeds them to its denoiser, at the least length that is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from .contexts import Filled, Span, find_span
from .errors import EncodingError

BATCH_TOKENS = 8192


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
    """

    pairs: Sequence[tuple[Any, Any]]
    penultimate: bool = False
    progress: bool = False
    _known: dict[tuple[str, int], Encoded] = field(default_factory=dict, repr=False)

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
        rows = [tuple(ids) for ids in _ids(self.pairs[0][0], prompts)]
        for tokenizer, _ in self.pairs[1:]:
            if [tuple(ids) for ids in _ids(tokenizer, prompts)] != rows:
                raise EncodingError("the model's two tokenizers split the same text differently; this is not supported")
        tokenizer = self.pairs[0][0]
        for prompt, ids in zip(prompts, rows, strict=True):
            if len(ids) > self.max_length:
                raise EncodingError(
                    f"{_short(prompt)} is {len(ids)} tokens long, the text encoder reads {self.max_length}: what "
                    "follows would be cut off in silence. Shorten the name, or use shorter contexts"
                )
            if tokenizer.unk_token_id in ids[1:-1] or tokenizer.eos_token_id in ids[1:-1]:
                raise EncodingError(f"{_short(prompt)} has characters that the model's tokenizer cannot represent")
        return rows

    def spans(self, filled: Sequence[Filled]) -> list[Span]:
        """Token positions of the phrase in each filled template."""
        texts = list(dict.fromkeys(t for f in filled for t in (f.prompt, f.head.strip(), f.tail.strip())))
        ids = dict(zip(texts, self.tokenize(texts), strict=True))
        return [find_span(ids[f.prompt], ids[f.head.strip()], ids[f.tail.strip()]) for f in filled]

    def encode(self, prompts: Sequence[str], padding: int = 0, label: str = "encoding") -> list[Encoded]:
        """States of each prompt with up to `padding` padding positions. Nothing is encoded twice."""
        wanted = [prompt for prompt in dict.fromkeys(prompts) if (prompt, padding) not in self._known]
        rows = self.tokenize(wanted)
        padded = [self._pad(ids, padding) for ids in rows]
        order = sorted(range(len(wanted)), key=lambda i: len(padded[i]))
        with tqdm(total=len(order), desc=label, unit="prompt", delay=1, leave=False, disable=not self.progress) as bar:
            start = 0
            while start < len(order):
                stop = start + 1
                while stop < len(order) and (stop + 1 - start) * len(padded[order[stop]]) <= BATCH_TOKENS:
                    stop += 1
                batch = order[start:stop]
                states, pooled = self._forward([rows[i] for i in batch], len(padded[batch[-1]]))
                for place, i in enumerate(batch):
                    self._known[wanted[i], padding] = Encoded(
                        rows[i],
                        states[place, : len(padded[i])].clone(),
                        None if pooled is None else pooled[place].clone(),
                    )
                bar.update(len(batch))
                start = stop
        return [self._known[prompt, padding] for prompt in prompts]

    def _pad(self, ids: tuple[int, ...], padding: int) -> range:
        return range(min(len(ids) + padding, self.max_length))

    @torch.inference_mode()
    def _forward(self, rows: list[tuple[int, ...]], length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States [n, length, d] and pooled [n, d_pooled] of token rows, padded to `length`."""
        parts, pooled = [], None
        for tokenizer, model in self.pairs:
            device = model.device
            pad = tokenizer.pad_token_id
            ids = torch.tensor([list(row) + [pad] * (length - len(row)) for row in rows], device=device)
            mask = None
            if getattr(model.config, "use_attention_mask", False):
                sizes = torch.tensor([len(row) for row in rows], device=device)
                mask = (torch.arange(length, device=device)[None] < sizes[:, None]).long()
            out = model(ids, attention_mask=mask, output_hidden_states=self.penultimate)
            parts.append((out.hidden_states[-2] if self.penultimate else out.last_hidden_state).float())
            if self.penultimate and getattr(out, "text_embeds", None) is not None:
                pooled = out.text_embeds.float()
        return torch.cat(parts, dim=-1), pooled

    def fingerprint(self) -> str:
        """SHA-256 over the tokenizers and every encoder weight (dtype, shape and bytes): what a state depends on."""
        digest = hashlib.sha256(f"penultimate={self.penultimate}".encode())
        for tokenizer, model in self.pairs:
            digest.update(repr((tokenizer.pad_token_id, sorted(tokenizer.get_vocab().items()))).encode())
            digest.update(str(getattr(model.config, "hidden_act", "")).encode())
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    # verbose=False: the length is checked by us, with an error in place of the tokenizer's log line
    ids: list[list[int]] = tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
