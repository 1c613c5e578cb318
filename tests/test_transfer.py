"""Edit files on models: to apply one is to erase, and a foreign text encoder is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import DENSE, QUICK, UNET, gap, made, tensor_bytes, tree, weights
from safetensors.torch import load_file, save_file

from realera_edit import (
    EditFile,
    RealEraWarning,
    apply_edit,
    edit_model,
    inspect_path,
    undo_folder,
)
from realera_edit.checkpoint import open_checkpoint
from realera_edit.errors import CheckpointError, ProjectionError
from realera_edit.fingerprint import loaded_encoders, stored_encoders
from realera_edit.front_matter import CARD
from realera_edit.provenance import RECORD

Tiny = Callable[..., Path]
TEXT = "text_encoder/model.safetensors"


# Applying is erasing


@pytest.mark.parametrize("config", [QUICK, DENSE], ids=["low-rank", "dense"])
def test_applying_writes_the_bytes_that_erase_writes(family: str, tiny: Tiny, tmp_path: Path, config: Any) -> None:
    """In every precision and layout of the same model; everything but the record and its card is the same file."""
    layouts = [(torch.float32,), (torch.float16, "fp16"), (torch.bfloat16, None, "400KB")]
    for place, options in enumerate(layouts if config is QUICK else layouts[:1]):
        base = tmp_path / str(place)
        model = tiny(family, *options).rename(tmp_path / f"model{place}")
        before = tree(model)
        result = edit_model(model, ["cat"], config=config)
        result.save(base / "erased")
        path = result.save_edit(base / "edit.safetensors")
        applied = apply_edit(path, model)
        applied.save(base / "applied")
        one, two = tree(base / "erased"), tree(base / "applied")
        assert all(one.pop(name) != two.pop(name) for name in (RECORD, CARD))  # how it was made
        assert one == two
        assert applied.tensors == result.tensors
        assert tree(model) == before
        undo_folder(base / "applied", base / "back")
        assert tensor_bytes(next((base / "back/unet").glob("*.safetensors"))) == tensor_bytes(
            next((model / "unet").glob("*.safetensors"))
        )


def test_a_fine_tune_in_another_precision_is_multiplied_by_the_same_matrix(
    sd1: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """W M within half a unit of float16 in the last place, W being the fine-tune's own."""
    edit = made(sd1)
    tuned = tmp_path / "tuned"
    pipe = DiffusionPipeline.from_pretrained(sd1, torch_dtype=torch.float16)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    pipe.save_pretrained(tuned)
    apply_edit(edit, tuned).save(tmp_path / "out")
    matrix = torch.eye(96, dtype=torch.float64) + edit.cross.delta()
    old, new = load_file(tuned / UNET), load_file(tmp_path / "out" / UNET)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {p.name for p in open_checkpoint(sd1).projections}
    for name in changed:
        exact = old[name].double() @ matrix
        assert new[name].dtype == torch.float16
        assert bool(((new[name].double() - exact).abs() <= 2.0**-11 * exact.abs() + 1e-6).all())
    assert gap(weights(tmp_path / "out"), weights(tuned)) > 0.01


