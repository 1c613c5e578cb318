"""The record of an edit as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import EditConfig

_SHOWN = 12
_CHANGES = {"k": "keys", "v": "values"}


def plain(value: Any) -> Any:
    """Nested dataclass fields as JSON types: numbers to four digits, none where one is not finite."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def render(data: Mapping[str, Any]) -> str:
    """A screen of text from the record of an edit (`EditResult.to_dict`)."""
    counts = data["projections"]
    lines = [f"model      {data['model']}"]
    found = [
        f"{counts[f'{role}_edited']} of {counts[f'{role}_found']} {label}"
        for role, label in (("k", "keys"), ("v", "values"), ("pooled", "pooled"))
        if counts[f"{role}_found"]
    ]
    lines.append(f"edited     {', '.join(found)}")
    for name, space in data["spaces"].items():
        lines.append(
            f"{name:<10} {space['form']}, rank {space['rank']} of {space['width']}, condition {space['condition']:.1e}"
            + (f", jitter {space['jitter']:.1e}" if space["jitter"] else "")
        )
    lines.append("")
    for concept in data["concepts"][:_SHOWN]:
        left = ", ".join(f"{name} {value:.2f}" for name, value in concept["residual"].items())
        lines.append(f"erased     {concept['name']} -> {concept['target']}" + (f"   (left: {left})" if left else ""))
        if concept["words"]:
            lines.append(f"           with it: {', '.join(concept['words'])}")
        if concept["near"]:
            lines.append(f"           near, kept: {', '.join(concept['near'])}")
    if len(data["concepts"]) > _SHOWN:
        worst = max((value for concept in data["concepts"] for value in concept["residual"].values()), default=None)
        known = "" if worst is None else f", at most {worst:.2f} left of any"
        lines.append(f"           ... {len(data['concepts'])} concepts in all{known}")
    if data["drift"]:
        moved = sorted(data["drift"].items(), key=lambda item: -item[1]["mean"])
        shown = ", ".join(f"{name} {value['mean']:.3f}" for name, value in moved[:6])
        lines.append(f"kept       {len(moved)} preserved, most moved: {shown}")
    for old in data.get("previous", ()):
        names = [f"{concept['name']} -> {concept['target']}" for concept in old["concepts"]]
        lines.append(f"before it  {', '.join(names[:_SHOWN])}{' ...' * (len(names) > _SHOWN)}")
    return "\n".join(lines)


def render_edit(data: Mapping[str, Any]) -> str:
    """A screen of text about an edit file (`EditFile.to_dict`)."""
    lines = [f"edit       {data['bytes']:,} bytes, made from {data['model']}"]
    for name, space in data["spaces"].items():
        lines.append(f"{name:<10} {space['form']}, rank {space['rank']} of {space['width']}")
    for encoder in data["encoders"]:
        lines.append(f"encoder    {encoder['structure']}; {encoder['float16'][:12]} as rounded to float16")
    lines.append(f"changes    {', '.join(_CHANGES[role] for role in EditConfig.of(data['config']).edit)}")
    lines.append("")
    for concept in data["concepts"][:_SHOWN]:
        aliases = f" (with {', '.join(concept['aliases'])})" if concept["aliases"] else ""
        lines.append(f"erased     {concept['name']}{aliases} -> {concept['target']}")
    if len(data["concepts"]) > _SHOWN:
        lines.append(f"           ... {len(data['concepts'])} concepts in all")
    if data["preserve"]:
        lines.append(f"kept       {', '.join(data['preserve'][:_SHOWN])}{' ...' * (len(data['preserve']) > _SHOWN)}")
    for step in data["history"]:
        lines.append(f"then       {_step(step)}")
    return "\n".join(lines)


def _step(step: Mapping[str, Any]) -> str:
    if "compose" in step:
        return f"composed of {len(step['compose'])} edits"
    return "inverted" if "invert" in step else f"scaled by {step['scale']:g}"


def render_diff(data: Mapping[str, Any]) -> str:
    """A screen of text about two edit files (`diff`)."""
    lines = [
        f"{name:<10} {space['distance']:.2e} apart (of the larger edit's norm), in {space['directions']} directions"
        for name, space in data["spaces"].items()
    ]
    lines.append(f"encoder    {'the same' if data['same_encoder'] else 'different'}")
    lines += [f"config     {key}: {one} | {two}" for key, (one, two) in data["config"].items()]
    for title, group in (("erased", data["concepts"]), ("kept", data["preserve"])):
        for key, names in group.items():
            if names:
                more = " ..." if len(names) > _SHOWN else ""
                lines.append(f"{title:<10} {key.replace('_', ' ')}: {', '.join(names[:_SHOWN])}{more}")
    return "\n".join(lines)
