"""A single file, edited: as the folder that it was made of, to the bit, and nothing else in it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUICK, header, run, split_file, tensor_bytes, tree, write_file
from safetensors.torch import load_file, save_file
from single_models import METADATA, PREFIX, SHAPES, as_single, change, erase

from benchmarks.single_file import ema_name
from realera_edit import EditConfig, apply_edit, edit_model
from realera_edit.errors import CheckpointError, ProjectionError
from realera_edit.provenance import METADATA_KEY
from realera_edit.singlefile import open_single
from realera_edit.tensorfile import TensorFile

Build = Callable[..., Path]
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
FAST = ("--words", "0", "--prior-words", "60", "--beyond", "0")


def changed(before: Path, after: Path) -> set[str]:
    """Keys whose bytes differ; names, their order, dtypes and shapes must not."""
    old, new = tensor_bytes(before), tensor_bytes(after)
    assert list(old) == list(new)
    assert [entry[:2] for entry in old.values()] == [entry[:2] for entry in new.values()]
    return {key for key in old if old[key] != new[key]}


def projections(path: Path) -> set[str]:
    return {p.name for p in open_single(path, tokenizer=path.parent / "folder").projections}


@pytest.mark.parametrize(("shape", "dtype"), zip(SHAPES, PRECISIONS, strict=True))
def test_the_file_is_edited_as_the_folder_to_the_bit(
    shape: str, dtype: torch.dtype, pristine_single: Build, tmp_path: Path
) -> None:
    place = pristine_single(shape, dtype)
    before = tree(place)
    by_folder = erase(place / "folder", tmp_path / "out")
    by_file = erase(place / "model.safetensors", tmp_path / "out.safetensors")
    wanted, written = as_single(tmp_path / "out"), load_file(tmp_path / "out.safetensors")
    assert {name for name in written if name.startswith(PREFIX)} == set(wanted)
    for name, weight in wanted.items():
        assert weight.dtype == written[name].dtype == dtype
        assert torch.equal(weight, written[name]), name
    # control: the edit is no identity, and it is the whole difference
    touched = changed(place / "model.safetensors", tmp_path / "out.safetensors")
    assert touched == projections(place / "model.safetensors")
    assert by_file.counts() == by_folder.counts()
    assert len(touched) == sum(n for name, n in by_file.counts().items() if name.endswith("_edited"))
    assert f"{PREFIX}label_emb.0.0.weight" in touched or shape != "tiny-sdxl"
    assert tree(place) == before


@pytest.mark.parametrize("shape", ["tiny-sd15", "tiny-sdxl"])
def test_diffusers_loads_the_edited_file(shape: str, pristine_single: Build, tmp_path: Path) -> None:
    """As the pipeline of the edited folder: the same U-Net, the same text encoders."""
    import diffusers

    place = pristine_single(shape)
    erase(place / "folder", tmp_path / "out")
    erase(place / "model.safetensors", tmp_path / "out.safetensors")
    kind = diffusers.StableDiffusionXLPipeline if shape == "tiny-sdxl" else diffusers.StableDiffusionPipeline
    theirs = kind.from_pretrained(tmp_path / "out")
    loaded = kind.from_single_file(
        tmp_path / "out.safetensors", config=str(place / "folder"), local_files_only=True, vae=theirs.vae
    )
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(theirs, name, None) is not None:
            mine = getattr(loaded, name).state_dict()
            assert all(torch.equal(weight, mine[key]) for key, weight in getattr(theirs, name).state_dict().items())


def test_order_metadata_and_foreign_tensors_are_kept(single: Path, tmp_path: Path) -> None:
    head, (_, data) = header(single), split_file(single)
    entries = [(name, entry) for name, entry in head.items() if name != "__metadata__"]
    write_file(single, {"__metadata__": METADATA, **dict(reversed(entries))}, data)
    erase(single, tmp_path / "out.safetensors")
    assert changed(single, tmp_path / "out.safetensors") == projections(single)
    written = header(tmp_path / "out.safetensors")
    recipe = json.loads(written["__metadata__"].pop(METADATA_KEY))
    assert written["__metadata__"] == {**METADATA, "modelspec.title": "作品 (without cat)"}
    assert recipe["concepts"] == [{"name": "cat", "target": "object", "aliases": []}]


@pytest.mark.parametrize(
    ("options", "part"), [({"edit": "k"}, "to_k"), ({"edit": "v"}, "to_v"), ({"pooled": False}, "attn2")]
)
def test_parts_of_the_edit(options: dict[str, Any], part: str, pristine_single: Build, tmp_path: Path) -> None:
    path = pristine_single("tiny-sdxl") / "model.safetensors"
    erase(path, tmp_path / "out.safetensors", config=replace(QUICK, **{"pooled": False, **options}))
    assert changed(path, tmp_path / "out.safetensors") == {name for name in projections(path) if part in name}


def test_only_the_text_and_its_projections_are_read(
    pristine_single: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The U-Net is never built, and the file is never loaded as a whole."""
    import diffusers

    path = pristine_single("tiny-sdxl") / "model.safetensors"
    read: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("built")

    whole = TensorFile.read_bytes
    monkeypatch.setattr(TensorFile, "read_bytes", lambda self, name: (read.append(name), whole(self, name))[1])
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "__init__", refuse)
    erase(path, tmp_path / "out.safetensors")
    rest = {name for name in read if not name.startswith("conditioner.")}
    assert rest == projections(path)
    assert {name for name in read if name.startswith("conditioner.")}


