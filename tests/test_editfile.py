"""Edit files: what is stored, what is refused, and that to apply one is to erase."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DENSE, QUICK, UNET, gap, header, made, run, split_file, tensor_bytes, tree, weights, write_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from realera_edit import (
    Concept,
    EditFile,
    RealEraError,
    apply_edit,
    compose,
    diff,
    edit_model,
    inspect_path,
)
from realera_edit.algebra import condition_number
from realera_edit.errors import CheckpointError, ConceptError, ConfigError, ProjectionError, SolveError
from realera_edit.provenance import EDIT_FILE_KEY, UNDO
from realera_edit.solve import Factor

TEXT = "text_encoder/model.safetensors"
FAST = ("--words", "0", "--prior-words", "60", "--beyond", "0")


# What is stored


def test_a_low_rank_edit_is_stored_low_rank_and_exactly(model: Path, family: str, tmp_path: Path) -> None:
    result = edit_model(model, ["cat"], config=QUICK)
    path = result.save_edit(tmp_path / "edit.safetensors")
    factor, pooled = result.edit.cross.factor, result.edit.pooled
    assert factor.right is not None
    stored = tensor_bytes(path)
    assert list(stored) == ["cross.left", "cross.right", *(["pooled.left", "pooled.right"] if pooled else [])]
    assert {dtype for dtype, _, _ in stored.values()} == {"F32"}
    loaded = EditFile.load(path)
    for old, new in ((factor, loaded.cross), (pooled.factor if pooled else None, loaded.pooled)):
        assert (old is None) is (new is None)
        if old is not None and new is not None:
            assert new.rank == old.rank < old.width / 2
            assert torch.equal(new.left, old.left)  # to the bit, though one has been through float32
            assert torch.equal(new.right, old.right)  # type: ignore[arg-type]
    assert loaded.bytes() == sum(len(data) for _, _, data in stored.values())
    width, rank = factor.width, factor.rank
    assert len(stored["cross.left"][2]) + len(stored["cross.right"][2]) == 2 * 4 * width * rank
    assert path.stat().st_size < loaded.bytes() + 6000
    assert loaded.concepts == result.edit.concepts
    assert loaded.config == QUICK
    assert EditFile.load(loaded.save(tmp_path / "again.safetensors")).to_dict() == loaded.to_dict()
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_dense_edit_is_stored_dense(sd1: Path, tmp_path: Path) -> None:
    path = edit_model(sd1, ["cat"], config=DENSE).save_edit(tmp_path / "edit.safetensors")
    assert {name: shape for name, (_, shape, _) in tensor_bytes(path).items()} == {"cross.delta": (96, 96)}
    assert EditFile.load(path).cross.right is None


@pytest.mark.filterwarnings("ignore:1 of 2 names keep more")
def test_an_edit_file_tells_what_it_is(sd1: Path, tmp_path: Path) -> None:
    config = replace(QUICK, contexts=("{}", "a {}"))
    result = edit_model(sd1, [Concept("cat", aliases=("puss",))], target="dog", preserve=["horse"], config=config)
    path = result.save_edit(tmp_path / "edit.safetensors")
    said = run("inspect", path).stdout
    rank = result.edit.cross.factor.rank
    for text in (
        f"low-rank, rank {rank} of 96",
        "cat (with puss) -> dog",
        "kept       horse",
        "hidden_size 96",
        "bytes",
    ):
        assert text in said
    data = json.loads(run("inspect", path, "--json").stdout)
    assert data == inspect_path(path)
    assert data["config"] == config.to_dict()
    assert (data["spaces"]["cross"]["rank"], data["bytes"]) == (rank, 2 * 4 * 96 * rank)
    assert data["concepts"][0]["residual"] == result.to_dict()["concepts"][0]["residual"]


# Algebra on files


def test_composing_is_applying_one_after_the_other(model: Path, family: str, tmp_path: Path) -> None:
    one, two = made(model, "cat"), made(model, "dog")
    apply_edit(one, model).save(tmp_path / "one")
    apply_edit(two, tmp_path / "one").save(tmp_path / "both")
    for name, edit in (("ab", one.compose(two)), ("ba", two.compose(one))):
        apply_edit(edit, model).save(tmp_path / name)
    sequence = weights(tmp_path / "both")
    assert gap(weights(tmp_path / "ab"), sequence) < 1e-6
    assert gap(weights(tmp_path / "ba"), sequence) > 1e-4  # the order matters
    both = compose([one, two])
    assert [c.name for c in both.concepts] == ["cat", "dog"]
    assert [part["concepts"] for part in both.recipe["history"][0]["compose"]] == [["cat"], ["dog"]]
    assert both.cross.rank <= one.cross.rank + two.cross.rank
    assert (both.pooled is not None) == (family == "sdxl")
    assert compose([one]) is one


def test_an_edit_with_a_pooled_path_composes_with_one_without(sdxl: Path) -> None:
    closed, open_ = made(sdxl, "cat"), made(sdxl, "dog", pooled=False)
    for edits in ((closed, open_), (open_, closed)):
        both = compose(edits)
        assert both.config.pooled
        assert torch.equal(both.factor("pooled").left, closed.factor("pooled").left)
    with pytest.raises(ProjectionError, match="no pooled text space"):
        open_.factor("pooled")
    assert apply_edit(open_, sdxl).counts()["pooled_edited"] == 0


@pytest.mark.parametrize("perturbation", ["none", "isotropic"])
def test_the_inverse_takes_the_edit_back(sd1: Path, tmp_path: Path, perturbation: str) -> None:
    edit = made(sd1, perturbation=perturbation)
    apply_edit(edit, sd1).save(tmp_path / "out")
    apply_edit(edit.invert(), tmp_path / "out").save(tmp_path / "back")
    original, bound = weights(sd1), condition_number(edit.cross) * 2**-24  # of numbers rounded to float32
    assert gap(weights(tmp_path / "back"), original) < bound < 1e-2
    apply_edit(edit.scale(-1), tmp_path / "out").save(tmp_path / "not")
    for name in ("out", "not"):  # control: I - L R is no inverse
        assert gap(weights(tmp_path / name), original) > 5 * bound
    with pytest.raises(SolveError, match="too ill-conditioned to invert"):
        edit.invert(max_condition=1.5)


def test_scale_is_a_dial(sd1: Path, tmp_path: Path) -> None:
    edit = made(sd1)
    apply_edit(edit, sd1).save(tmp_path / "1")
    whole, original = weights(tmp_path / "1"), weights(sd1)
    for by in (0.25, 0.5):
        apply_edit(edit.scale(by), sd1).save(tmp_path / str(by))
        line = {name: (1 - by) * original[name] + by * whole[name] for name in whole}
        assert gap(weights(tmp_path / str(by)), line) < 1e-6
    applied = apply_edit(edit.scale(1), sd1)
    applied.save(tmp_path / "again")
    assert tensor_bytes(tmp_path / "again" / UNET) == tensor_bytes(tmp_path / "1" / UNET)
    with pytest.raises(ConceptError, match="the edit changed no weight"):
        apply_edit(edit.scale(0), sd1).save(tmp_path / "0")
    assert not (tmp_path / "0").exists()


def test_edits_that_have_no_product_are_refused(sd1: Path, sd2: Path, sdxl: Path) -> None:
    for other in (made(sd2), made(sdxl)):  # sd2 has the width of sd1
        with pytest.raises(ProjectionError, match=r"made for different text encoders .*only edits of one text encoder"):
            compose([made(sd1), other])
    with pytest.raises(ConfigError, match=r"one edit changes 'kv' and another 'k'"):
        compose([made(sd1), made(sd1, edit="k")])
    with pytest.raises(ConfigError, match="no edit given"):
        compose([])


def test_diff_tells_the_distance_and_the_fields(sd1: Path, sdxl: Path) -> None:
    one, two = made(sd1), made(sd1, "cat", "dog", strength=0.9)
    found = diff(one, two)
    delta = one.cross.delta() - two.cross.delta()
    assert found["spaces"]["cross"]["distance"] == pytest.approx(
        float(delta.norm() / two.cross.delta().norm()), rel=1e-6
    )
    assert found["config"] == {"strength": [0.8, 0.9]}
    assert found["concepts"] == {"only_first": [], "only_second": ["dog"], "changed": []}
    same = diff(one, one)
    assert (same["config"], same["same_encoder"]) == ({}, True)
    assert same["spaces"]["cross"]["distance"] < 1e-12
    assert diff(made(sdxl), made(sdxl, pooled=False))["spaces"]["pooled"]["distance"] == pytest.approx(1)
    with pytest.raises(ProjectionError, match="different widths"):
        diff(one, made(sdxl))


# Damage


def broken(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Recipes that no file of ours has, each with what its error says."""
    return {
        r"format 2, this version reads 1; update": {**data, "format": 2},
        r"unknown option 'colour'; update": {**data, "config": {**data["config"], "colour": 1}},
        r"is damaged .*strength = 3": {**data, "config": {**data["config"], "strength": 3}},
        r"is damaged .*'concepts'": {k: v for k, v in data.items() if k != "concepts"},
        r"is damaged .*concepts is \[\], expected a list that is not empty": {**data, "concepts": []},
        r"is damaged .*text spaces of width 97": {**data, "encoders": [{**data["encoders"][0], "width": 97}]},
        r"is damaged .*encoders\[0\]\.float16 is 3, expected text": {
            **data,
            "encoders": [{**data["encoders"][0], "float16": 3}],
        },
        r"is damaged .*encoders\[0\] has no 'pooled'": {**data, "encoders": [{"width": 96}]},
    }


