"""What a record, a recipe in a header and an edit file may hold, checked once, where each is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .config import EditConfig, known_options
from .errors import ConfigError

# Raises `ValueError` with the place of what is wrong.
Form = Callable[[Any, str], None]
# Nothing of ours is nested deeper; what is would end the stack of whatever walks through it later.
_DEEPEST = 64


def check(data: Any, form: Form) -> None:
    """Raise `ValueError`, naming the place, where `data` does not have the `form`, or could not be written as JSON."""
    _writable(data, "it", 0)
    form(data, "")


def _writable(value: Any, at: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{at} has half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _writable(key, "a key", depth)
            _writable(item, repr(key), depth + 1)
    elif isinstance(value, list):
        for item in value:
            _writable(item, at, depth + 1)


def _wrong(value: Any, at: str, expected: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{at or 'it'} is {shown if len(shown) <= 40 else shown[:37] + '...'}, expected {expected}")


def _text(value: Any, at: str) -> None:
    if not isinstance(value, str):
        raise _wrong(value, at, "text")


def _number(value: Any, at: str) -> None:
    # beyond 64 bits an integer is none of ours, and may be none that a float can hold
    if not isinstance(value, float) and not (type(value) is int and abs(value) < 2**63):
        raise _wrong(value, at, "a number")


def _count(value: Any, at: str) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _wrong(value, at, "a whole number")


def anything(value: Any, at: str) -> None:
    """Whatever can be written as JSON."""


def _or_none(form: Form) -> Form:
    def checked(value: Any, at: str) -> None:
        if value is not None:
            form(value, at)

    return checked


def _list(form: Form, least: int = 0) -> Form:
    def checked(value: Any, at: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise _wrong(value, at, "a list" + " that is not empty" * bool(least))
        for number, item in enumerate(value):
            form(item, f"{at}[{number}]")

    return checked


def _map(form: Form) -> Form:
    def checked(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, at, "a mapping")
        for key, item in value.items():
            form(item, f"{at}[{key!r}]")

    return checked


def _fields(needed: Mapping[str, Form], others: Mapping[str, Form] | None = None) -> Form:
    """A mapping with the keys `needed`, and perhaps `others`; keys that are in neither are not looked at."""

    def checked(value: Any, at: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, at, "a mapping")
        for key, form in needed.items():
            if key not in value:
                raise ValueError(f"{at and at + ' '}has no {key!r}".strip())
            form(value[key], f"{at}.{key}" if at else key)
        for key, form in (others or {}).items():
            if key in value:
                form(value[key], f"{at}.{key}" if at else key)

    return checked


def _config(value: Any, at: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(value, at, "a mapping")
    try:
        EditConfig.of({name: option for name, option in value.items() if name in known_options()})
    except ConfigError as error:
        raise ValueError(f"{at}: {error}") from error


def _step(value: Any, at: str) -> None:
    """How an edit was computed from others."""
    kinds = {"scale": _number, "invert": anything, "compose": _list(_part)}
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= kinds.keys():
        raise _wrong(value, at, "one of scale, invert and compose")
    for kind, inner in value.items():
        kinds[kind](inner, f"{at}.{kind}")


def _part(value: Any, at: str) -> None:
    _fields({"config": _config, "history": _list(_step), "concepts": _list(_text)})(value, at)


_NUMBERS = _map(_number)
_CONCEPT: dict[str, Form] = {"name": _text, "target": _text, "aliases": _list(_text)}
_MEASURED = {**_CONCEPT, "residual": _NUMBERS, "near": _NUMBERS, "words": _NUMBERS}
_OWN = {"strength": _or_none(_number), "kind": _or_none(_text)}
_SPACE = _fields(
    {"condition": _number, "jitter": _number, "ridge": _number, "form": _text, "rank": _count, "width": _count}
)
_ROLES = ("k", "v", "pooled")
_COUNTS = _fields({f"{role}_{what}": _count for role in _ROLES for what in ("found", "edited")})
_LICENCE = _map(anything)  # as the unedited model's card has it
_NAMES: dict[str, Form] = {"revision": _text, "hub_id": _text, "license": _LICENCE}
_MADE = _fields({"made_from": _text}, {**_NAMES, "history": _list(_step)})
_TOLD: dict[str, Form] = {
    **_NAMES, "prior": _list(_text), "dtype": _text, "versions": _map(_text), "applied": _MADE,
}  # fmt: skip
_EDIT: dict[str, Form] = {
    "realera_edit": _text,
    "model": _text,
    "config": _config,
    "concepts": _list(_fields(_MEASURED, _OWN), 1),
    "preserve": _list(_text),
    "drift": _map(_fields({"mean": _number, "worst": _number})),
    "spaces": _fields({"cross": _SPACE}, {"pooled": _SPACE}),
    "text_encoder": _text,
}
_HASHES = _map(_map(_fields({"before": _text, "after": _text})))
_RECORD: dict[str, Form] = {**_EDIT, "projections": _COUNTS, "tensors": _HASHES}
_HEADER: dict[str, Form] = {"version": _text, "config": _config, "concepts": _list(_fields(_CONCEPT, _OWN), 1)}
_HEADER_TOLD: dict[str, Form] = {**_TOLD, "model": _text, "lora": _text, "preserve": _list(_text)}


_ENCODER = _fields(
    {"width": _count, "pooled": _or_none(_count), "structure": _text, "float16": _text, "bfloat16": _text}
)


def recipe(value: Any, at: str) -> None:
    """What a header or a record tells of one edit: its whole record, or where no more is left, its recipe."""
    whole = isinstance(value, dict) and "tensors" in value
    needed, told = (_RECORD, _TOLD) if whole else (_HEADER, _HEADER_TOLD)
    _fields(needed, {**told, "previous": _list(recipe)})(value, at)


def record(value: Any, at: str) -> None:
    """The record of an edited model."""
    _fields({"tensors": _HASHES})(value, at)
    recipe(value, at)


# The recipe of an edit file.
edit = _fields({**_EDIT, "history": _list(_step), "encoders": _list(_ENCODER, 1)}, _TOLD)