def test_nothing_is_encoded_and_no_model_is_built(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import transformers

    path = edit_model(sd1, ["cat"], config=QUICK).save_edit(tmp_path / "edit.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("built")

    for kind in (transformers.CLIPTextModel, transformers.CLIPTokenizer, diffusers.UNet2DConditionModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    apply_edit(path, sd1).save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="built"):  # control: to erase takes the text encoder
        edit_model(sd1, ["cat"], config=QUICK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_loaded_pipeline_is_edited_in_place_and_back(sd1: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Also in float64, where the product runs in float64: the factor that erases is the rounded one already."""
    one, two = (DiffusionPipeline.from_pretrained(sd1, torch_dtype=dtype) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in two.unet.state_dict().items()}
    result = edit_model(one, ["cat"], config=QUICK)
    applied = apply_edit(result.save_edit(tmp_path / "edit.safetensors"), two)
    assert all(torch.equal(tensor, two.unet.state_dict()[name]) for name, tensor in one.unet.state_dict().items())
    assert applied.tensors == result.tensors
    assert "cat -> object" in applied.report()
    applied.undo()
    assert all(torch.equal(tensor, two.unet.state_dict()[name]) for name, tensor in before.items())


def test_the_record_of_an_applied_edit_holds_its_recipe(sd1: Path, tmp_path: Path) -> None:
    result = edit_model(sd1, ["cat"], preserve=["dog"], config=QUICK)
    applied = apply_edit(EditFile.of(result).scale(0.5), sd1)
    applied.save(tmp_path / "out")
    data, full = inspect_path(tmp_path / "out"), result.to_dict()
    assert data["applied"] == {"made_from": sd1.name, "history": [{"scale": 0.5}]}
    assert data["config"] == full["config"]
    assert data["concepts"][0]["residual"] == {} != full["concepts"][0]["residual"]  # no longer known, so not told
    assert applied.save_edit(tmp_path / "half.safetensors").is_file()
    assert EditFile.load(tmp_path / "half.safetensors").recipe["history"] == [{"scale": 0.5}]


# Whose text encoder


def test_an_encoder_is_the_same_in_every_precision_and_whether_loaded_or_stored(family: str, tiny: Tiny) -> None:
    base = tiny(family)
    found = [source.print() for source in stored_encoders(base)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        checkpoint = open_checkpoint(base, dtype=dtype)
        loaded = [source.print() for source in loaded_encoders(checkpoint.encoder)]
        agree = [(a.float16 == b.float16, a.bfloat16 == b.bfloat16) for a, b in zip(found, loaded, strict=True)]
        expected = {torch.float32: (True, True), torch.float16: (True, False), torch.bfloat16: (False, True)}[dtype]
        assert set(agree) == {expected}, dtype
        assert [a.structure for a in found] == [b.structure for b in loaded]
    edit = made(base)
    for dtype in (torch.float16, torch.bfloat16):
        copy = base.parent / str(dtype)
        DiffusionPipeline.from_pretrained(base, torch_dtype=dtype).save_pretrained(copy)
        assert apply_edit(edit, copy).source.where == str(copy)


def damage(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("layers.1.mlp.fc1.weight"))
    tensors[name][3, 5] += 2e-3 * tensors[name].abs().max()


def test_a_foreign_text_encoder_is_refused_with_the_reason(sd1: Path, tmp_path: Path) -> None:
    edit = made(sd1)
    apply_edit(edit, sd1)  # control
    damage(sd1 / TEXT, nudge)
    with pytest.raises(
        CheckpointError, match=r"text_encoder is not the .* made for \(its weights differ.*--force-encoder"
    ):
        apply_edit(edit, sd1)
    with pytest.raises(CheckpointError, match="its weights differ"):
        apply_edit(edit, DiffusionPipeline.from_pretrained(sd1))
    assert not (tmp_path / "out").exists()
    with pytest.warns(RealEraWarning, match="because it was forced"):
        result = apply_edit(edit, sd1, force_encoder=True)
    assert result.save(tmp_path / "out").is_dir()


def test_what_decides_the_states_beside_the_weights_counts_too(sd1: Path) -> None:
    edit = made(sd1)
    config = json.loads((sd1 / "text_encoder/config.json").read_text())
    for field, value in (("hidden_act", "gelu"), ("num_attention_heads", 8)):
        (sd1 / "text_encoder/config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(CheckpointError, match=rf"it has .*{field} {value}"):
            apply_edit(edit, sd1)
    (sd1 / "text_encoder/config.json").write_text(json.dumps({**config, "dropout": 0.5, "transformers_version": "9"}))
    apply_edit(edit, sd1)


def test_spellings_and_buffers_that_change_no_state_do_not_count(sd1: Path) -> None:
    """Older files have `text_model.` before each name, and positions as a buffer."""
    edit = made(sd1)

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(32)
        tensors["logit_scale"] = torch.tensor(4.6)

    damage(sd1 / TEXT, older)
    apply_edit(edit, sd1)


def test_another_width_is_refused_even_by_force(sd1: Path, sdxl: Path) -> None:
    with pytest.raises(
        ProjectionError, match=r"made for 2 text encoders of width 64, 80 and 72 pooled.* 1 text encoder of"
    ):
        apply_edit(made(sdxl), sd1, force_encoder=True)
    with pytest.raises(ProjectionError, match="models of different kinds"):
        apply_edit(made(sd1), sdxl, force_encoder=True)