def test_damaged_edit_files_are_named(sd1: Path, tmp_path: Path) -> None:
    path = edit_model(sd1, ["cat"], config=QUICK).save_edit(tmp_path / "edit.safetensors")
    head, (_, data) = header(path), split_file(path)
    recipe = json.loads(head["__metadata__"][EDIT_FILE_KEY])
    for message, changed in broken(recipe).items():
        write_file(tmp_path / "bad", {**head, "__metadata__": {EDIT_FILE_KEY: json.dumps(changed)}}, data)
        with pytest.raises(CheckpointError, match=f"bad: (is damaged|has).*{message.removeprefix('is damaged ')}"):
            EditFile.load(tmp_path / "bad")
    left, right = load_file(path).values()
    meta = head["__metadata__"]
    for tensors, message in (
        ({"cross.left": left}, "do not fit together"),
        ({"cross.left": left, "cross.right": right[:-1].contiguous()}, "do not fit together"),
        ({"cross.delta": left}, "do not fit together"),
        ({"cross.left": left[:-1].contiguous(), "cross.right": right[:, :-1].contiguous()}, "width 96"),
        ({"pooled.delta": torch.zeros(4, 4)}, "no factor of the cross-attention"),
        ({"cross.left": left, "cross.right": right / 0}, "contains NaN or inf"),
        ({"cross.delta": torch.zeros(96, 96), "pooled.delta": torch.zeros(4, 4)}, "pooled|width 96 and None"),
    ):
        save_file(tensors, tmp_path / "bad", meta)
        with pytest.raises(CheckpointError, match=message):
            EditFile.load(tmp_path / "bad")
    for name in (UNET, TEXT):
        with pytest.raises(CheckpointError, match=r"not an edit file; write one with `erase"):
            EditFile.load(sd1 / name)
    with pytest.raises(CheckpointError, match="no such file"):
        EditFile.load(tmp_path / "gone")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_byte_is_our_error_or_a_whole_edit(place: float, byte: int, cut: bool, tmp_path: Path) -> None:
    sound = tmp_path / "edit.safetensors"
    if not sound.exists():
        recipe = {
            "config": QUICK.to_dict(),
            "concepts": [{"name": "cat", "target": "dog", "aliases": [], "residual": {}, "near": {}, "words": {}}],
            "preserve": [],
            "spaces": {"cross": {"condition": 1.0, "jitter": 0.0, "ridge": 1.0}},
            "history": [],
            "model": "m",
            "text_encoder": "",
            "drift": {},
        }
        from realera_edit.fingerprint import EncoderPrint

        EditFile(
            Factor(torch.ones(4, 1), torch.ones(1, 4)), None, (EncoderPrint(4, None, "s", "a", "b"),), recipe
        ).save(sound)
    data = bytearray(sound.read_bytes())
    at = int(place * len(data))
    data[at] = byte
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data[:at] if cut else data)
    try:
        edit = EditFile.load(bad)
    except RealEraError as error:
        message = str(error)
    else:
        message = edit.report() + bad.name
        assert edit.cross.width == 4
    assert bad.name in message