def test_ema_copies_are_edited_too(single: Path, tmp_path: Path) -> None:
    """With values of their own: each copy becomes what the same weight becomes as the U-Net of a file."""
    before = load_file(single)
    other = {name: weight * 1.25 for name, weight in before.items() if name.startswith(PREFIX)}
    plain = tmp_path / "plain.safetensors"
    save_file({**before, **other}, plain)
    change(single, lambda tensors: tensors.update({ema_name(name): weight for name, weight in other.items()}))
    change(single, lambda tensors: tensors.update({"model_ema.decay": torch.tensor(0.9999)}))
    result = erase(single, tmp_path / "out.safetensors")
    erase(plain, tmp_path / "plain out.safetensors")
    touched = changed(single, tmp_path / "out.safetensors")
    main = {name for name in touched if name.startswith(PREFIX)}
    assert touched == main | {ema_name(name) for name in main}
    assert len(main) == 8
    both, alone = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "plain out.safetensors")
    assert all(torch.equal(both[ema_name(name)], alone[name]) for name in main)
    assert result.counts()["k_edited"] == 8
    change(single, lambda tensors: tensors.pop(ema_name(sorted(main)[0])))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: holds EMA copies, but model_ema\.diffusion_modelinput"
    ):
        erase(single)


@pytest.mark.parametrize("layout", ["prefix", "bare", "diffusers"])
@pytest.mark.parametrize("shape", ["tiny-sd15", "tiny-sdxl"])
def test_a_file_of_the_unet_alone(layout: str, shape: str, pristine_single: Build, tmp_path: Path) -> None:
    place, path = pristine_single(shape), tmp_path / "unet.safetensors"
    erase(place / "folder", tmp_path / "out")
    wanted = as_single(tmp_path / "out")
    if layout == "diffusers":
        path = place / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
        wanted = load_file(tmp_path / "out" / "unet" / path.name)
    else:
        keep = {name: weight for name, weight in load_file(place / "model.safetensors").items() if name in wanted}
        cut = len(PREFIX) * (layout == "bare")
        save_file({name[cut:]: weight for name, weight in keep.items()}, path)
        wanted = {name[cut:]: weight for name, weight in wanted.items()}
    with pytest.raises(CheckpointError, match=r"holds no text encoder of Stable Diffusion.*--text-encoder DIR"):
        edit_model(path, ["cat"], config=QUICK)
    erase(path, tmp_path / "edited.safetensors", text_encoder=place / "folder")
    written = load_file(tmp_path / "edited.safetensors")
    assert set(written) == set(wanted)
    assert all(torch.equal(weight, wanted[name]) for name, weight in written.items())
    assert len(changed(path, tmp_path / "edited.safetensors")) == (8 if shape == "tiny-sd15" else 23)


