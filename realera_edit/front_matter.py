"""The YAML front matter of a model card: read, changed key by key, and written with all else as it was.

Values that are not changed are never converted: `language: no` stays `no`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
_BLOCK = re.compile(r"\A---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_TEXT = "tag:yaml.org,2002:str"


def split(text: str) -> tuple[str, str]:
    """(front matter with its fences, or nothing; the rest). What is no YAML mapping belongs to the rest."""
    match = _BLOCK.match(text)
    if match is None or _mapping(match["yaml"]) is None:
        return "", text
    return match[0], text[match.end() :]


def read(block: str) -> dict[str, Any]:
    """The values of a block that `split` gave."""
    import yaml

    match = _BLOCK.match(block)
    return dict(yaml.safe_load(match["yaml"]) or {}) if match else {}


def changed(block: str, new: Mapping[str, Any], tags: Sequence[str] = (), drop: Sequence[str] = ()) -> str:
    """The block with the keys of `new` set, `tags` added to its tags, the keys `drop` gone, and all else as it was."""
    import yaml

    match = _BLOCK.match(block)
    node = _mapping(match["yaml"]) if match else None
    pairs = list(node.value) if node is not None else []
    for key, value in new.items():
        pairs = _with(pairs, key, yaml.representer.SafeRepresenter().represent_data(value))
    if tags:
        old = next((value for key, value in pairs if key.value == "tags"), None)
        items = [] if old is None else list(old.value) if isinstance(old, yaml.SequenceNode) else [old]
        have = {item.value for item in items if isinstance(item, yaml.ScalarNode)}
        items += [yaml.ScalarNode(_TEXT, tag) for tag in dict.fromkeys(tags) if tag not in have]
        pairs = _with(pairs, "tags", yaml.SequenceNode("tag:yaml.org,2002:seq", items, flow_style=False))
    kept = [(key, value) for key, value in pairs if key.value not in drop]
    whole = yaml.MappingNode("tag:yaml.org,2002:map", kept, flow_style=False)
    return f"---\n{yaml.serialize(whole, Dumper=yaml.SafeDumper, allow_unicode=True, width=10**6)}---\n"


def licence(path: Path) -> dict[str, Any]:
    """The keys of a card that tell the licence; empty where there is no card, or none that can be read."""
    try:
        return licence_in(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def licence_in(text: str) -> dict[str, Any]:
    """The same of the text of a card."""
    values = read(split(text)[0])
    return {key: values[key] for key in LICENCE_KEYS if isinstance(values.get(key), (str, list))}


def _mapping(text: str) -> Any:
    """The root of a YAML document, where that is a mapping with plain keys."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    sound = isinstance(node, yaml.MappingNode) and all(isinstance(key, yaml.ScalarNode) for key, _ in node.value)
    return node if sound else None


def _with(pairs: list[tuple[Any, Any]], key: str, value: Any) -> list[tuple[Any, Any]]:
    """The pairs with one value set, in its place, or last."""
    import yaml

    if any(name.value == key for name, _ in pairs):
        return [(name, value if name.value == key else old) for name, old in pairs]
    return [*pairs, (yaml.ScalarNode(_TEXT, key), value)]