def test_a_header_larger_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        EditFile.load(tmp_path / "bad")


# Places


def test_an_edit_is_written_whole_outside_of_the_model_and_replaces_only_by_force(sd1: Path, tmp_path: Path) -> None:
    result, before = edit_model(sd1, ["cat"], config=QUICK), tree(sd1)
    path = tmp_path / "deep" / "edit.safetensors"
    result.save_edit(path)
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"already exists; .*--force"):
        result.save_edit(path)
    edit_model(sd1, ["dog"], config=QUICK).save_edit(path, force=True)
    assert path.read_bytes() != data
    for place in (sd1 / "new.safetensors", sd1 / UNET):
        with pytest.raises(CheckpointError, match="lies in the input"):
            result.save_edit(place, force=True)
    (tmp_path / "link").symlink_to(path)
    for place in (tmp_path, tmp_path / "link"):
        with pytest.raises(CheckpointError, match="exists and is not a file"):
            result.save_edit(place, force=True)
    assert tree(sd1) == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["edit.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, path = made(sd1), tmp_path / "edit.safetensors"
    path.write_text("mine")

    import realera_edit.editfile as module

    def half(target: Path, *_: Any) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", half)
    with pytest.raises(CheckpointError, match="the disk is full"):
        edit.save(path, force=True)
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.name != "sd1"] == ["edit.safetensors"]


