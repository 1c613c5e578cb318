"""Hypothesis strategies that damage files: safetensors by header, length, offsets and values; JSON; any bytes."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
HUGE = (2**31, 2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I8", "BOOL", "F4", "U128", "f32", "")
_WRONG: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 0.5, 1e308, float("nan"), float("inf"), [], {}, [[]], {"a": 1}]),
    st.sampled_from(["", "x", "../unet", "/etc/passwd", "a\0b", "\ud800", "NaN", "F16", *map(str, HUGE)]),
    st.sampled_from([*HUGE, *(-n for n in HUGE), 10**400]),
    st.integers(-5, 5000),
    st.text(max_size=6),
    st.lists(st.integers(-2, 2**40), max_size=4),
)
# In place of a value; what `json.dumps` would not write.
_RAW = ("[" * 3000 + "]" * 3000, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "9" * 5000, "-Infinity", "1e999", "")


@st.composite
def spoilt_bytes(draw: Draw, content: bytes) -> bytes:
    """Some bytes changed, cut off, put in or left out."""
    data = bytearray(content)
    way = draw(st.sampled_from(["flip", "flip", "cut", "append", "insert", "remove", "empty", "swap"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    size = draw(st.integers(1, 64))
    if way == "flip":
        for place in draw(st.lists(st.integers(0, max(len(data) - 1, 0)), min_size=1, max_size=4)):
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
    elif way == "cut":
        del data[at:]
    elif way == "append":
        data += draw(st.binary(min_size=1, max_size=64))
    elif way == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=64))
    elif way == "remove":
        del data[at : at + size]
    elif way == "swap":
        data[at : at + 2 * size] = data[at + size : at + 2 * size] + data[at : at + size]
    return b"" if way == "empty" else bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, key) for key, _ in items]
    for _, inner in items:
        if isinstance(inner, (dict, list)):
            found += _places(inner)
    return found


@st.composite
def spoilt_json(draw: Draw, content: bytes, keys: Sequence[str] = ()) -> bytes:
    """A JSON object with a value of the wrong type or size, keys more, fewer or double, or broken as text.

    Where `keys` are named, and there are any, one of these is hit most often.
    """
    if draw(st.integers(0, 9)) == 0:
        return draw(spoilt_bytes(content))
    value = json.loads(content)
    places = _places(value)
    wanted = [place for place in places if place[1] in keys]
    container, key = draw(st.sampled_from(wanted if wanted and draw(st.integers(0, 3)) else places))
    way = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "raw", "double", "exchange"]))
    text = None  # in place of the value
    if way == "replace":
        container[key] = draw(_WRONG)
    elif way == "remove":
        del container[key]
    elif way == "raw":
        text = draw(st.sampled_from(_RAW))
    elif way == "exchange":
        other, name = draw(st.sampled_from(places))
        container[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(container[key])
    elif isinstance(container, list):
        container.insert(key, draw(_WRONG) if way == "add" else copy.deepcopy(container[key]))
    elif way == "add":
        container[draw(st.text(max_size=6))] = draw(_WRONG)
    else:
        again = draw(st.one_of(st.just(container[key]), _WRONG))
        text = f"{json.dumps(container[key])}, {json.dumps(key)}: {json.dumps(again)}"
    if text is None:
        return json.dumps(value).encode()
    container[key] = "@@"
    return json.dumps(value).replace('"@@"', text).encode()


@st.composite
def spoilt_weights(draw: Draw, content: bytes, keys: Sequence[str] = ()) -> bytes:
    """A safetensors file with its header, its length, one tensor's entry or some values damaged; `keys` most often."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    text, data = content[8:start], content[start:]
    way = draw(st.sampled_from(["bytes", "length", "header", "entry", "entry", "entry", "values", "values", "text"]))
    if way == "bytes":
        return draw(spoilt_bytes(content))
    if way == "length":
        count = len(text)
        wrong = draw(st.sampled_from([0, 1, 2, 7, count - 1, count + 1, count + 8, len(content), *HUGE[:8]]))
        return struct.pack("<Q", wrong) + text + data
    if way == "text":
        text = draw(spoilt_bytes(text))
    elif way == "header":
        text = draw(spoilt_json(text, keys))
    else:
        header = json.loads(text)
        name = draw(st.sampled_from(keys)) if draw(st.integers(0, 3)) else draw(st.sampled_from(sorted(header)))
        if "dtype" not in header.get(name, {}):
            name = keys[0]
        if way == "entry":
            _spoil_entry(draw, header, name)
            text = json.dumps(header).encode()
        else:
            data = _spoilt_values(draw, data, header[name])
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def spoilt_recipe(draw: Draw, content: bytes, key: str, keys: Sequence[str]) -> bytes:
    """A safetensors file with the JSON damaged that its header holds as text under `key`."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    spoilt = draw(spoilt_json(header["__metadata__"][key].encode(), keys))
    header["__metadata__"][key] = spoilt.decode("utf-8", "replace")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[start:]


def _spoil_entry(draw: Draw, header: dict[str, Any], name: str) -> None:
    """One tensor with another dtype or shape, or at another place; or two of them exchanged."""
    entry = header[name]
    shape, (start, stop) = list(entry["shape"]), entry["data_offsets"]
    other = draw(st.sampled_from(sorted(header)))
    far, near = draw(st.sampled_from(HUGE)), draw(st.sampled_from([-8, -4, -1, 1, 4, 8, 4096]))
    changes: list[dict[str, Any]] = [
        {"dtype": draw(st.sampled_from(DTYPES))},
        {"dtype": "F16", "shape": [2 * n if place == 0 else n for place, n in enumerate(shape)]},
        {"shape": shape[::-1]},
        {"shape": [*shape, 1]},
        {"shape": [stop - start]},
        {"shape": []},
        {"shape": [far, *shape[1:]]},
        {"shape": [far] * 3},
        {"shape": [far, 0]},
        {"shape": [-n for n in shape]},
        {"data_offsets": [stop, start]},
        {"data_offsets": [start + near, stop + near]},
        {"data_offsets": [start, stop + near]},
        {"data_offsets": [start, far]},
        {"data_offsets": [far, far + stop - start]},
        {"data_offsets": [start - far, stop - far]},
        {"dtype": "F4", "shape": [far], "data_offsets": [start, stop]},
    ]
    if draw(st.integers(0, 4)) == 0 and other != "__metadata__":
        header[name], header[other] = header[other], header[name]  # sound, where the two are alike
    else:
        entry.update(draw(st.sampled_from(changes)))


def _spoilt_values(draw: Draw, data: bytes, entry: dict[str, Any]) -> bytes:
    """Numbers of one float32 tensor that are none, or enormous, or merely others."""
    start, stop = entry["data_offsets"]
    at = start + 4 * draw(st.integers(0, max((stop - start) // 4 - 1, 0)))
    number = draw(st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 0.0, 1.0]))
    wrong = struct.pack("<f", number) * draw(st.integers(1, 8))
    return data[:at] + wrong[: stop - at] + data[min(at + len(wrong), stop) :]
