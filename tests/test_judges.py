"""Judges: the network that ships, other people's models read from tiny local folders, and one's own function."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from realera_edit import judges
from realera_edit.errors import CheckpointError, ConfigError
from realera_edit.judges import FunctionJudge, Network, ReferenceJudge, Verdicts, open_judge, reference_judge, shrink
from realera_edit.judges_pretrained import ClassifierJudge, ClipJudge, NudeNetJudge

LABELS, STYLES = ("cat", "dog", "fish"), ("round", "flat")


def pictures(count: int = 5, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file as `benchmarks.reference_model.judge` writes it, with random weights."""
    torch.manual_seed(0)
    meta = {"recipe": {"width": 4, "seed": 1}, "labels": LABELS, "styles": STYLES}
    state = {name: value.contiguous() for name, value in Network(4, 3, 2).state_dict().items()}
    save_file(state, tmp_path / "judge.safetensors", {"judge": json.dumps(meta)})
    return tmp_path / "judge.safetensors"


# The reference judge


def test_reference_judge_is_its_network(weights: Path) -> None:
    judge, shown = ReferenceJudge.load(weights), pictures()
    found = judge(shown)
    assert (judge.labels, judge.styles, judge.name) == (LABELS, STYLES, "reference")
    small = shown.reshape(5, 32, 2, 32, 2, 3).mean((2, 4)).round()
    with torch.inference_mode():
        concept, style = judge.network(torch.tensor(small).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert found.style is not None
    assert found.features is not None
    assert found.concept.tolist() == concept.argmax(1).tolist()
    assert found.style.tolist() == style.argmax(1).tolist()
    head = judge.network.concept
    logits = found.features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    assert logits == pytest.approx(concept.numpy(), abs=1e-4)
    assert (str(found.concept.dtype), str(found.features.dtype)) == ("int64", "float32")
    assert found.features.shape == (5, 32)


def test_reference_judge_in_batches_and_of_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ReferenceJudge.load(weights)
    whole = judge(pictures(7))
    monkeypatch.setattr(judges, "_BATCH", 3)
    parts = judge(pictures(7))
    assert parts.concept.tolist() == whole.concept.tolist()
    assert whole.features is not None
    assert parts.features == pytest.approx(whole.features, abs=1e-4)
    nothing = judge(np.zeros((0, 64, 64, 3), np.uint8))
    assert [len(part) for part in vars(nothing).values()] == [0, 0, 0]


def test_pictures_are_shrunk_by_area() -> None:
    checks = (
        torch.tensor([[0, 200], [100, 100]], dtype=torch.uint8).repeat(32, 32)[None, :, :, None].expand(1, 64, 64, 3)
    )
    assert shrink(checks).shape == (1, 32, 32, 3)
    assert set(shrink(checks).flatten().tolist()) == {100}
    assert shrink(checks[:, :32, :32]).equal(checks[:, :32, :32])
    assert shrink(torch.zeros(2, 50, 40, 3, dtype=torch.uint8)).shape == (2, 32, 32, 3)


def test_shipped_judge(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(judges, "SHIPPED", weights)
    assert reference_judge().labels == open_judge("reference", ()).labels == LABELS
    monkeypatch.setattr(judges, "SHIPPED", tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match=r"gone.safetensors: the reference judge is not installed.* clip:FOLDER"):
        reference_judge()


def test_damaged_judges(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match=r"other.safetensors: no such file"):
        open_judge(f"reference:{other}", ())
    other.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a judge of realera-edit"):
        ReferenceJudge.load(other)
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="not a judge of realera-edit"):
        ReferenceJudge.load(other)
    meta = {"recipe": {"width": 4}, "labels": [*LABELS, "extra"], "styles": STYLES}
    save_file(Network(4, 3, 2).state_dict(), other, {"judge": json.dumps(meta)})
    with pytest.raises(CheckpointError, match="not a judge of realera-edit"):
        ReferenceJudge.load(other)


# One's own function


def test_function_judge_takes_labels_places_or_verdicts() -> None:
    def says(answer: Any) -> list[int]:
        found: list[int] = FunctionJudge(lambda _: answer, LABELS)(pictures(3)).concept.tolist()
        return found

    assert says(["dog", "cat", "cow"]) == [1, 0, -1]
    assert says(np.array([2, -1, 0])) == [2, -1, 0]
    assert says(Verdicts(np.array([1, 1, 1]))) == [1, 1, 1]
    for answer, message in ((["dog"], r"gave \[1\] verdicts on 3 pictures"), ([0, 1, 3], "outside of its 3 labels")):
        with pytest.raises(ConfigError, match=message):
            says(answer)
    with pytest.raises(ConfigError, match=r"gave \[2, 3\] verdicts"):
        says(Verdicts(np.zeros(3, np.int64), None, np.zeros((2, 4), np.float32)))


def test_python_judges_are_imported_only_when_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_judge.py").write_text(
        "import numpy as np\nRAN = True\n"
        "def brightest(pictures): return pictures.mean((1, 2)).argmax(1)\n"
        "def named(pictures): return ['dog'] * len(pictures)\n"
        "named.labels = ('dog', 'wolf')\n"
        "class Whole:\n    name, labels, styles = 'whole', ('a',), ('s',)\n    __call__ = None\n"
        "whole, number = Whole(), 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in ("own_judge:brightest", "module:own_judge:brightest", "clip", "classifier:", "nudenet:x", ""):
        with pytest.raises(ConfigError, match="expected reference"):
            open_judge(spec, LABELS)
    assert "own_judge" not in sys.modules
    judge = open_judge("python:own_judge:brightest", LABELS)
    assert (judge.labels, judge.name) == (LABELS, "python:own_judge:brightest")
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 9
    assert judge(red).concept.tolist() == [0]
    assert open_judge("python:own_judge:named", LABELS).labels == ("dog", "wolf")
    assert open_judge("python:own_judge:whole", LABELS).name == "whole"
    for place, message in (
        ("own_judge:number", "is a int, not a function"),
        ("own_judge:gone", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("own_judge", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_judge(f"python:{place}", LABELS)
    del sys.modules["own_judge"]


# Other people's models


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in a local folder."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "clip"
    size = tiny_models.write_vocabulary(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **shape,
        "vocab_size": size,
        "max_position_embeddings": 32,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    vision = {**shape, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


def test_clip_judge_is_clip(clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    judge, shown = open_judge(f"clip:{clip}", LABELS), pictures(4, 32)
    assert judge.name == f"clip:{clip.name}"  # records of it may be published
    found = judge(shown)
    assert isinstance(judge, ClipJudge)
    tokens = CLIPTokenizer.from_pretrained(str(clip))
    ids = tokens([f"a picture of a {label}" for label in LABELS], padding=True, return_tensors="pt")
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    x = (torch.tensor(shown).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        wanted = CLIPModel.from_pretrained(str(clip)).eval()(pixel_values=x, **ids)
    assert found.concept.tolist() == wanted.logits_per_image.argmax(1).tolist()
    assert found.features == pytest.approx(wanted.image_embeds.numpy(), abs=1e-5)
    assert found.style is None
    with pytest.raises(ConfigError, match="no labels to choose from"):
        ClipJudge(clip, ())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ViT with three labels in a local folder, to be shown the middle of pictures at half size."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config.id2label, config.label2id = dict(enumerate(LABELS)), {label: i for i, label in enumerate(LABELS)}
    ViTForImageClassification(config).save_pretrained(folder)
    said = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def test_classifier_judge_is_the_classifier(classifier: Path) -> None:
    from transformers import ViTForImageClassification

    judge, shown = open_judge(f"classifier:{classifier}", ("ignored",)), pictures(6, 16)
    assert judge.name == f"classifier:{classifier.name}"
    found = judge(shown)
    assert judge.labels == LABELS
    x = (torch.tensor(shown).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        logits = ViTForImageClassification.from_pretrained(str(classifier)).eval()(pixel_values=x).logits
    assert found.features == pytest.approx(logits.numpy(), abs=1e-5)
    assert found.concept.tolist() == logits.argmax(1).tolist()
    # larger ones are resized, wider ones are cut in the middle
    grey = np.full((1, 64, 64, 3), 60, np.uint8)
    wide = np.concatenate([np.zeros((1, 64, 32, 3), np.uint8), grey, np.zeros((1, 64, 32, 3), np.uint8)], 2)
    assert judge(grey).features == pytest.approx(judge(grey[:, :16, :16]).features, abs=1e-4)
    assert judge(wide).features == pytest.approx(judge(grey).features, abs=0.05)


@pytest.mark.parametrize("judge", [ClassifierJudge, lambda folder: ClipJudge(folder, LABELS)])
def test_no_pickles_and_no_code(judge: Callable[[Path], Any], classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        judge(tmp_path / "gone")
    config = json.loads((classifier / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForImageClassification": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code ran')")
    with pytest.raises(CheckpointError, match="cannot be loaded as"):
        judge(tmp_path)
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded as"):
        judge(tmp_path)


def test_nudenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ConfigError, match="pip install nudenet"):
        open_judge("nudenet", ())

    class NudeDetector:
        def detect(self, picture: np.ndarray) -> list[dict[str, Any]]:
            assert picture[0, 0].tolist() == [3, 2, 1]  # blue, green, red
            kinds = (("FACE_FEMALE", 0.9), ("FEMALE_BREAST_COVERED", 0.9), ("ANUS_EXPOSED", 0.1), ("ANUS_EXPOSED", 0.3))
            return [{"class": kind, "score": score} for kind, score in kinds[: picture[1, 1, 0]]]

    module = ModuleType("nudenet")
    module.NudeDetector = NudeDetector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", module)
    shown = np.zeros((5, 4, 4, 3), np.uint8)
    shown[:, 0, 0] = (1, 2, 3)
    shown[:, 1, 1, 2] = range(5)
    judge = NudeNetJudge()
    assert [judge.labels[i] for i in judge(shown).concept] == ["safe"] * 4 + ["explicit"]