def test_a_text_encoder_of_another_family_is_refused(pristine_single: Build, single: Path) -> None:
    with pytest.raises(
        ProjectionError, match=r"no cross-attention projection reads 192 inputs.*cross_attention_dim = 128"
    ):
        erase(single, text_encoder=pristine_single("tiny-sdxl") / "folder")
    with pytest.raises(CheckpointError, match=r"nowhere/model_index\.json: no such file"):
        erase(single, text_encoder=single.parent / "nowhere")


def test_a_controlnet_in_the_file_is_edited_too(single: Path, tmp_path: Path) -> None:
    main = {name: weight for name, weight in load_file(single).items() if name.startswith(PREFIX)}
    control = {"control_model." + name.removeprefix(PREFIX): weight for name, weight in main.items() if "put_b" in name}
    change(single, lambda tensors: tensors.update({name: weight.clone() for name, weight in control.items()}))
    erase(single, tmp_path / "out.safetensors")
    touched, written = changed(single, tmp_path / "out.safetensors"), load_file(tmp_path / "out.safetensors")
    assert {name for name in touched if name.startswith("control_model.")} == {
        name for name in control if ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    for name in touched:
        assert torch.equal(written[name], written[name.replace("control_model.", PREFIX)])


def test_an_edit_file_is_applied_to_a_single_file(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit was made from the folder; no tokenizer is needed to apply it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    erase(single.parent / "folder").save_edit(tmp_path / "edit.safetensors")
    erase(single, tmp_path / "one.safetensors")
    apply_edit(tmp_path / "edit.safetensors", single).save(tmp_path / "two.safetensors")
    assert tensor_bytes(tmp_path / "one.safetensors") == tensor_bytes(tmp_path / "two.safetensors")
    change(single, lambda tensors: tensors.update({
        name: weight * 1.01 for name, weight in tensors.items() if name.endswith("layers.0.mlp.fc1.weight")
    }))  # fmt: skip
    with pytest.raises(CheckpointError, match="is not the text encoder that the edit was made for"):
        apply_edit(tmp_path / "edit.safetensors", single)


# The command line


def test_erase_inspect_undo(single: Path, tmp_path: Path) -> None:
    out, back, words = tmp_path / "out.safetensors", tmp_path / "back.safetensors", single.parent / "folder"
    said = run("erase", single, "cat", "-o", out, "--tokenizer", words, *FAST)
    assert (said.exit_code, said.stderr) == (0, "")
    assert "4 of 4 keys, 4 of 4 values" in said.stdout
    shown = run("inspect", out)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout in said.stdout
    undone = run("undo", out, "-o", back)
    assert (undone.exit_code, undone.stdout, undone.stderr) == (0, f"restored   {back}\n", "")
    assert tensor_bytes(back) == tensor_bytes(single) != tensor_bytes(out)
    cases = {
        ("erase", single, "cat", "-o", tmp_path / "new", "--tokenizer", words): "MODEL is a file, and so is the output",
        ("erase", words, "cat", "-o", tmp_path / "new.safetensors"): "MODEL is a folder, and so is the output",
        ("erase", single, "cat", "-o", single, "--force", "--tokenizer", words, *FAST): "is the input",
        ("erase", single, "cat", "-o", out, "--tokenizer", words): "already exists",
        ("erase", single, "cat", "-o", tmp_path / "n.safetensors", "--tokenizer", tmp_path): "no tokenizer there",
        ("undo", single, "-o", tmp_path / "n.safetensors"): "its header has no record",
        ("undo", out, "-o", out, "--force"): "is the input",
    }
    for args, message in cases.items():
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, ""), args
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert tensor_bytes(back) == tensor_bytes(single)


def test_the_default_configuration_works(pristine_single: Build, tmp_path: Path) -> None:
    result = erase(
        pristine_single("tiny-sd15") / "model.safetensors", tmp_path / "out.safetensors", config=EditConfig()
    )
    assert result.to_dict()["concepts"][0]["name"] == "cat"
