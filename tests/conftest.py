"""Fixtures: tiny models of each family, built once in a session and copied for each test; the real model if present."""

from __future__ import annotations

import os

# Before any of the libraries is imported, here and in every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import single_models
import tiny_models
import torch
from hypothesis import settings

# On matrices as small as ours, threads only wait for one another.
torch.set_num_threads(1)
# The same examples each time, and no race against a clock on a busy machine.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
REAL_MODEL = Path(__file__).resolve().parents[2] / "shared" / "models" / "emoji-sd"

Build = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of prior statistics that is never the user's own; one for the session, as its key tells models apart."""
    folder = tmp_path_factory.getbasetemp() / "realera-cache"
    monkeypatch.setenv("REALERA_EDIT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`pristine(family, dtype, variant, max_shard_size)`: a tiny folder that no test may change."""
    built: dict[tuple[object, ...], Path] = {}

    def build(family: str, *options: object) -> Path:
        key = (family, *options)
        if key not in built:
            base = tmp_path_factory.mktemp(family)
            built[key] = tiny_models.build_folder(family, base / family, base / "scratch", *options)
        return built[key]

    return build


@pytest.fixture
def tiny(pristine: Build, tmp_path: Path) -> Build:
    """`tiny(family, dtype, variant, max_shard_size)`: a fresh copy, for a test to damage as it likes."""

    def copy(family: str, *options: object) -> Path:
        target = tmp_path / family
        shutil.copytree(pristine(family, *options), target)
        return target

    return copy


@pytest.fixture(scope="session")
def pristine_single(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`pristine_single(shape, dtype)`: a place with `folder` and the same as `model.safetensors`, not to change."""
    built: dict[tuple[object, ...], Path] = {}

    def build(shape: str, dtype: torch.dtype = torch.float32) -> Path:
        if (shape, dtype) not in built:
            built[shape, dtype] = single_models.build(shape, dtype, tmp_path_factory.mktemp(shape))
        return built[shape, dtype]

    return build


@pytest.fixture
def single(pristine_single: Build, tmp_path: Path) -> Path:
    """A tiny Stable Diffusion 1.x as one file, `model.safetensors`; the folder that it was made of is `folder`."""
    shutil.copytree(pristine_single("tiny-sd15"), tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.safetensors"


@pytest.fixture
def sd1(tiny: Build) -> Path:
    """A copy of the tiny Stable Diffusion 1.x folder."""
    return tiny("sd1")


@pytest.fixture
def sd2(tiny: Build) -> Path:
    """A copy of the tiny Stable Diffusion 2.x folder."""
    return tiny("sd2")


@pytest.fixture
def sdxl(tiny: Build) -> Path:
    """A copy of the tiny Stable Diffusion XL folder."""
    return tiny("sdxl")


@pytest.fixture(params=tiny_models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture
def model(family: str, tiny: Build) -> Path:
    """A copy of the tiny folder of each family in turn."""
    return tiny(family)


@pytest.fixture(scope="session")
def emoji() -> Path:
    """The real model (read only), where it has been put beside the repository."""
    folder = Path(os.environ.get("REALERA_EDIT_TEST_MODEL") or REAL_MODEL)
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}; set REALERA_EDIT_TEST_MODEL")
    return folder
