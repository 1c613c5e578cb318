"""Hub ids: the local cache first, and a clear error where neither it nor the network has the model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers import QUICK, tree
from huggingface_hub import constants

from realera_edit import edit_model, reference_model
from realera_edit.errors import CheckpointError
from realera_edit.generate import drawable
from realera_edit.hub import public_name, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def fill(cache: Path, model: Path, name: str = "owner/tiny", ref: str = "main") -> Path:
    """The model as the hub client caches it: blobs, and a snapshot of links to them."""
    base = cache / ("models--" + name.replace("/", "--"))
    snapshot = base / "snapshots" / COMMIT
    (base / "refs").mkdir(parents=True)
    (base / "refs" / ref).write_text(COMMIT)
    (base / "blobs").mkdir()
    for relative, digest in tree(model).items():
        blob = base / "blobs" / digest
        shutil.copyfile(model / relative, blob)
        link = snapshot / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_cached_model_is_edited_offline(sd1: Path, hub_cache: Path, tmp_path: Path) -> None:
    fill(hub_cache, sd1)
    before = tree(hub_cache)
    edit_model("owner/tiny", ["cat"], config=QUICK).save(tmp_path / "out", link=True)
    edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "wanted")
    out, wanted = tree(tmp_path / "out"), tree(tmp_path / "wanted")
    assert out.keys() == wanted.keys()
    assert {name for name in out if out[name] != wanted[name]} == {"realera_edit.json", "README.md"}  # name the model
    record = json.loads((tmp_path / "out" / "realera_edit.json").read_text())
    assert (record["model"], record["revision"]) == ("owner/tiny", COMMIT)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert tree(hub_cache) == before


def test_a_revision(sd1: Path, hub_cache: Path) -> None:
    snapshot = fill(hub_cache, sd1, ref="other")
    assert resolve("owner/tiny", "other") == resolve("owner/tiny", COMMIT) == snapshot
    assert drawable("owner/tiny", "other") == snapshot
    with pytest.raises(CheckpointError, match="owner/tiny: no such folder, not in the hub cache"):
        resolve("owner/tiny")


@pytest.mark.parametrize("name", ["nobody/nothing", "no--body/nothing", "nobody/no..thing", "nobody/nothing.git"])
def test_an_unknown_id_is_one_clear_line(name: str, hub_cache: Path) -> None:
    """Also where the hub client itself would not take it for an id."""
    with pytest.raises(CheckpointError, match=f"{name}: no such folder, .*Check the name, the network") as caught:
        edit_model(name, ["cat"], config=QUICK)
    assert "\n" not in str(caught.value)


def test_a_folder_goes_before_the_hub(sd1: Path, hub_cache: Path, tmp_path: Path) -> None:
    fill(hub_cache, sd1)
    (tmp_path / "owner").mkdir()
    sd1.rename(tmp_path / "owner" / "tiny")
    assert resolve("owner/tiny") == Path("owner/tiny")


@pytest.mark.parametrize(
    "name", ["./gone", "../gone", "/gone/model", "a/b/c", "gone", "", "~nobody/model", "x" * 5000, "a\0b"]
)
def test_what_cannot_be_a_hub_id_is_a_missing_folder(
    name: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    with pytest.raises(CheckpointError, match=r"no such f|a diffusers folder\?"):
        edit_model(name, ["cat"], config=QUICK)


@pytest.mark.parametrize(
    "part", ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "tokenizer"]
)
def test_a_download_that_was_broken_off_is_taken_up_again(
    part: str, sd1: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has the snapshot, but not all of it: the hub is asked, with no pickle among what is asked for."""
    snapshot = fill(hub_cache, sd1)
    gone = snapshot / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    asked = []

    def download(name: str, *, local_files_only: bool = False, allow_patterns: list[str], **_: object) -> str:
        if not local_files_only:
            asked.append((name, allow_patterns))
            shutil.copytree(sd1, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/tiny") == snapshot
    assert [name for name, _ in asked] == ["owner/tiny"]
    assert {"README.md", "LICENSE"} <= set(asked[0][1])  # what is made of the model is under its licence
    assert not any(pattern.endswith(ending) for pattern in asked[0][1] for ending in ("bin", "ckpt", "*", "pt"))
    assert resolve("owner/tiny") == snapshot
    assert len(asked) == 1


def test_a_record_names_a_model_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = f"/home/alice/.cache/huggingface/hub/models--owner--my-model/snapshots/{COMMIT}"
    told = {"model": "owner/my-model", "revision": COMMIT}
    cases = {
        snapshot: told,
        snapshot.replace("/", "\\"): told,
        f"{snapshot}/model.safetensors": {**told, "model": "model.safetensors", "hub_id": "owner/my-model"},
        f"{snapshot}0": {"model": f"{COMMIT}0"},
        str(reference_model()): {"model": "emoji"},
        "/home/alice/sd15": {"model": "sd15"},
        "../alice/sd15.safetensors": {"model": "sd15.safetensors"},
        "sd15/": {"model": "sd15"},
        ".": {"model": tmp_path.name},
        "the pipeline": {"model": "the pipeline"},
    }
    for where, wanted in cases.items():
        assert public_name(where) == wanted
