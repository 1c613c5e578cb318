"""What the peers share: text states, the weights that read them, and one ridge solve in float64.

Every peer's target is W times an embedding, so its edit of a weight W is W F with one factor F [d, d] for all layers;
what the papers solve layer by layer is solved once here, which gives each peer our speed. Only SPEED, whose null space
depends on the layer, goes through them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from realera_edit.anchors import PRESERVE_CONTEXTS
from realera_edit.contexts import Span, align, fill
from realera_edit.embeddings import PromptEncoder
from realera_edit.errors import SolveError
from realera_edit.pipeline import LoadedPipeline
from realera_edit.statistics import second_moment
from realera_edit.vocabulary import load_prior, prior_moments, whole_words

TOKENS = ("last", "all", "aligned", "after")
# A ridge below this share of the mean eigenvalue is raised to it: with fewer rows than d nothing else makes B regular.
LEAST_RIDGE = 1e-9


class ConceptLike(Protocol):
    """What a peer reads of a concept: its name, and what it becomes (None: the peer's own guide)."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every peer can be told, so that it can be given our contexts and our prior in place of its own setting.

    `guide`: what a concept without a target becomes. `tokens`: which states are erased, see `pairs_of`. `contexts`:
    templates with one "{}"; none is the bare name. `padding`: padding positions of "aligned" and "after" (None: all).
    `share`: the rows of one name, or of one kept entry, share a weight of one, as ours do; else each row counts one.
    `prior` [d, d]: a second moment of states to keep, in the solve with `prior_weight`. `roles`: "kv", "k" or "v".
    `kept`: "same" keeps retained names in the contexts, where `tokens` says; "last" the bare name's last token.
    `empty`: where an empty guide has no last token, take the position before it ("start": the start token, which is
    what a program gets that counts back from the end) or after it ("end").
    """

    guide: str = ""
    tokens: str = "last"
    contexts: tuple[str, ...] = ()
    padding: int | None = None
    share: bool = False
    prior: Tensor | None = None
    prior_weight: float = 1.0
    roles: str = "kv"
    kept: str = "same"
    empty: str = "start"

    def __post_init__(self) -> None:
        choices = {"tokens": TOKENS, "roles": ("kv", "k", "v"), "kept": ("same", "last"), "empty": ("start", "end")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Rows:
    """States to erase: x [n, d] shall map to where y [n, d] maps; `weight` [n]; all float64."""

    x: Tensor
    y: Tensor
    weight: Tensor


def pairs_of(here: Span, there: Span, options: Options, length: int) -> list[tuple[int, int]]:
    """Pairs (position in the concept's prompt, position in the target's) of `options.tokens`.

    "last": the last token of each phrase. "all": every position of the padded prompts, start token included, one on
    one. "aligned": ours, the phrase spread over the target's and all that follows. "after": only what follows.
    """
    if options.tokens == "all":
        return [(i, i) for i in range(length)]
    if options.tokens == "last":
        least = there.start if options.empty == "end" else 0
        return [(here.stop - 1, max(there.stop - 1, least))]
    padding = length if options.padding is None else options.padding
    if options.tokens == "aligned":
        pairs = align(here, there, padding)
    else:
        pairs = [(here.stop + i, there.stop + i) for i in range(here.end - here.stop + 1 + padding)]
    return [(i, j) for i, j in pairs if max(i, j) < length]


def erase_rows(encoder: PromptEncoder, concepts: Sequence[ConceptLike], options: Options) -> Rows:
    """The states of each concept (and of its aliases, if it has any) with those of its target."""
    templates = options.contexts or ("{}",)
    named = [(name, c) for c in concepts for name in getattr(c, "names", (c.name,))]
    texts = [(name, options.guide if c.target is None else c.target) for name, c in named]
    filled = [fill(template, text) for pair in texts for template in templates for text in pair]
    spans = encoder.spans(filled)
    states = [e.states for e in encoder.encode([f.prompt for f in filled], _padding(encoder, options))]
    x, y, counts = [], [], []
    for here, there, a, b in zip(spans[::2], spans[1::2], states[::2], states[1::2], strict=True):
        pairs = pairs_of(here, there, options, min(len(a), len(b)))
        x.append(a[[i for i, _ in pairs]])
        y.append(b[[j for _, j in pairs]])
        counts.append(len(pairs))
    return Rows(_stack(x, encoder), _stack(y, encoder), _weights(counts, len(templates), options))


def kept_rows(encoder: PromptEncoder, retain: Sequence[str], options: Options) -> tuple[Tensor, Tensor]:
    """States [m, d] of the retained names and their weights [m]: the last token, or every position.

    Of the contexts the first three are taken, as ours are. "aligned" and "after" leave out the start token.
    """
    if options.kept == "last":
        options = replace(options, tokens="last", contexts=())
    templates = options.contexts[:PRESERVE_CONTEXTS] or ("{}",)
    filled = [fill(template, name) for name in retain for template in templates]
    encoded = encoder.encode([f.prompt for f in filled], _padding(encoder, options))
    rows = []
    for span, one in zip(encoder.spans(filled), encoded, strict=True):
        if options.tokens == "last":
            rows.append(one.states[span.stop - 1][None])
        else:
            rows.append(one.states[int(options.tokens != "all") :])
    return _stack(rows, encoder), _weights(list(map(len, rows)), len(templates), options)


def _padding(encoder: PromptEncoder, options: Options) -> int:
    """Padding positions to encode: no more than are used."""
    if options.tokens == "last":
        return 0
    return encoder.max_length if options.padding is None or options.tokens == "all" else options.padding


def _weights(counts: Sequence[int], templates: int, options: Options) -> Tensor:
    """Weights of all rows, for `counts` rows in each filled template, `templates` of them to a name."""
    size = torch.tensor(list(counts), dtype=torch.float64)
    if not options.share:
        return torch.ones(int(size.sum()), dtype=torch.float64)
    total = size.view(-1, templates).sum(1).repeat_interleave(templates)
    return (1 / total).repeat_interleave(size.long())


def _stack(parts: Sequence[Tensor], encoder: PromptEncoder) -> Tensor:
    if not parts:
        parts = [encoder.encode([""])[0].states[:0]]
    return torch.cat(list(parts)).to("cpu", torch.float64)


def keep_moment(rows: Tensor, weight: Tensor, options: Options) -> Tensor:
    """sum_j b_j r_j r_j^T [d, d] of kept rows [m, d], with the prior."""
    second = second_moment(rows, weight)
    return second if options.prior is None else second + options.prior_weight * options.prior.to(second)


def vocabulary_prior(
    pipe: Any, erased: Sequence[str], words: int = 2000, padding: int = 2, device: str = "cpu"
) -> Tensor:
    """Our prior: the second moment [d, d] of the most frequent words' states, without the erased names."""
    encoder = LoadedPipeline(pipe).encoder
    listed = whole_words(encoder.pairs[0][0], words)
    prior = load_prior(encoder, listed, padding, encoder.fingerprint())
    if prior is None:
        raise SolveError("the tokenizer's vocabulary has no whole words: no prior can be made of it")
    gone = {name.lower() for name in erased}
    taken = [word for word in listed if word in gone]
    cross = prior.cross.to(device, torch.float64)
    return cross - prior_moments(encoder, taken, padding)[0].to(cross) if taken else cross


def ridge(rows: Rows, keep: Tensor, lam: float) -> Tensor:
    """The factor F [d, d] of W' = W F that minimises, for every W at once,

        sum_i a_i |W' x_i - W y_i|^2 + tr (W' - W) keep (W' - W)^T + lam |W' - W|^2

    F = (sum a y x^T + keep + lam I) B^-1 = I + (sum a (y - x) x^T) B^-1, B = sum a x x^T + keep + lam I.
    `scipy.linalg.solve(B, ..., assume_a="pos")`. Raises `SolveError`.
    """
    eye = torch.eye(len(keep), dtype=torch.float64)
    total = second_moment(rows.x, rows.weight) + keep
    lam = max(lam, LEAST_RIDGE * float(total.diagonal().mean()))
    return eye + divide((rows.y - rows.x).T @ (rows.x * rows.weight[:, None]), total + lam * eye)


def divide(left: Tensor, matrix: Tensor) -> Tensor:
    """`left` [m, d] times the inverse of the positive definite `matrix` [d, d], by Cholesky."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise SolveError("the peer's normal equations are not positive definite; raise its ridge")
    return torch.cholesky_solve(left.T, lower).T


def text_parameters(pipe: Any, roles: str = "kv") -> dict[str, torch.nn.Parameter]:
    """Name -> parameter [n, d] of the U-Net's cross-attention projections of the text."""
    parameters = dict(pipe.unet.named_parameters())
    found = LoadedPipeline(pipe).projections
    return {p.name: parameters[p.name] for p in found if p.role in roles and p.name in parameters}


@torch.no_grad()
def multiply(parameters: Sequence[torch.nn.Parameter], factor: Tensor) -> None:
    """W F in float64 in place of each W, cast once to its dtype."""
    for weight in parameters:
        write(weight, weight.data.to("cpu", torch.float64) @ factor)


@torch.no_grad()
def write(weight: torch.nn.Parameter, new: Tensor) -> None:
    """`new` [n, d] in place of a weight; `SolveError` where it does not fit into the weight's dtype."""
    cast = new.to(weight.dtype)
    if not bool(torch.isfinite(cast).all()):
        raise SolveError(f"the peer's edit overflows {weight.dtype}; raise its ridge")
    weight.data.copy_(cast)