def test_another_run_s_file_is_not_replaced(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import realera_edit.editfile as module

    edit, path, write = made(sd1), tmp_path / "edit.safetensors", module.write_tensors

    def meanwhile(*args: Any) -> None:
        path.write_text("theirs")
        write(*args)

    monkeypatch.setattr(module, "write_tensors", meanwhile)
    with pytest.raises(CheckpointError, match="another run has just written it"):
        edit.save(path)
    assert path.read_text() == "theirs"


# The command line


def test_the_commands(sd1: Path, tmp_path: Path) -> None:
    cat, dog, both, half, back = (tmp_path / f"{name}.safetensors" for name in ("cat", "dog", "both", "half", "back"))
    before = tree(sd1)
    said = run("erase", sd1, "cat", "--save-edit", cat, *FAST)
    assert (said.exit_code, said.stderr) == (0, "")
    assert f"written    {cat}   (the edit, for `apply`)" in said.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.safetensors", "sd1"]
    assert run("erase", sd1, "dog", "--save-edit", dog, "-o", tmp_path / "erased", *FAST).exit_code == 0
    said = run("apply", dog, sd1, "-o", tmp_path / "applied")
    assert (said.exit_code, said.stderr) == (0, "")
    assert "dog -> object" in said.stdout
    assert f"written    {tmp_path / 'applied'}   (holds the originals for undo" in said.stdout
    assert tensor_bytes(tmp_path / "applied" / UNET) == tensor_bytes(tmp_path / "erased" / UNET)
    assert run("inspect", tmp_path / "applied").exit_code == 0
    for args, text in (
        (("compose", cat, dog, "-o", both), "composed of 2 edits"),
        (("scale", cat, "--by", "0.5", "-o", half), "scaled by 0.5"),
        (("invert", cat, "-o", back), "inverted"),
    ):
        said = run(*args)
        assert (said.exit_code, said.stderr) == (0, ""), args
        assert text in said.stdout
        assert run("inspect", args[-1]).stdout in said.stdout
        assert json.loads(run(*args, "--json", "--force").stdout) == inspect_path(args[-1])
    assert EditFile.load(both).compose(EditFile.load(dog).invert()).cross.rank <= 2 * EditFile.load(cat).cross.rank
    assert diff(EditFile.load(half), EditFile.load(cat))["spaces"]["cross"]["distance"] == pytest.approx(0.5, abs=1e-6)
    said = run("diff", cat, both)
    assert "only second: dog" in said.stdout
    assert json.loads(run("diff", cat, both, "--json").stdout) == diff(EditFile.load(cat), EditFile.load(both))
    assert run("apply", cat, sd1, "-o", tmp_path / "quiet", "--quiet", "--no-undo", "--link").stdout == ""
    assert not (tmp_path / "quiet" / UNDO).exists()
    assert tree(sd1) == before


def test_errors_of_the_commands(sd1: Path, tmp_path: Path) -> None:
    cat = tmp_path / "cat.safetensors"
    made(sd1).save(cat)
    new = tmp_path / "new"
    other = made(sd1, "dog").save(tmp_path / "other.safetensors")
    cases = {
        ("erase", sd1, "cat", "--save-edit", cat): "cat.safetensors: already exists",
        ("apply", tmp_path / "gone", sd1, "-o", new): "gone: no such file",
        ("apply", sd1 / UNET, sd1, "-o", new): "not an edit file",
        ("apply", cat, tmp_path / "gone", "-o", new): "gone",
        ("apply", cat, sd1, "-o", sd1): "already exists",
        ("apply", cat, sd1, "-o", sd1, "--force"): "is the input",
        ("compose", cat, other, "-o", other): "is the input, which is never changed",
        ("scale", cat, "--by", "nan", "-o", new): "expected a finite number",
        ("scale", cat, "--by", "2", "-o", cat, "--force"): "is the input, which is never changed",
        ("invert", cat, "-o", other): "already exists",
        ("diff", cat, sd1 / TEXT): "not an edit file",
        ("export-lora", cat, sd1, "-o", new, "--rank", "3", "--energy", "0.5"): "rank and energy are both given",
    }
    for args, message in cases.items():
        result = run(*args)
        assert (result.exit_code, result.stdout) == (1, ""), args
        assert message in result.stderr, args
        assert result.stderr.count("\n") == 1
    assert run("erase", sd1, "cat").exit_code == 2
    assert not new.exists()


def test_the_real_model(emoji: Path, tmp_path: Path) -> None:
    edit, before = tmp_path / "edit.safetensors", tree(emoji)
    run("erase", emoji, "cat face", "--save-edit", edit, "-o", tmp_path / "erased")
    assert run("apply", edit, emoji, "-o", tmp_path / "applied").exit_code == 0
    assert (tmp_path / "applied" / UNET).read_bytes() == (tmp_path / "erased" / UNET).read_bytes()
    assert edit.stat().st_size < 100_000  # against 22 MB of the U-Net
    assert tree(emoji) == before
