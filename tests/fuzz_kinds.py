"""What `test_fuzzing.py` damages: files of tiny models, the way each is damaged, and the commands that meet them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from damage import spoilt_bytes, spoilt_json, spoilt_recipe, spoilt_weights
from helpers import UNET
from hypothesis import strategies as st

from realera_edit.history import sidecars
from realera_edit.provenance import EDIT_FILE_KEY, METADATA_KEY, RECORD, UNDO

Damage = Callable[[bytes], st.SearchStrategy[bytes]]
FAST = "--words 0 --prior-words 60 --beyond 0 --strength 0.8 --ridge 1e-3"
BLOCK = "transformer_blocks.0.attn2"
CROSS, LDM = f"mid_block.attentions.0.{BLOCK}", f"model.diffusion_model.middle_block.1.{BLOCK}"
CLIP = "cond_stage_model.transformer.text_model."
TEXT = ("embeddings.token_embedding.weight", "encoder.layers.1.mlp.fc1.weight", "final_layer_norm.bias")
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
SINGLE, DONE = "single/model.safetensors", "done/model.safetensors"
DONE_RECORD, DONE_UNDO = (str(path) for path in sidecars(Path(DONE)))

APPLY = "apply edit.safetensors folder -o out"
ERASE = f"erase folder cat -o out {FAST}"
APPLY_SINGLE = f"apply single/edit.safetensors {SINGLE} -o out.safetensors"
ERASE_SINGLE = f"erase {SINGLE} cat --tokenizer single/words -o out.safetensors {FAST}"
OF_FILES = (
    APPLY,
    "inspect edit.safetensors",
    "scale edit.safetensors --by 0.5 -o out.safetensors",
    "invert edit.safetensors -o out.safetensors",
    "compose edit.safetensors other.safetensors -o out.safetensors",
    "diff other.safetensors edit.safetensors",
    "export-lora edit.safetensors folder -o out.safetensors",
)


@dataclass(frozen=True)
class Kind:
    """Files, each with the way in which it is damaged, and commands; "out" or "out.safetensors" is what they write."""

    files: dict[str, Damage]
    commands: tuple[str, ...]


def weights(*keys: str) -> Damage:
    """A safetensors file, most often the tensors `keys`."""
    return lambda content: spoilt_weights(content, keys)


def mapping(*keys: str) -> Damage:
    """A JSON file, most often the values of `keys`."""
    return lambda content: spoilt_json(content, keys)


def recipe(name: str, *keys: str) -> Damage:
    """The JSON that a safetensors file holds in its metadata as `name`."""
    return lambda content: spoilt_recipe(content, name, keys)


_CONFIG = (
    "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "num_attention_heads", "hidden_act",
    "intermediate_size", "projection_dim", "architectures", "layer_norm_eps", "attention_dropout", "eos_token_id",
)  # fmt: skip
_EDIT = (
    "config", "encoders", "concepts", "spaces", "preserve", "drift", "history", "aliases", "condition", "width", "edit",
    "strength", "name", "model", "format", "text_encoder", "residual",
)  # fmt: skip
_RECORD = (
    "tensors", "concepts", "projections", "spaces", "config", "before", "after", "residual", "condition", "previous",
    "name", "k_found", "model",
)  # fmt: skip
_TOKENIZER = ("model", "vocab", "merges", "type", "added_tokens", "content", "id", "normalizer", "pre_tokenizer")

KINDS = {
    "weights": Kind({f"folder/{UNET}": weights(f"{CROSS}.to_k.weight", f"{CROSS}.to_v.weight")}, (APPLY,)),
    "text encoder": Kind({"folder/text_encoder/model.safetensors": weights(*TEXT)}, (APPLY, ERASE)),
    "index": Kind(
        {f"sharded/{INDEX}": mapping("weight_map", f"{CROSS}.to_k.weight")}, (APPLY.replace("folder", "sharded"),)
    ),
    "configurations": Kind(
        {
            "folder/model_index.json": mapping("text_encoder", "tokenizer", "unet"),
            "folder/unet/config.json": mapping("cross_attention_dim", "only_cross_attention", "addition_embed_type"),
        },
        (APPLY, "export-lora edit.safetensors folder --format kohya -o out.safetensors"),
    ),
    "encoder's configuration": Kind({"folder/text_encoder/config.json": mapping(*_CONFIG)}, (APPLY, ERASE, ERASE)),
    "tokenizer": Kind(
        {
            "folder/tokenizer/vocab.json": mapping("cat</w>", "<|endoftext|>", "<|startoftext|>", "c"),
            "folder/tokenizer/merges.txt": spoilt_bytes,
            "folder/tokenizer/tokenizer_config.json": mapping("model_max_length", "pad_token", "unk_token"),
        },
        (ERASE,),
    ),
    "tokenizer of a file": Kind({"single/words/tokenizer.json": mapping(*_TOKENIZER)}, (ERASE_SINGLE,)),
    "single file": Kind(
        {SINGLE: weights(f"{LDM}.to_k.weight", f"{LDM}.to_v.weight", *(CLIP + name for name in TEXT))},
        (APPLY_SINGLE, APPLY_SINGLE, ERASE_SINGLE),
    ),
    "edit file": Kind({"edit.safetensors": weights("cross.left", "cross.right")}, OF_FILES),
    "edit's recipe": Kind({"edit.safetensors": recipe(EDIT_FILE_KEY, *_EDIT)}, OF_FILES),
    "record": Kind(
        {f"edited/{RECORD}": mapping(*_RECORD)},
        ("inspect edited", "undo edited -o out", "apply edit.safetensors edited -o out"),
    ),
    "record of a file": Kind(
        {DONE_RECORD: mapping(*_RECORD), DONE: recipe(METADATA_KEY, "concepts", "config", "version", "name")},
        (f"inspect {DONE}", f"undo {DONE} -o out.safetensors", APPLY_SINGLE.replace(SINGLE, DONE)),
    ),
    "undo": Kind(
        {
            f"edited/{UNDO}": weights(f"{UNET}::{CROSS}.to_k.weight", f"{UNET}::{CROSS}.to_v.weight"),
            f"edited/{UNET}": weights(f"{CROSS}.to_k.weight", f"{CROSS}.to_v.weight"),
        },
        ("undo edited -o out",),
    ),
    "undo of a file": Kind(
        {
            DONE_UNDO: weights(f"model.safetensors::{LDM}.to_k.weight"),
            DONE: weights(f"{LDM}.to_k.weight", f"{LDM}.to_v.weight"),
        },
        (f"undo {DONE} -o out.safetensors",),
    ),
}
