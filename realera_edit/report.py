"""The record of an edit as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 12


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
        lines.append(f"erased     {concept['name']} -> {concept['target']}   (left: {left})")
        if concept["words"]:
            lines.append(f"           with it: {', '.join(concept['words'])}")
        if concept["near"]:
            lines.append(f"           near, kept: {', '.join(concept['near'])}")
    if len(data["concepts"]) > _SHOWN:
        worst = max(max(concept["residual"].values()) for concept in data["concepts"])
        lines.append(f"           ... {len(data['concepts'])} concepts in all, at most {worst:.2f} left of any")
    if data["drift"]:
        moved = sorted(data["drift"].items(), key=lambda item: -item[1]["mean"])
        shown = ", ".join(f"{name} {value['mean']:.3f}" for name, value in moved[:6])
        lines.append(f"kept       {len(moved)} preserved, most moved: {shown}")
    return "\n".join(lines)
