"""realera_edit: erase concepts from text-to-image checkpoints in closed form.

    from realera_edit import edit_model
    result = edit_model("path/or/hub-id", ["Snoopy"], target="a dog")
    result.save("OUT")

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "edit_model": "edit",
    "EditResult": "edit",
    "EditConfig": "config",
    "Concept": "concepts",
    "load_concepts": "concepts",
    "EditFile": "editfile",
    "compose": "editfile",
    "diff": "editdiff",
    "apply_edit": "transfer",
    "attack_model": "attack_run",
    "AppliedEdit": "transfer",
    "evaluate": "evaluation",
    "Evaluation": "evaluation",
    "EvaluationConfig": "evaluation_config",
    "export_lora": "lora",
    "invert": "inversion",
    "invert_model": "inversion_run",
    "wrap_text_encoder": "wrap",
    "inspect_path": "provenance",
    "model_card": "card",
    "push_to_hub": "push",
    "undo_file": "single_output",
    "undo_folder": "provenance",
    "RealEraError": "errors",
    "RealEraWarning": "errors",
    "reference_model": "reference",
}

__all__ = [
    "AppliedEdit",
    "Concept",
    "EditConfig",
    "EditFile",
    "EditResult",
    "Evaluation",
    "EvaluationConfig",
    "RealEraError",
    "RealEraWarning",
    "__version__",
    "apply_edit",
    "attack_model",
    "compose",
    "diff",
    "edit_model",
    "evaluate",
    "export_lora",
    "inspect_path",
    "invert",
    "invert_model",
    "load_concepts",
    "model_card",
    "push_to_hub",
    "reference_model",
    "undo_file",
    "undo_folder",
    "wrap_text_encoder",
]

if TYPE_CHECKING:
    from .attack_run import attack_model
    from .card import model_card
    from .concepts import Concept, load_concepts
    from .config import EditConfig
    from .edit import EditResult, edit_model
    from .editdiff import diff
    from .editfile import EditFile, compose
    from .errors import RealEraError, RealEraWarning
    from .evaluation import Evaluation, evaluate
    from .evaluation_config import EvaluationConfig
    from .inversion import invert
    from .inversion_run import invert_model
    from .lora import export_lora
    from .provenance import inspect_path, undo_folder
    from .push import push_to_hub
    from .reference import reference_model
    from .single_output import undo_file
    from .transfer import AppliedEdit, apply_edit
    from .wrap import wrap_text_encoder


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realera_edit' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
