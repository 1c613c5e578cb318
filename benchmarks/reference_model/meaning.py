"""The text encoder's second training: a noun is read like the concept that is nearest to it in meaning.

It goes on from a finished model's text encoder (`refine --stage meaning`); a frozen copy of it gives the targets. A
noun's states go most of the way to those of the label that its teacher's vector is nearest to, the further the nearer
it is; those of the labels and of the shown aliases stay, so a U-Net that knows them needs no training for it. The nouns
are WordNet's, as in the first training, and only the teacher says which label is near: no list of aliases is read, and
no picture is seen.
"""

import copy
import dataclasses
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_model import text_encoder
from benchmarks.reference_model.pictures import DEFAULT_CACHE, STYLES, read_concepts
from benchmarks.reference_model.splits import find_wordnet
from benchmarks.reference_model.texts import PLAIN, STYLED, read_nouns, shown_aliases
from benchmarks.reference_model.training import Loss, Schedule, Trainer, autocast, best_device, device_of
from realera_edit.contexts import Span, align, find_span

SCHEDULE = Schedule(steps=4000, rate=1e-3, warmup=100, decay=0.9, average=0.995, seed=10)
TEMPLATES = (*PLAIN, *(t.replace("{style}", style) for style in STYLES for t in STYLED))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a batch is made of, and where its nouns go.

    held: share of the batch that are labels and shown aliases, which stay. plain: share of captions without a style.
    lean: how much of the way to its label the nearest noun goes; near: the cosines where a noun begins to go, and where
    it goes all of that. floor: how often a noun that stays is drawn, against one that goes all of it. tokens: most in a
    noun.
    """

    batch: int = 96
    held: float = 0.25
    plain: float = 0.5
    lean: float = 0.9
    near: tuple[float, float] = (0.42, 0.55)
    floor: float = 0.02
    tokens: int = 6


RECIPE = Recipe()


@dataclasses.dataclass(frozen=True)
class Words:
    """Names that stay, and nouns with the label each leans to and how far, 0 to 1."""

    held: list[str]
    nouns: list[str]
    nearest: list[str]
    shares: Tensor


class Reader:
    """A text encoder with its tokenizer; knows where a caption's name stands."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Tokenise what stands before and after the name in each template."""
        self.model, self.tokenizer = model, tokenizer
        halves = [t.split("{}") for t in TEMPLATES]
        self.ends = [[self._ids(half) for half in pair] for pair in halves]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, truncation=True).input_ids
        return ids

    def tokens(self, names: Sequence[str], templates: Sequence[int]) -> tuple[Tensor, list[Span]]:
        """(ids [n, LENGTH], span of each name) of names in templates, which are numbered."""
        texts = [TEMPLATES[t].format(name) for name, t in zip(names, templates, strict=True)]
        ids, ends = text_encoder.tokenize(self.tokenizer, texts)
        rows = [row[: end + 1] for row, end in zip(ids.tolist(), ends.tolist(), strict=True)]
        return ids, [find_span(row, *self.ends[t]) for row, t in zip(rows, templates, strict=True)]

    def states(self, ids: Tensor) -> Tensor:
        """Last hidden states, float32 [n, length, width]."""
        device = device_of(self.model)
        with autocast(device):
            states: Tensor = self.model(input_ids=ids.to(device)).last_hidden_state
        return states.float()


def leaned(own: Tensor, label: Tensor, noun: Span, other: Span, share: float) -> Tensor:
    """States [length, width] of a noun's caption, `share` of the way to those of its label's caption, where aligned."""
    length = len(own)
    pairs = [(i, min(j, length - 1)) for i, j in align(noun, other, length) if i < length]
    here, there = (list(places) for places in zip(*pairs, strict=True))
    moved = own.clone()
    moved[here] = torch.lerp(own[here], label[there], share)
    return moved


