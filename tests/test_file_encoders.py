"""The text encoder inside a single file is the pipeline's own: weights, states, tokenizer, with diffusers as judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from single_models import SHAPES, change
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.clip_tokenizer import write_tokenizer
from benchmarks.single_file import clip_state, openclip_state
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError
from realera_edit.file_encoders import find_encoders, load_encoders
from realera_edit.fingerprint import loaded_encoders, stored_encoders
from realera_edit.singlefile import open_single, single_encoders
from realera_edit.tensorfile import open_tensors

Build = Callable[..., Path]
SD1, SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."


def load(path: Path) -> Any:
    """The encoders of a file that need not hold more than them, of a vocabulary of 600 tokens."""
    file, words = open_tensors(path), path.parent / "words"
    write_tokenizer(words, 600)
    return load_encoders(file, find_encoders(file.entries, str(path)), words)


def text_file(path: Path, prefix: str, state: dict[str, torch.Tensor]) -> Path:
    save_file({prefix + name: weight.contiguous() for name, weight in state.items()}, path)
    return path


def clip(layers: int, width: int = 64, kind: Any = CLIPTextModel) -> Any:
    torch.manual_seed(layers)
    return kind(
        CLIPTextConfig(
            vocab_size=600, hidden_size=width, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=1,
            max_position_embeddings=77, hidden_act="gelu", projection_dim=48,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_and_weights_are_those_of_the_folder(shape: str, dtype: torch.dtype, pristine_single: Build) -> None:
    place = pristine_single(shape)
    one = open_single(place / "model.safetensors", tokenizer=place / "folder", dtype=dtype).encoder
    two = open_checkpoint(place / "folder", dtype=dtype).encoder
    assert one.fingerprint() == two.fingerprint()
    assert len(one.pairs) == (2 if shape == "tiny-sdxl" else 1)
    for (words, mine), (own_words, own) in zip(one.pairs, two.pairs, strict=True):
        assert type(mine) is type(own)
        assert words.pad_token_id == own_words.pad_token_id
        for name in ("num_attention_heads", "hidden_act", "num_hidden_layers", "max_position_embeddings"):
            assert getattr(mine.config, name) == getattr(own.config, name)
        assert all(weight.dtype == dtype for weight in mine.parameters())
    prompts = ["", "a photo of a cat", "cat"]
    for here, there in zip(one.encode(prompts, 3), two.encode(prompts, 3), strict=True):
        assert here.ids == there.ids
        assert torch.equal(here.states, there.states)
        assert here.pooled is there.pooled is None or torch.equal(here.pooled, there.pooled)


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_reads_the_same_encoder_from_the_file(shape: str, pristine_single: Build) -> None:
    """Its own converter, with the folder's configuration; the states of the model's own forward."""
    place = pristine_single(shape)
    encoder = open_single(place / "model.safetensors", tokenizer=place / "folder").encoder
    tensors = load_file(place / "model.safetensors")
    for number, (tokenizer, mine) in enumerate(encoder.pairs):
        kind = (CLIPTextModel, CLIPTextModelWithProjection)[number]
        folder = f"text_encoder{'_2' * number}"
        judge = create_diffusers_clip_model_from_ldm(
            kind, tensors, subfolder=folder, config=str(place / "folder"), local_files_only=True
        )
        assert judge.state_dict().keys() == mine.state_dict().keys()
        for name, weight in judge.state_dict().items():
            assert torch.equal(weight, mine.state_dict()[name]), name
        ids = tokenizer(["a red cat"], padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == (0 if "sd21" in shape or number else tokenizer.eos_token_id)
        for a, b in zip(judge(ids).to_tuple(), mine(ids).to_tuple(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_hashes_taken_from_the_file_are_those_of_the_model(
    shape: str, dtype: torch.dtype, pristine_single: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = pristine_single(shape, dtype)
    loaded = loaded_encoders(open_single(place / "model.safetensors", tokenizer=place / "folder").encoder)
    wanted = [source.print() for source in loaded]
    assert [source.print() for source in stored_encoders(place / "folder")] == wanted

    def refuse(*_: object) -> None:
        raise AssertionError("a model was built")

    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(kind, "__init__", refuse)
    assert [source.print() for source in single_encoders(place / "model.safetensors")] == wanted
    with pytest.raises(AssertionError, match="a model was built"):  # control
        open_single(place / "model.safetensors", tokenizer=place / "folder")


@pytest.mark.parametrize("stored", [23, 24])
def test_sd2_reads_23_layers_whether_24_are_stored_or_23(stored: int, tmp_path: Path) -> None:
    """Converters have left out the last one, which is never run; diffusers ignores it by its number."""
    own = clip(23)
    state = openclip_state(own, extra=stored - 23)
    assert (f"transformer.resblocks.{stored - 1}.ln_1.weight" in state) is True
    ((_, model),) = load(text_file(tmp_path / "a.safetensors", SD2, state)).pairs
    assert model.config.num_hidden_layers == 23
    assert all(torch.equal(weight, own.state_dict()[name]) for name, weight in model.state_dict().items())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids)[0], own(ids)[0])
    # control: the layer too many would show
    if stored == 24:
        assert not torch.equal(
            state["transformer.resblocks.23.ln_1.weight"], state["transformer.resblocks.22.ln_1.weight"]
        )


def test_the_pooled_state_may_be_of_another_width(tmp_path: Path) -> None:
    """OpenCLIP stores the projection as it is multiplied from the right, transformers the other way round."""
    own = clip(2, kind=CLIPTextModelWithProjection)
    assert own.text_projection.weight.shape == (48, 64)
    tensors = {f"conditioner.embedders.0.transformer.{name}": weight for name, weight in clip_state(clip(2)).items()}
    tensors |= {f"conditioner.embedders.1.model.{name}": weight for name, weight in openclip_state(own).items()}
    (_, (_, model)) = load(text_file(tmp_path / "a.safetensors", "", {k: v.clone() for k, v in tensors.items()})).pairs
    assert model.config.projection_dim == 48
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).text_embeds, own(ids).text_embeds)


def test_files_of_old_lack_the_inner_name_and_some_hold_positions(single: Path) -> None:
    tokenizer = single.parent / "folder"
    wanted = open_single(single, tokenizer=tokenizer).encoder.fingerprint()

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace(f"{SD1}text_model.", SD1): weight for name, weight in tensors.items()}

    inner = "text_model."
    for position in (torch.arange(77)[None], torch.full((1, 77), float("nan"))):
        name = f"{SD1}{inner}embeddings.position_ids"
        change(single, lambda tensors, name=name, position=position: tensors.update({name: position}))
        assert open_single(single, tokenizer=tokenizer).encoder.fingerprint() == wanted
        if inner:
            change(single, rename)
            inner = ""
    assert not any("text_model" in name for name in load_file(single))


def test_the_weights_are_read_in_the_file_s_precision(tmp_path: Path) -> None:
    own = clip(2).half()
    path = text_file(tmp_path / "a.safetensors", SD1, clip_state(own))
    ((_, model),) = load(path).pairs
    assert all(
        w.dtype == torch.float32 and torch.equal(w.half(), own.state_dict()[n]) for n, w in model.state_dict().items()
    )
    assert not any(w.is_meta for w in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("key", "by", "message"),
    [
        ("layers.1.mlp.fc1.weight", None, r"layers\.1\.mlp\.fc1\.weight is missing"),
        ("layers.1.mlp.fc1.weight", torch.ones(3, 4), r"layers\.1\.mlp\.fc1\.weight is \[3, 4\], which does not fit"),
        ("layers.1.self_attn.q_proj.bias", torch.full((128,), float("inf")), r"q_proj\.bias contains NaN or inf"),
        ("token_embedding.weight", None, r"token_embedding\.weight is missing"),
        ("token_embedding.weight", torch.ones(5), r"token_embedding\.weight is \[5\], expected a matrix"),
        ("token_embedding.weight", torch.ones(1500, 100), r"has width 100, no multiple of 64.*--text-encoder DIR"),
        ("token_embedding.weight", torch.ones(9, 128), r"knows 9 tokens, the tokenizer in .* 1500; give the tokenizer"),
        ("position_embedding.weight", torch.ones(9, 64), r"position_embedding\.weight is \[9, 64\]"),
        ("layers.0.", None, "has 1 layers, and others are missing"),
        ("layers.1.mlp.fc2.weight", torch.ones(128, 512).to(torch.float8_e4m3fn), r"fc2\.weight is F8_E4M3"),
    ],
)  # fmt: skip
def test_a_damaged_encoder_is_named(key: str, by: torch.Tensor | None, message: str, single: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(SD1) and key in name]:
            tensors.pop(name)
            if by is not None:
                tensors[name] = by

    change(single, damage)
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{message}"):
        open_single(single, tokenizer=single.parent / "folder")
    if "tokenizer" not in message:  # which is no part of the hash
        with pytest.raises(CheckpointError, match=f"model.safetensors: .*{message}"):
            [source.print() for source in single_encoders(single)]


def test_what_a_joint_weight_may_not_be(tmp_path: Path) -> None:
    state = openclip_state(clip(3), extra=1)
    state["transformer.resblocks.1.attn.in_proj_weight"] = torch.ones(190, 64)
    path = text_file(tmp_path / "a.safetensors", SD2, state)
    with pytest.raises(CheckpointError, match=r"in_proj_weight is \[190, 64\], which does not fit .* width 64"):
        load(path)


def test_encoders_that_are_not_read(tmp_path: Path) -> None:
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1.model."
    with pytest.raises(CheckpointError, match="an SDXL refiner, which is not supported"):
        find_encoders([f"{first}model.ln_final.bias"], "file")
    with pytest.raises(
        CheckpointError, match=r"SDXL's second text encoder \(conditioner\.embedders\.1\.model\.\*\) is miss"
    ):
        find_encoders([f"{first}transformer.text_model.final_layer_norm.bias"], "file")
    both = [f"{first}transformer.text_model.final_layer_norm.bias", f"{second}ln_final.bias"]
    assert [one.act for one in find_encoders(both, "file")] == ["quick_gelu", "gelu"]
    assert find_encoders(["model.diffusion_model.out.0.bias"], "file") == ()
    state = openclip_state(clip(2, kind=CLIPTextModelWithProjection))
    tensors = {f"{first}transformer.{name}": weight for name, weight in clip_state(clip(2)).items()}
    tensors |= {second + name: weight for name, weight in state.items() if name != "text_projection"}
    save_file({name: weight.clone() for name, weight in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"conditioner\.embedders\.1\.model\.text_projection is missing"):
        load(tmp_path / "a.safetensors")


# Tokenizers


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_a_tokenizer_the_user_is_told_what_to_give(single: Path, hub_cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no tokenizer.*vocab\.json and merges\.txt.*--tokenizer DIR.*hf down"
    ):
        open_single(single)
    with pytest.raises(CheckpointError, match=r"nowhere: no tokenizer there; give a folder with vocab\.json"):
        open_single(single, tokenizer=single.parent / "nowhere")


@pytest.mark.parametrize(
    ("name", "inside"),
    [("openai/clip-vit-large-patch14", ""), ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer")],
)
def test_the_hub_cache_is_searched(name: str, inside: str, single: Path, hub_cache: Path) -> None:
    base = hub_cache / ("models--" + name.replace("/", "--"))
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0" * 40)
    write_tokenizer(base / "snapshots" / ("0" * 40) / inside, 1500)
    own = open_single(single, tokenizer=single.parent / "folder").encoder
    assert open_single(single).encoder.fingerprint() == own.fingerprint()


def test_any_folder_that_holds_the_vocabulary_will_do(pristine_single: Build, tmp_path: Path) -> None:
    """Two text files are enough, and what the folder says about padding does not count: SD 2.x pads with token 0."""
    write_tokenizer(tmp_path / "whole", 1500)
    (tmp_path / "bare").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "bare")
    for shape in SHAPES:
        place = pristine_single(shape)
        own = open_checkpoint(place / "folder").encoder
        for folder in (tmp_path / "bare", tmp_path / "whole", place / "folder", place / "folder" / "tokenizer"):
            encoder = open_single(place / "model.safetensors", tokenizer=folder).encoder
            assert encoder.fingerprint() == own.fingerprint(), (shape, folder)
            assert encoder.tokenize(["A photo of a CAT"]) == own.tokenize(["a photo of a cat"])
            assert encoder.max_length == 77


def test_a_damaged_tokenizer_is_named(single: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "words", 1500)
    (tmp_path / "words" / "vocab.json").write_text(json.dumps([1, 2]))
    (tmp_path / "words" / "merges.txt").write_text("no merges")
    with pytest.raises(CheckpointError, match="words: the tokenizer cannot be loaded"):
        open_single(single, tokenizer=tmp_path / "words")
