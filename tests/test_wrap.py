"""The prompt-side form: equal pictures with weights that never change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import QUICK

from realera_edit import EditConfig, EditFile, RealEraWarning, apply_edit, edit_model, wrap_text_encoder
from realera_edit.errors import CheckpointError, ConfigError

Tiny = Callable[..., Path]
PROMPT = "a photo of a cat"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | None = PROMPT, **options: Any) -> torch.Tensor:
    """The latents after three steps, always from the same noise."""
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", **options}
    size = {"height": 16, "width": 16} if pipe.unet.config.sample_size == 8 else {}
    if "prompt_embeds" not in options:
        options["prompt"] = prompt
    drawn: torch.Tensor = pipe(generator=torch.Generator().manual_seed(0), **size, **options).images
    return drawn


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


def snapshot(pipe: Any) -> dict[str, torch.Tensor]:
    parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return {f"{i}.{name}": w.clone() for i, m in enumerate(parts) for name, w in m.state_dict().items()}


@pytest.fixture
def edit(model: Path) -> EditFile:
    return EditFile.of(edit_model(model, ["cat"], config=QUICK))


def test_a_wrapped_pipeline_draws_what_edited_weights_draw(model: Path, family: str, edit: EditFile) -> None:
    """Within 1e-5 in float32, where the edit itself changes latents by 1e-2 at least; keys, values and pooled."""
    plain, edited = load(model), load(model)
    apply_edit(edit, edited)
    original, wanted, before = draw(plain), draw(edited), snapshot(plain)
    assert apart(original, wanted) > 1e-2
    with wrap_text_encoder(plain, edit):
        every: list[dict[str, Any]] = [{}, {"negative_prompt": "a dog"}, {"num_images_per_prompt": 2}]
        # diffusers 0.42 looks for the final norm of Stable Diffusion 1.x and 2.x where transformers 5 has none
        every += [{"clip_skip": 1}] * (family == "sdxl")
        for options in every:
            assert apart(draw(plain, **options), draw(edited, **options)) < 1e-5, options
        assert apart(draw(plain, guidance_scale=1.0), draw(edited, guidance_scale=1.0)) < 1e-5
        after = snapshot(plain)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(draw(plain), original)
    assert "encode_prompt" not in vars(plain)


def test_a_batch_and_a_dense_edit(sd1: Path) -> None:
    edit = EditFile.of(edit_model(sd1, ["cat"], config=replace(QUICK, perturbation="isotropic")))
    assert edit.cross.right is None
    plain, edited = load(sd1), load(sd1)
    apply_edit(edit, edited)
    prompts: Any = ["a cat", "a horse", "a house"]
    with wrap_text_encoder(plain, edit):
        assert apart(draw(plain, prompts), draw(edited, prompts)) < 1e-5
    assert apart(draw(plain, prompts), draw(edited, prompts)) > 1e-3


def test_half_precision_differs_by_its_rounding(sdxl: Path) -> None:
    edit = EditFile.of(edit_model(sdxl, ["cat"], config=QUICK))
    plain, edited = load(sdxl, torch.bfloat16), load(sdxl, torch.bfloat16)
    apply_edit(edit, edited)
    original = draw(plain)
    with wrap_text_encoder(plain, edit):
        drawn = draw(plain)
    assert drawn.dtype == torch.bfloat16
    assert apart(drawn, draw(edited)) < 0.02
    assert apart(drawn, original) > 0.06


def test_states_are_mapped_once_however_they_come(model: Path, family: str, edit: EditFile) -> None:
    """Given ready-made they are mapped, as edited weights would; unless the wrapper has returned them itself."""
    plain, edited = load(model), load(model)
    apply_edit(edit, edited)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def states(pipe: Any) -> dict[str, Any]:
        extra: dict[str, Any] = {} if family == "sdxl" else {"num_images_per_prompt": 1}
        found = pipe.encode_prompt(
            PROMPT, device="cpu", do_classifier_free_guidance=True, negative_prompt="a dog", **extra
        )
        return dict(zip(names, found, strict=False))

    wanted = draw(edited, negative_prompt="a dog")
    with torch.no_grad():
        raw = states(plain)
    with wrap_text_encoder(plain, edit):
        assert apart(draw(plain, **raw), wanted) < 1e-5
        with torch.no_grad():
            mapped = states(plain)
        assert apart(draw(plain, **mapped), wanted) < 1e-5
        copies = {name: tensor.clone() for name, tensor in mapped.items()}
        assert apart(draw(plain, **copies), wanted) > 1e-4  # control: to map twice is another picture
    assert not torch.equal(raw["prompt_embeds"], mapped["prompt_embeds"])
    assert apart(edit.cross.map(raw["prompt_embeds"][0]), mapped["prompt_embeds"][0]) < 1e-6


def test_the_pooled_path_is_mapped_by_its_own_factor_or_left_alone(sdxl: Path) -> None:
    pipe = load(sdxl)
    with torch.no_grad():
        plain = pipe.encode_prompt(PROMPT, device="cpu")
    for pooled in (True, False):
        edit = EditFile.of(edit_model(sdxl, ["cat"], config=replace(QUICK, pooled=pooled)))
        with torch.no_grad(), wrap_text_encoder(pipe, edit):
            found = pipe.encode_prompt(PROMPT, device="cpu")
        assert apart(found[0], plain[0]) > 1e-3
        assert (apart(found[2], plain[2]) > 1e-3) == pooled
        if edit.pooled is not None:
            assert apart(found[2], edit.pooled.map(plain[2])) < 1e-6
        assert torch.equal(found[3], plain[3])  # zeros, as SDXL's empty negative prompt is


def quantised(unet: torch.nn.Module) -> None:
    """Every matrix in the form that bitsandbytes gives 4 bits."""
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Linear):
            packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)


CHANGES: dict[str, Callable[[Any], object]] = {
    "compiled": lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet)),
    "compiled encoder": lambda pipe: setattr(pipe, "text_encoder", torch.compile(pipe.text_encoder)),
    "quantised": lambda pipe: quantised(pipe.unet),
    "offloaded": lambda pipe: pipe.unet.to("meta"),
    "fused": lambda pipe: pipe.unet.fuse_qkv_projections(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_weights_of_the_unet_do_not_matter(change: str, model: Path, edit: EditFile) -> None:
    pipe = load(model)
    CHANGES[change](pipe)
    before = [(weight.data_ptr(), weight.dtype, weight.device) for weight in pipe.unet.parameters()]
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad(), wrap_text_encoder(pipe, edit):
        if change != "compiled encoder":  # to call it would compile it
            plain = load(model).encode_prompt(PROMPT, **options)[0]
            assert apart(pipe.encode_prompt(PROMPT, **options)[0], edit.cross.map(plain[0])[None]) < 1e-6
    assert before == [(weight.data_ptr(), weight.dtype, weight.device) for weight in pipe.unet.parameters()]


def offloaded(pipe: Any) -> list[torch.nn.Parameter]:
    """Offload as `enable_sequential_cpu_offload` does, which asks for a GPU; the weights that are left."""
    from accelerate import cpu_offload

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        cpu_offload(part, "cpu", offload_buffers=True)
    return [weight for part in parts for weight in part.parameters()]


def test_encoders_that_are_offloaded_step_by_step_are_compared_all_the_same(model: Path, edit: EditFile) -> None:
    plain, pipe, other = load(model), load(model), load(model)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight.mul_(2)
    weights = [*offloaded(pipe), *offloaded(other)]
    wanted = draw(plain)
    with wrap_text_encoder(plain, edit), wrap_text_encoder(pipe, edit):
        assert apart(draw(plain), wanted) > 1e-3
        assert torch.equal(draw(pipe), draw(plain))
    with pytest.raises(CheckpointError, match="is not the text encoder that the edit was made for"):
        wrap_text_encoder(other, edit)
    assert all(weight.is_meta for weight in [*weights, *pipe.text_encoder.parameters()])
    pipe.text_encoder = load(model).text_encoder.to("meta")
    with pytest.raises(CheckpointError, match="the weights of text_encoder are offloaded"):
        wrap_text_encoder(pipe, edit)


def test_wrappers_nest_and_come_off_in_the_reverse_order(sd1: Path) -> None:
    one, two = (EditFile.of(edit_model(sd1, [name], config=QUICK)) for name in ("cat", "dog"))
    pipe, edited = load(sd1), load(sd1)
    original = draw(pipe)
    # the state passes through the first wrapper first: in the weights, that is the edit applied last
    apply_edit(two, edited)
    apply_edit(one, edited)
    first = wrap_text_encoder(pipe, one)
    second = wrap_text_encoder(pipe, two)
    assert apart(draw(pipe), draw(edited)) < 1e-5
    with pytest.raises(CheckpointError, match="wrapped again since: remove the later wrapper first"):
        first.remove()
    second.remove()
    assert apart(draw(pipe), original) > 1e-3
    first.remove()
    first.remove()
    assert torch.equal(draw(pipe), original)
    with pytest.raises(RuntimeError, match="mine"), wrap_text_encoder(pipe, one):
        raise RuntimeError("mine")
    assert torch.equal(draw(pipe), original)


def test_what_has_no_prompt_side_form_is_refused(sd1: Path, sd2: Path, tmp_path: Path) -> None:
    pipe = load(sd1)
    original = draw(pipe)
    for part, word in (("k", "keys"), ("v", "values")):
        edit = EditFile.of(edit_model(sd1, ["cat"], config=replace(QUICK, edit=part)))
        with pytest.raises(ConfigError, match=f"changes {word} alone, .* no prompt-side form. Use apply_edit"):
            wrap_text_encoder(pipe, edit)
    edit = EditFile.of(edit_model(sd1, ["cat"], config=QUICK))
    with pytest.raises(CheckpointError, match="is a path; load the pipeline first"):
        wrap_text_encoder(sd1, edit)
    with pytest.raises(CheckpointError, match="object has no U-Net"):
        wrap_text_encoder(object(), edit)
    with pytest.raises(CheckpointError, match="is not the text encoder that the edit was made for"):
        wrap_text_encoder(load(sd2), edit)
    with pytest.warns(RealEraWarning, match="because it was forced"):
        wrap_text_encoder(load(sd2), edit, force_encoder=True).remove()
    pipe.encode_prompt = lambda *_, **__: [torch.zeros(1)]
    with pytest.raises(CheckpointError, match="returns something else"), wrap_text_encoder(pipe, edit):
        pipe.encode_prompt("a cat")
    del pipe.encode_prompt
    assert torch.equal(draw(pipe), original)


def test_equal_pictures_of_the_real_model(emoji: Path, tmp_path: Path) -> None:
    """Pixels from 0 to 1 agree within 1e-3, one quarter of a level of 8 bits; on average the edit moves them by 0.1."""
    path = edit_model(emoji, ["cat face"], config=EditConfig()).save_edit(tmp_path / "edit.safetensors")
    plain, edited = load(emoji), load(emoji)
    apply_edit(path, edited)

    def picture(pipe: Any, prompt: str) -> torch.Tensor:
        return torch.as_tensor(draw(pipe, prompt, num_inference_steps=6, output_type="np"))

    for prompt, change in (("an emoji of a cat face", (0.1, 1)), ("an emoji of a guitar", (0, 0.03))):
        original, wanted = picture(plain, prompt), picture(edited, prompt)
        with wrap_text_encoder(plain, path):
            drawn = picture(plain, prompt)
        assert float((drawn - wanted).abs().max()) < 1e-3
        assert change[0] <= float((drawn - original).abs().mean()) < change[1]
