"""Two edits compared: how far apart their factors are, and in what their recipes differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from . import algebra
from .editfile import EditFile
from .fingerprint import same_encoders


def diff(first: EditFile, second: EditFile) -> dict[str, Any]:
    """How far two edits are apart, as plain numbers (`algebra.Difference` of each space), and where recipes differ.

    Raises `ProjectionError` for edits of text spaces of different widths.
    """
    here, there = first.factors(), second.factors()
    spaces = {}
    for space, factor in (there | here).items():
        none = algebra.scale(factor, 0)  # a space that one edit leaves alone
        spaces[space] = asdict(algebra.difference(here.get(space, none), there.get(space, none)))
    configs = [edit.recipe["config"] for edit in (first, second)]
    names = [{c.name: c for c in edit.concepts} for edit in (first, second)]
    kept = [edit.recipe["preserve"] for edit in (first, second)]
    common = [name for name in names[0] if name in names[1]]
    return {
        "spaces": spaces,
        "same_encoder": same_encoders(first.encoders, second.encoders),
        "config": {
            key: [config.get(key) for config in configs]
            for key in dict.fromkeys([*configs[0], *configs[1]])
            if configs[0].get(key) != configs[1].get(key)
        },
        "concepts": {
            "only_first": [name for name in names[0] if name not in names[1]],
            "only_second": [name for name in names[1] if name not in names[0]],
            "changed": [name for name in common if names[0][name] != names[1][name]],
        },
        "preserve": {
            "only_first": [name for name in kept[0] if name not in kept[1]],
            "only_second": [name for name in kept[1] if name not in kept[0]],
        },
    }
