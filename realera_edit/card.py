"""The model card of what this package writes: `README.md` with front matter, from the record of an edit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card_text import section, title
from .errors import CheckpointError, ConfigError, RealEraWarning
from .evaluation_file import Part
from .evaluation_file import read as read_evaluation
from .front_matter import CARD
from .history import recipe_of as essence
from .hub import hub_id
from .provenance import inspect_path
from .readme import Fields, has_section, joined, without

_TAGS = ("realera-edit", "concept-erasure", "stable-diffusion", "text-to-image")


def model_card(
    path: str | Path,
    *,
    evaluation: str | Path | None = None,
    license: str | None = None,
    existing: str | None = None,
) -> str:
    """The card of an edited folder or single file, an edit file, or an exported LoRA: Markdown with front matter.

    `evaluation`: a folder of `evaluate`, whose figures are added. `license`: in place of the licence that the card or
    the record has. `existing`: a card that this one becomes part of (default: the folder's own README.md); what it
    holds stays, but for an older section of ours. Raises `CheckpointError` where `path` has no record of an edit,
    `ConfigError` where the evaluation is of another edit.
    """
    path = Path(path)
    data = inspect_path(path)
    if existing is None and os.path.isfile(path / CARD):
        existing = read_card(path / CARD)
    found = None if evaluation is None else _evaluation(Path(evaluation), data)
    return _card(data, existing or "", path.name, found, license)


def read_card(path: Path) -> str:
    """The text of a card, its line ends as they are. Raises `CheckpointError`."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text ({error}); mend it, or move it away") from error


def refresh(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the card of an edited folder: into the card that was copied from the unedited one, if there is one."""
    path = folder / CARD
    try:
        existing = read_card(path) if os.path.lexists(path) else ""
    except CheckpointError as error:
        warnings.warn(f"{error}. No model card is written", RealEraWarning, stacklevel=4)
        return
    path.write_bytes(_card(data, existing, "OUT", None, None, inherited=True).encode())


def restore(folder: Path, before: Mapping[str, Any] | None) -> None:
    """Take our section out of the card of an undone folder; `before`: the record of an earlier edit, still in force."""
    path = folder / CARD
    try:
        existing = read_card(path) if os.path.lexists(path) else ""
    except CheckpointError:
        return  # as it was copied
    if not has_section(existing):
        return
    text = without(existing)
    if before is not None:
        text = _card(before, existing, "OUT", None, None, inherited=True)
    if text:
        path.write_bytes(text.encode())
    else:
        path.unlink()


def _card(
    data: Mapping[str, Any],
    existing: str,
    name: str,
    evaluation: Part | None,
    license: str | None,
    *,
    inherited: bool = False,
) -> str:
    """The card from a record. `inherited`: `existing` tells of the model before this edit."""
    if "concepts" not in data:
        raise CheckpointError(f"{name}: holds no edit that is in force, so there is nothing to tell in a card")
    kind = kind_of(data)
    try:
        text = section(data, kind, "OUT" if kind == "folder" else name, evaluation)
        return joined(existing, text, _fields(data, kind, evaluation, license, inherited))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{name}: its record is damaged ({error!r}); take a sound copy") from error


def kind_of(data: Mapping[str, Any]) -> str:
    """What a record is of: "folder", "file", "edit" or "lora"."""
    if "encoders" in data:
        return "edit"
    if "lora" in data:
        return "lora"
    # a single file is named without a folder; a record that is in its header alone names none
    parts = data.get("tensors", ("model.safetensors",))
    return "file" if all("/" not in part and part.endswith(".safetensors") for part in parts) else "folder"


def _evaluation(folder: Path, data: Mapping[str, Any]) -> Part:
    """The evaluation, which must be of this edit, where it says of which it is."""
    found = read_evaluation(folder)
    recipe = found.data.get("recipe")
    try:
        other = recipe is not None and essence(recipe)["concepts"] != essence(data)["concepts"]
    except (LookupError, TypeError, AttributeError):
        other = True
    if other:
        raise ConfigError(f"{found.where}: is of another edit, which erased other concepts; evaluate this one")
    return found


def _fields(
    data: Mapping[str, Any], kind: str, evaluation: Part | None, license: str | None, inherited: bool
) -> Fields:
    """What the hub reads: tags, base model, licence, results."""
    found = (hub_id(step) for step in (data, *reversed(data.get("previous", ()))))
    base = next((name for name in found if name is not None), None)
    weak: dict[str, Any] = {**_terms(data.get("license", {}), base), "pipeline_tag": "text-to-image"}
    if kind in ("folder", "lora"):
        weak["library_name"] = "diffusers"
    new: dict[str, Any] = {} if license is None else {"license": license}
    tags = [*_TAGS, *(["lora"] if kind == "lora" else [])]
    if base is not None:
        adapter = kind in ("edit", "lora")
        new |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
        tags += [f"base_model:adapter:{base}"] if adapter else []
    if evaluation is not None:
        new["model-index"] = [_results(data, evaluation)]
    # results in the card of the unedited model are not this model's
    return Fields(new, weak, tuple(tags), ("model-index",) if inherited else ())


def _terms(told: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The licence of the unedited model; a link into its folder leads to the hub, or is left out."""
    link = str(told.get("license_link", ""))
    if not link or "://" in link:
        return dict(told)
    rest = {key: value for key, value in told.items() if key != "license_link"}
    return rest if base is None else {**rest, "license_link": f"https://huggingface.co/{base}/blob/main/{link}"}


def _results(data: Mapping[str, Any], evaluation: Part) -> dict[str, Any]:
    """The rates of an evaluation in the hub's form."""
    rates, means = evaluation.part("rates"), evaluation.part("harmonic")
    values = {name: rates.part(name).part("edited").number("value") for name in rates.data}
    values |= {name: means.part(name).number("value") for name in means.data}
    metrics = [{"type": name, "name": name, "value": value} for name, value in values.items() if value is not None]
    judge = evaluation.part("judge").text("name")
    data_set = {"type": "custom", "name": f"prompts of realera-edit evaluate, judged by {judge}"}
    result = {"task": {"type": "text-to-image"}, "dataset": data_set, "metrics": metrics}
    return {"name": title(data), "results": [result]}
