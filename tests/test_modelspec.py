"""Header metadata for other programs: true or absent, the user's own kept, the same bytes each time, undone."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from helpers import QUICK, UNET, header, made, run, split_file, tensor_bytes, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_models import erase

from benchmarks.shapes import meta_unet
from benchmarks.single_file import UNET as PREFIX
from benchmarks.single_file import unet_name
from realera_edit import RealEraWarning, edit_model, export_lora, inspect_path, modelspec, undo_file
from realera_edit.errors import CheckpointError, ConfigError
from realera_edit.modelspec import kind_of
from realera_edit.provenance import METADATA_KEY

Build = Callable[..., Path]
Shapes = dict[str, tuple[int, ...]]
NAMES = {"sd15": "v1", "sd21": "v2", "sdxl": "xl"}


def metadata(path: Path) -> dict[str, str]:
    return {key: value for key, value in header(path)["__metadata__"].items() if key != METADATA_KEY}


def data_hash(path: Path) -> str:
    return "0x" + hashlib.sha256(split_file(path)[1]).hexdigest()


def with_metadata(path: Path, told: Mapping[str, str]) -> Path:
    """The file with other metadata of its own."""
    save_file(load_file(path), path, {"format": "pt", **told})
    return path


Known = Callable[[str, Path], None]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """`known(kind, model)`: models of the shapes of this tiny one count as that one of the public families."""

    def tell(kind: str, model: Path) -> None:
        entries = header(model / UNET if model.is_dir() else model).items()
        shapes = {name: tuple(entry["shape"]) for name, entry in entries if name != "__metadata__"}
        first = shapes["conv_in.weight" if model.is_dir() else f"{PREFIX}input_blocks.0.0.weight"]
        keys = [size for name, size in shapes.items() if name.endswith(".attn2.to_k.weight")]
        monkeypatch.setattr(modelspec, "_CHANNELS", first[:2])
        monkeypatch.setitem(modelspec.FAMILIES, (len(keys), keys[0][1]), kind)

    return tell


# Which model it is


@pytest.mark.parametrize("shape", ["sd15", "sd21", "sdxl"])
def test_the_public_models_are_told_by_their_shapes(shape: str) -> None:
    """In diffusers' layout and in the original one; with another input, or less of it, they are told no more."""
    unet = meta_unet(shape)
    folder: Shapes = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    single = {PREFIX + unet_name(name, unet.config): size for name, size in folder.items()}
    assert kind_of(folder) == kind_of(single, PREFIX) == NAMES[shape]
    assert kind_of(single) is kind_of(folder, PREFIX) is None
    for name, layout, prefix in (("conv_in.weight", folder, ""), (f"{PREFIX}input_blocks.0.0.weight", single, PREFIX)):
        assert kind_of({**layout, name: (320, 9, 3, 3)}, prefix) is None  # inpainting
        assert kind_of({key: value for key, value in layout.items() if key != name}, prefix) is None
    fewer = {key: value for key, value in folder.items() if not key.startswith("mid_block.")}
    assert kind_of(fewer) is None  # a distilled model


