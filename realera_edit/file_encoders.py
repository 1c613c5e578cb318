"""The text encoders inside a single file, as transformers' models: CLIP's own key layout, and OpenCLIP's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import place_model
from .clip_tokenizer import tokenizer_for
from .embeddings import PromptEncoder
from .errors import CheckpointError
from .tensorfile import TensorFile

# Of every public CLIP text encoder; weights do not tell it.
HEAD_WIDTH = 64
# Stable Diffusion 2.x reads the last but one of OpenCLIP ViT-H's 24 layers. Converters have left the last one out.
_SD2_READ = 23
_TEXT = "text_model."
_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER_PARTS = (*_OPENCLIP_LAYER, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"encoder\.layers\.(?P<number>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)")
_QKV = re.compile(r"self_attn\.(?P<which>[qkv])_proj")


@dataclass(frozen=True)
class StoredEncoder:
    """A text encoder in a file: what its keys begin with, its layout, and what the weights do not tell.

    `projects`: whether its pooled, projected state is read too (SDXL's second). `drops_last`: whether the last layer
    is stored but never run (SD 2.x).
    """

    prefix: str
    openclip: bool
    projects: bool = False
    drops_last: bool = False

    @property
    def act(self) -> str:
        """OpenAI trained with the quick approximation of GELU, the OpenCLIP encoders of SD 2.x and SDXL with GELU."""
        return "gelu" if self.openclip else "quick_gelu"

    def source(self, name: str) -> tuple[str, int | None]:
        """(key in the file, which third of it) of a transformers weight (`name` without "text_model.")."""
        if not self.openclip:
            return self.prefix + name, None
        match = _LAYER.fullmatch(name)
        if match is None:
            return self.prefix + _OPENCLIP[name], None
        stem, part, kind = f"{self.prefix}transformer.resblocks.{match['number']}.", match["part"], match["kind"]
        if joint := _QKV.fullmatch(part):
            return f"{stem}attn.in_proj_{kind}", "qkv".index(joint["which"])
        return f"{stem}{_OPENCLIP_LAYER[part]}.{kind}", None


def find_encoders(names: Iterable[str], where: str) -> tuple[StoredEncoder, ...]:
    """The text encoders of a file of the original layout, in the order in which their states are joined; or none.

    Raises `CheckpointError` for a text encoder that is not one of SD 1.x, 2.x or SDXL's base.
    """
    keys = tuple(names)

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    def clip(prefix: str) -> StoredEncoder:
        # files older than transformers 4 lack the inner name
        return StoredEncoder(prefix + (_TEXT if has(prefix + _TEXT) else ""), openclip=False)

    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    if has(f"{first}transformer."):
        if not has(f"{second}model."):
            raise CheckpointError(
                f"{where}: SDXL's second text encoder ({second}model.*) is missing; take a sound copy"
            )
        return clip(f"{first}transformer."), StoredEncoder(f"{second}model.", openclip=True, projects=True)
    if has(f"{first}model."):
        raise CheckpointError(f"{where}: an SDXL refiner, which is not supported; edit the base model")
    if has("cond_stage_model.transformer."):
        return (clip("cond_stage_model.transformer."),)
    if has("cond_stage_model.model."):
        return (StoredEncoder("cond_stage_model.model.", openclip=True, drops_last=True),)
    return ()


def load_encoders(
    file: TensorFile,
    stored: tuple[StoredEncoder, ...],
    tokenizer: Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> PromptEncoder:
    """The encoders as the model's pipeline uses them: SD 2.x without its last layer, SDXL's both from the last but one.

    `tokenizer`: a folder. Loaded in `dtype` (float32 unless told). Raises `CheckpointError`.
    """
    pairs = []
    for one in stored:
        fields = config_fields(file, one)
        words = tokenizer_for(tokenizer, fields["vocab_size"], one.openclip, str(file.path))
        pairs.append((words, place_model(_build(file, one, fields, words, dtype or torch.float32), device)))
    return PromptEncoder(tuple(pairs), penultimate=len(stored) > 1, progress=progress)


def config_fields(file: TensorFile, stored: StoredEncoder) -> dict[str, Any]:
    """Fields of `CLIPTextConfig` as shapes and layout tell them. Raises `CheckpointError`."""
    path = file.path
    shapes = {key: entry.shape for key, entry in file.entries.items() if key.startswith(stored.prefix)}
    rows, width = _shape(shapes, stored, "embeddings.token_embedding.weight", path)
    layers = _layers(shapes, stored, path)
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"{path}: its text encoder ({stored.prefix}*) has width {width}, no multiple of {HEAD_WIDTH}, the width "
            "of a head in every CLIP: an unknown encoder. Give a diffusers folder that has it with --text-encoder DIR"
        )
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, stored, "encoder.layers.0.mlp.fc1.weight", path)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": _shape(shapes, stored, "embeddings.position_embedding.weight", path)[0],
        "hidden_act": stored.act,
        "projection_dim": _shape(shapes, stored, "text_projection.weight", path)[1] if stored.projects else width,
    }


def _shape(shapes: Mapping[str, tuple[int, ...]], stored: StoredEncoder, name: str, path: Path) -> tuple[int, ...]:
    key, _ = stored.source(name)
    if key not in shapes:
        raise CheckpointError(f"{path}: the text encoder's {key} is missing; take a sound copy, or give --text-encoder")
    if len(shapes[key]) != 2 or 0 in shapes[key]:
        raise CheckpointError(f"{path}: {key} is {list(shapes[key])}, expected a matrix; take a sound copy")
    return shapes[key]


def _layers(shapes: Mapping[str, tuple[int, ...]], stored: StoredEncoder, path: Path) -> int:
    """How many layers are run."""
    stem = re.escape(stored.prefix + ("transformer.resblocks." if stored.openclip else "encoder.layers."))
    found = {int(match[1]) for key in shapes if (match := re.match(rf"{stem}(\d+)\.", key))}
    count = len(found)
    if found != set(range(count)) or count < 2:
        raise CheckpointError(
            f"{path}: its text encoder ({stored.prefix}*) has {count} layers, and others are missing; take a sound copy"
        )
    return count - 1 if stored.drops_last and count != _SD2_READ else count


def weight_shapes(stored: StoredEncoder, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name (without "text_model.") -> shape of each parameter of transformers' model of these `config_fields`."""
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (fields["vocab_size"], width),
        "embeddings.position_embedding.weight": (fields["max_position_embeddings"], width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    if stored.projects:
        shapes["text_projection.weight"] = (fields["projection_dim"], width)
    wide = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for number in range(fields["num_hidden_layers"]):
        for part in _LAYER_PARTS:
            shape = (width,) if part.startswith("layer_norm") else wide.get(part, (width, width))
            stem = f"encoder.layers.{number}.{part}"
            shapes |= {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
    return shapes


def weight_reader(file: TensorFile, stored: StoredEncoder, width: int) -> Callable[[str, Sequence[int]], Tensor]:
    """A call that reads the weight of a transformers name, which must have the shape given, in the file's precision.

    Raises `CheckpointError`.
    """
    read = lru_cache(maxsize=2)(file.read)  # the joint weights of queries, keys and values are asked for three times

    def weight(name: str, shape: Sequence[int]) -> Tensor:
        key, third = stored.source(name)
        if key not in file.entries:
            raise CheckpointError(f"{file.path}: the text encoder's {key} is missing; take a sound copy")
        whole = tensor = read(key)
        if name == "text_projection.weight" and stored.openclip:
            tensor = tensor.T.contiguous()  # in the folder's layout, for the same bits
        if third is not None and len(tensor) % 3 == 0:
            tensor = tensor.chunk(3)[third]
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{file.path}: {key} is {list(whole.shape)}, which does not fit a text encoder of width {width}; take "
                "a sound copy"
            )
        return tensor

    return weight


def _build(
    file: TensorFile, stored: StoredEncoder, fields: Mapping[str, Any], tokenizer: Any, dtype: torch.dtype
) -> Any:
    """The model with the file's weights, one tensor of the file in memory at a time."""
    import transformers

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind = transformers.CLIPTextModelWithProjection if stored.projects else transformers.CLIPTextModel
    with torch.device("meta"):  # no random weights are drawn only to be replaced
        model = kind(transformers.CLIPTextConfig(**fields, **special))
    model.name_or_path = f"{file.path} ({stored.prefix}*)"  # for messages, as a folder's model has it
    model = model.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    read = weight_reader(file, stored, fields["hidden_size"])
    for name, weight in model.named_parameters():
        weight.copy_(read(name.removeprefix(_TEXT), weight.shape))
    return model