def read_words(reader: Reader, cache: Path, recipe: Recipe) -> Words:
    """Names and nouns, with the teacher's word on what each noun is nearest to."""
    labels = [concept.label.lower() for concept in read_concepts(cache / "pictures.json")]
    held = list(dict.fromkeys([*labels, *(name for names in shown_aliases().values() for name in names)]))
    nouns = list(dict.fromkeys(noun.lemma for noun in read_nouns(find_wordnet(cache))))
    known = text_encoder.teach(labels, cache).float()
    near, place = (text_encoder.teach(nouns, cache).float() @ known.T).max(1)
    low, high = recipe.near
    shares = recipe.lean * ((near - low) / (high - low)).clamp(0, 1)
    taken = set(held)
    kept = [
        i for i, noun in enumerate(nouns) if noun not in taken and len(reader.tokenizer.tokenize(noun)) <= recipe.tokens
    ]
    return Words(held, [nouns[i] for i in kept], [labels[int(place[i])] for i in kept], shares[kept])


def batch_loss(reader: Reader, frozen: Reader, words: Words, recipe: Recipe) -> Loss:
    """The error of the states, against their variance, from each name's first token on."""
    weights = (words.shares / recipe.lean).square() + recipe.floor
    count = round(recipe.batch * recipe.held)
    styled = len(TEMPLATES) - len(PLAIN)

    def loss(generator: torch.Generator) -> Tensor:
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        picked = torch.multinomial(weights, recipe.batch - count, generator=generator).tolist()
        held = draw.choices(words.held, k=count)
        names, labels = held + [words.nouns[i] for i in picked], held + [words.nearest[i] for i in picked]
        templates = [
            draw.randrange(len(PLAIN)) if draw.random() < recipe.plain else len(PLAIN) + draw.randrange(styled)
            for _ in names
        ]
        ids, spans = frozen.tokens(names, templates)
        other_ids, others = frozen.tokens(labels, templates)
        # the positions after the end token are read as well, but the first of them say most of it
        extra = 1 + int(text_encoder.LENGTH * draw.random() ** 3)
        length = min(text_encoder.LENGTH, max(span.end for span in spans + others) + extra)
        with torch.no_grad():
            own, label = frozen.states(torch.cat([ids, other_ids])[:, :length]).chunk(2)
            shares = [0.0] * count + [float(words.shares[i]) for i in picked]
            rows = zip(own, label, spans, others, shares, strict=True)
            target = torch.stack([leaned(*row) for row in rows])
        first = torch.tensor([span.start for span in spans], device=own.device)
        counted = torch.arange(length, device=own.device) >= first[:, None]
        error = (reader.states(ids[:, :length]) - target).square().mean(2) / own.var()
        return (error * counted).sum() / counted.sum()

    return loss


def trainer(
    cache: Path, model: Any, schedule: Schedule = SCHEDULE, recipe: Recipe = RECIPE, start: str = ""
) -> Trainer:
    """The trainer of a text encoder, known by `start`; at the state that the cache holds."""
    described = dataclasses.asdict(recipe) | {"start": start}
    path = cache / "training" / "text_encoder_second.safetensors"
    return Trainer(model.to(best_device()).train(), schedule, path, described)


def train(start: Path, cache: Path = DEFAULT_CACHE, until: int | None = None) -> Any:
    """The text encoder of the model at `start`, trained further."""
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(start, subfolder="text_encoder", dtype=torch.float32)
    frozen = copy.deepcopy(model).eval().to(best_device())
    weights = (start / "text_encoder" / "model.safetensors").read_bytes()
    run = trainer(cache, model, start=hashlib.sha256(weights).hexdigest()[:16])
    if run.step < (until or SCHEDULE.steps):
        tokenizer = text_encoder.load_tokenizer(start / "tokenizer")
        readers = Reader(run.module, tokenizer), Reader(frozen, tokenizer)
        run.run(batch_loss(*readers, read_words(readers[1], cache, RECIPE), RECIPE), until)
    run.finish()
    return run.module.eval().cpu()