def test_the_two_second_versions_are_told_apart_by_what_is_said() -> None:
    shapes: Shapes = {name: tuple(weight.shape) for name, weight in meta_unet("sd21").state_dict().items()}
    v, epsilon = {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"}
    assert kind_of(shapes, unet={"sample_size": 96}, scheduler=v) == "v2-768-v"
    assert kind_of(shapes, unet={"sample_size": 64}, scheduler=epsilon) == "v2-512"
    assert kind_of(shapes, unet={"sample_size": 64}, scheduler=v) == "v2"
    assert kind_of(shapes, unet={"sample_size": [96, 96]}, scheduler=v) == "v2"
    assert kind_of(shapes, told="stable-diffusion-v2-768-v") == "v2-768-v"
    assert kind_of(shapes, told="stable-diffusion-v1") == "v2"  # shapes go before what is said


# Single files


def test_a_file_of_a_known_kind_says_what_it_is(single: Path, known: Known, tmp_path: Path) -> None:
    with_metadata(single, {"mine": "stays"})
    known("v1", single)
    erase(single, tmp_path / "out.safetensors")
    assert metadata(tmp_path / "out.safetensors") == {
        "format": "pt",
        "mine": "stays",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "512x512",
        "modelspec.title": "model (without cat)",
    }
    undo_file(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    assert metadata(tmp_path / "back.safetensors") == {"format": "pt", "mine": "stays"}


def test_of_an_unknown_kind_nothing_is_claimed(single: Path, tmp_path: Path) -> None:
    with_metadata(single, {"mine": "stays"})
    erase(single, tmp_path / "out.safetensors")
    assert metadata(tmp_path / "out.safetensors") == {"format": "pt", "mine": "stays"}


def test_own_keys_stay_and_what_the_edit_makes_false_is_mended(single: Path, known: Known, tmp_path: Path) -> None:
    own = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/mine",
        "modelspec.title": "Mine: 作品",
        "modelspec.author": "Alice",
        "modelspec.date": "2023-07-20",
        "modelspec.hash_sha256": data_hash(single),
        "modelspec.hash_md5": "0x12",
    }
    with_metadata(single, own)
    own["modelspec.hash_sha256"] = data_hash(single)
    with_metadata(single, own)
    known("v1", single)
    erase(single, tmp_path / "one.safetensors")
    told = metadata(tmp_path / "one.safetensors")
    for key in ("sai_model_spec", "architecture", "author"):
        assert told[f"modelspec.{key}"] == own[f"modelspec.{key}"]
    assert told["modelspec.title"] == "Mine: 作品 (without cat)"
    assert told["modelspec.hash_sha256"] == data_hash(tmp_path / "one.safetensors") != own["modelspec.hash_sha256"]
    assert not {"modelspec.date", "modelspec.hash_md5"} & set(told)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:  # the hash was put into its place, and nothing else
        assert set(file.keys()) == set(load_file(single))
    # again, and back step by step
    erase(tmp_path / "one.safetensors", tmp_path / "two.safetensors", "dog", tokenizer=single.parent / "folder")
    two = metadata(tmp_path / "two.safetensors")
    assert two["modelspec.title"] == "Mine: 作品 (without cat, dog)"
    assert two["modelspec.hash_sha256"] == data_hash(tmp_path / "two.safetensors") != told["modelspec.hash_sha256"]
    undo_file(tmp_path / "two.safetensors", tmp_path / "one again.safetensors")
    assert metadata(tmp_path / "one again.safetensors") == told
    undo_file(tmp_path / "one.safetensors", tmp_path / "none.safetensors")
    assert metadata(tmp_path / "none.safetensors") == {"format": "pt", **own}
    assert data_hash(tmp_path / "none.safetensors") == own["modelspec.hash_sha256"]


def test_many_names_are_counted(single: Path, tmp_path: Path) -> None:
    names = [f"cat {number}" for number in range(6)]
    edit_model(single, names, config=QUICK, tokenizer=single.parent / "folder").save(tmp_path / "out.safetensors")
    assert metadata(tmp_path / "out.safetensors")["modelspec.title"] == "作品 (without cat 0, cat 1, cat 2 and 3 more)"


def test_the_same_edit_gives_the_same_bytes_unless_a_date_is_given(single: Path, known: Known, tmp_path: Path) -> None:
    known("v1", single)
    for name in ("a", "b"):
        erase(single, tmp_path / name / "out.safetensors")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    words = ("--tokenizer", single.parent / "folder", "--words", "0", "--prior-words", "60", "--beyond", "0", "-q")
    given = ("--metadata", "modelspec.date=2026-01-31", "--metadata", "modelspec.title=a=b", "--metadata", "x=")
    said = run("erase", single, "cat", "-o", tmp_path / "out.safetensors", *words, *given)
    assert (said.exit_code, said.stderr) == (0, "")
    told = metadata(tmp_path / "out.safetensors")
    assert (told["modelspec.date"], told["modelspec.title"], told["x"]) == ("2026-01-31", "a=b", "")
    undo_file(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    assert metadata(tmp_path / "back.safetensors") == metadata(single)


def test_metadata_that_cannot_be_given(single: Path, sd1: Path, tmp_path: Path) -> None:
    result = erase(single)
    for given, message in (
        ({"realera_edit": "x"}, "is written by realera-edit itself"),
        ({"modelspec.hash_sha256": "0x0"}, "is written by realera-edit itself"),
        ({"": "x"}, "no key is empty"),
        ({"x": 5}, "keys and values are text"),
    ):
        with pytest.raises(ConfigError, match=message):
            result.save(tmp_path / "out.safetensors", metadata=given)
        with pytest.raises(ConfigError, match=message):
            export_lora(tmp_path / "none", sd1, tmp_path / "lora.safetensors", metadata=given)
    with pytest.raises(ConfigError, match="out: is a folder, whose files have no metadata to give"):
        edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "out", metadata={"x": "y"})
    said = run("erase", sd1, "cat", "-o", tmp_path / "out", "--metadata", "x=y")
    assert (said.exit_code, "--metadata goes into the header of a single file" in said.stderr) == (1, True)
    said = run("erase", sd1, "cat", "-o", tmp_path / "out", "--metadata", "x")
    assert (said.exit_code, "write KEY=VALUE" in said.stderr) == (2, True)
    assert not list(tmp_path.glob("out*"))


def test_damaged_metadata_among_the_originals_is_refused(single: Path, tmp_path: Path) -> None:
    erase(single, tmp_path / "out.safetensors")
    undo = tmp_path / "out.realera_edit_undo.safetensors"
    for told in ("[", "5", '{"metadata": 5}', '{"metadata": {"a": 5}}'):
        save_file(load_file(undo), undo, {METADATA_KEY: told})
        with pytest.raises(CheckpointError, match=r"undo\.safetensors: the metadata in its header is damaged"):
            undo_file(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    save_file(load_file(undo), undo)  # as an earlier version wrote it: nothing to put back
    undo_file(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    assert tensor_bytes(tmp_path / "back.safetensors") == tensor_bytes(single)


# LoRAs


@pytest.mark.parametrize(
    ("kind", "architecture", "kohya", "second"),
    [
        ("v1", "stable-diffusion-v1/lora", "sd_v1", "False"),
        ("v2-768-v", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
        ("xl", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
        ("v2", None, None, "True"),
    ],
)
def test_a_lora_says_which_models_it_fits(
    kind: str, architecture: str | None, kohya: str | None, second: str, sd1: Path, known: Known,
    tmp_path: Path,
) -> None:  # fmt: skip
    edit = made(sd1)
    known(kind, sd1)
    for format in ("diffusers", "kohya", "full"):
        export_lora(edit, sd1, tmp_path / format, format=format)
        told = metadata(tmp_path / format)
        assert told["format"] == "pt"
        assert told.get("modelspec.architecture") == architecture
        assert told.get("ss_base_model_version") == (kohya if format != "diffusers" else None)
        assert told.get("ss_v2") == (second if format != "diffusers" else None)
        if architecture is not None:
            assert told["modelspec.title"] == "A LoRA without cat"
            assert told["modelspec.hash_sha256"] == data_hash(tmp_path / format)
            plain = kind != "xl" or format == "diffusers"
            assert (told["modelspec.implementation"] == "diffusers") == plain
        assert "modelspec.date" not in told


def test_what_a_kohya_lora_says_of_its_rank_is_so(sd1: Path, tmp_path: Path) -> None:
    edit = made(sd1)
    for options in ({}, {"rank": 4}):
        with pytest.warns(RealEraWarning, match="truncation") if options else contextlib.nullcontext():
            report = export_lora(edit, sd1, tmp_path / "lora", format="kohya", force=True, **options)
        told, ranks = metadata(tmp_path / "lora"), {layer.rank for layer in report.layers}
        assert told["ss_network_dim"] == (str(ranks.pop()) if len(ranks) == 1 else "Dynamic")
        assert (told["ss_network_dim"] == "4") == bool(options)
        assert told["ss_network_module"] == "networks.lora"
        alphas = {float(t) for name, t in load_file(tmp_path / "lora").items() if name.endswith(".alpha")}
        assert {float(told["ss_network_alpha"])} == alphas
    assert not [key for key in told if key.startswith("modelspec.") or "version" in key]  # a model of no known kind
    export_lora(edit, sd1, tmp_path / "full", format="full")
    assert not [key for key in metadata(tmp_path / "full") if key.startswith("ss_")]


def test_a_lora_of_a_single_file_knows_what_the_file_says(single: Path, known: Known, tmp_path: Path) -> None:
    with_metadata(single, {"modelspec.architecture": "stable-diffusion-v2-512"})
    edit = made(single.parent / "folder")
    known("v2", single)
    export_lora(edit, single, tmp_path / "lora", format="kohya", metadata={"modelspec.author": "Alice"})
    told = metadata(tmp_path / "lora")
    assert told["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert told["modelspec.author"] == "Alice"
    recipe = json.loads(header(tmp_path / "lora")["__metadata__"][METADATA_KEY])
    assert recipe == inspect_path(tmp_path / "lora")
    assert "model" not in recipe
