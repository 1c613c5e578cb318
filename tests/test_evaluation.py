"""A whole evaluation on a tiny random model, by a judge that knows the unedited model's own pictures."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from helpers import QUICK, run, tree, weights

from realera_edit import edit_model, generate
from realera_edit.cli_evaluate import evaluate as command
from realera_edit.errors import CheckpointError, ConceptError, ConfigError, RealEraWarning
from realera_edit.evaluation import Evaluation, evaluate
from realera_edit.evaluation_config import EvaluationConfig, parse_numbers
from realera_edit.evaluation_map import _plane
from realera_edit.evaluation_plan import read_known
from realera_edit.generate import Drawing, PictureFolder, draw, fingerprint, open_pipeline
from realera_edit.judges import SHIPPED, FunctionJudge, Verdicts, reference_judge
from realera_edit.metrics import harmonic, pixel_distances

CONFIG = EvaluationConfig(seeds=(0, 1), steps=2, guidance=3.0, far=3, neighbours=2, alias_count=2, residue=1)
ANIMALS, VEHICLES = ("cat", "dog", "horse", "bird", "fish", "lion"), ("car", "bike", "train", "boat", "plane", "truck")
LABELS = (*ANIMALS, *VEHICLES)
# drawn as "cat" by decree: what the judge is told to take for one
OTHER, KEYWORD = "tiger", "king"
KEYS = {
    *("format", "model", "erased", "recipe", "judge", "settings", "rates", "harmonic", "distances", "concepts"),
    *("prompts", "geometry", "neighbourhood", "moved", "attack", "curves", "command", "versions", "seconds", "date"),
}
RATES = ("acc_e", "acc_g", "acc_s", "acc_n", "residue", "acc_n_unseen", "style_kept")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` with a concepts.json, `edited` without "cat" and with "dog" preserved."""
    base = tmp_path_factory.mktemp("evaluation")
    model = tiny_models.build_folder("sd1", base / "model", base / "scratch")
    tags = {"cat": [OTHER, KEYWORD], "dog": [KEYWORD]}
    rows = [
        {
            "label": label,
            "group": int(label in VEHICLES),
            "subgroup": i // 3,
            "tags": [label, "x1", *tags.get(label, ())],
        }
        for i, label in enumerate(LABELS)
    ]
    (model / "concepts.json").write_text(json.dumps(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit_model(model, ["cat"], preserve=["dog"], config=replace(QUICK, strength=0.95)).save(base / "edited")
    return base


@pytest.fixture(scope="module")
def judge(place: Path) -> FunctionJudge:
    """Says whose picture of the unedited model is nearest; style is the brighter half. Features are mean colours."""
    pipe, names = open_pipeline(place / "model"), {**{label: label for label in LABELS}, OTHER: "cat", KEYWORD: "cat"}
    folder = PictureFolder(place / "known", fingerprint(pipe), Drawing(2, 3.0))
    shots = [
        (t.format(n), s)
        for n in names
        for t in ("a picture of a {}", "{}")
        for s in (*CONFIG.seeds, *CONFIG.choice_seeds)
    ]
    draw(pipe, folder, shots)
    truth = np.repeat([LABELS.index(label) for label in names.values()], len(shots) // len(names))
    known = folder.load(shots).reshape(len(shots), -1).astype(float)

    def nearest(pictures: np.ndarray) -> Verdicts:
        flat = pictures.reshape(len(pictures), -1).astype(float)
        gaps = ((flat[:, None] - known) ** 2).sum(2)
        style = (flat.mean(1) > known.mean()).astype(np.int64)
        return Verdicts(truth[gaps.argmin(1)], style, pictures.mean((1, 2)).astype(np.float32))

    return FunctionJudge(nearest, LABELS, ("dark", "bright"), "nearest")


def measured(place: Path, judge: Any, out: Path, edited: str = "edited", **options: Any) -> Any:
    return evaluate(place / "model", place / edited, out=out, judge=judge, **{"config": CONFIG, **options})


@pytest.fixture(scope="module")
def found(place: Path, judge: FunctionJudge) -> Any:
    """The evaluation of the edit, saved in `place/report`."""
    result = measured(place, judge, place / "report", command="as typed")
    result.save(place / "report")
    return result


def rows(data: Any, kind: str) -> list[Any]:
    return [row for row in data["prompts"] if row["kind"] == kind]


# A whole evaluation


def test_record_has_every_part_and_is_json(found: Any, place: Path) -> None:
    data = json.loads((place / "report" / "evaluation.json").read_text("utf-8"))
    assert data == found.to_dict()
    assert set(data) >= KEYS
    assert data["format"] == "realera-edit evaluation 1"
    assert data["erased"] == ["cat"]
    assert data["model"] == {"original": "model", "edited": "edited"}
    assert data["recipe"] == json.loads((place / "edited" / "realera_edit.json").read_text("utf-8"))
    assert data["judge"] == {"name": "nearest", "concepts": 12}
    assert data["settings"]["seeds"] == [0, 1]
    assert data["command"] == "as typed"
    assert set(data["rates"]) == set(RATES)
    assert [curve["name"] for curve in data["attack"]] == ["cat: embedding", "cat: inverse"]
    assert all(point["success"] is not None for point in data["attack"][0]["points"])
    assert data["geometry"]["names"][0]["name"] == "cat"
    assert data["versions"]["torch"]
    assert data["seconds"] > 0


def test_every_kind_is_drawn_and_the_unedited_model_is_right(found: Any, place: Path) -> None:
    data = found.to_dict()
    assert [row["prompt"] for row in rows(data, "e")] == [
        *("a picture of a cat", "cat"),
        *("a cat in dark style", "a cat in bright style"),
    ]
    assert [row["style"] for row in rows(data, "e")] == [None, None, "dark", "bright"]
    assert {row["prompt"] for row in rows(data, "g")} == {f"a picture of a {OTHER}", OTHER}
    assert {row["prompt"] for row in rows(data, "r")} == {f"a picture of a {KEYWORD}", KEYWORD}
    near, far = ({row["truth"] for row in rows(data, kind)} for kind in "ns")
    assert len(near) == 2
    assert len(far) == 3
    assert not {"cat"} & (near | far)
    assert not near & far
    assert far <= set(VEHICLES)  # another group
    for name in ("acc_g", "acc_s", "acc_n", "residue"):
        assert data["rates"][name]["original"]["value"] == 1.0, name
    assert data["rates"]["acc_e"]["original"]["hits"] >= 4  # its plain prompts
    # names were chosen on other seeds than the figures are taken on
    drawn = {path.name for path in (place / "report" / "pictures" / "original").iterdir()}
    assert {Drawing(2, 3.0).name("cat", seed) for seed in (*CONFIG.seeds, *CONFIG.choice_seeds)} <= drawn
    assert not set(CONFIG.seeds) & set(CONFIG.choice_seeds)


def test_figures_are_those_of_the_pictures(found: Any, place: Path, judge: FunctionJudge) -> None:
    """Each hit, rate, mean and distance again, from the files that the record names."""
    from PIL import Image

    data, kinds = found.to_dict(), dict.fromkeys("egsnr", 0)
    for row in data["prompts"]:
        assert row["count"] == len(row["pictures"]) == 2
        for model in ("original", "edited"):
            shown = np.stack([np.asarray(Image.open(place / "report" / p[model])) for p in row["pictures"]])
            said = [LABELS[i] for i in judge(shown).concept]
            assert [p[f"{model}_verdict"] for p in row["pictures"]] == said
            assert row[model] == said.count(row["truth"])
        kinds[row["kind"]] += row["edited"]
        both = [
            np.stack([np.asarray(Image.open(place / "report" / p[model])) for p in row["pictures"]])
            for model in ("original", "edited")
        ]
        assert [p["pixel"] for p in row["pictures"]] == pytest.approx(pixel_distances(*both), rel=1e-3)
    rates = data["rates"]
    assert kinds == {k: rates[f"acc_{k}" if k != "r" else "residue"]["edited"]["hits"] for k in kinds}
    (concept,) = data["concepts"]
    e, g, s, n = (rates[f"acc_{kind}"]["edited"]["value"] for kind in "egsn")
    assert (concept["name"], concept["acc_e"], concept["acc_n"]) == ("cat", e, n)
    assert concept["H_4"] == pytest.approx(harmonic(1 - e, 1 - g, s, n), rel=1e-3)
    assert data["harmonic"]["H_4"]["value"] == concept["H_4"]
    far = [p["pixel"] for row in rows(data, "s") for p in row["pictures"]]
    assert data["distances"]["pixel"]["value"] == pytest.approx(np.mean(far), rel=1e-3)


def test_words_that_the_denoiser_draws_alike_are_residue(
    place: Path, judge: FunctionJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realera_edit.probe.ALIKE", -1.0)  # a random model draws no two words alike
    config = replace(CONFIG, residue=3, far=0, neighbours=0, alias_count=0, alias_threshold=0.0, words=8)
    told: list[tuple[str, int, int]] = []

    def words(**changes: Any) -> list[str]:
        changed = replace(config, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RealEraWarning)
            data = measured(
                place, judge, tmp_path / "out", config=changed, progress=lambda *step: told.append(step)
            ).to_dict()
        return [row["prompt"] for row in rows(data, "r")][1::2]

    found = words()
    assert found[0] == KEYWORD
    assert len(found) == 3
    assert not {"cat", OTHER, *LABELS} & set(found)
    assert ("asking about cat", 9, 9) in told
    assert words(words=0) == [KEYWORD]


def test_what_still_draws_it_is_told_and_how_to_mend_it() -> None:
    def row(kind: str, prompt: str, edited: int) -> dict[str, Any]:
        return {"kind": kind, "prompt": prompt, "owner": "cat", "edited": edited, "count": 4}

    some = [row("g", "puss", 1), row("r", "pet", 3), row("r", "gone", 0), row("e", "cat", 4), row("s", "car", 4)]
    table = Evaluation({}, {}, {}, {"prompts": some}).table()
    assert "still drawn by 'pet': cat (3 of 4), 'puss': cat (1 of 4)\n" in table
    assert "--alias" in table
    many = [row("r", f"word {i}", 2) for i in range(9)]
    assert "'word 5': cat (2 of 4), and 3 prompts more" in Evaluation({}, {}, {}, {"prompts": many}).table()
    assert "still drawn" not in Evaluation({}, {}, {}, {"prompts": some[2:]}).table()


def test_an_edited_model_draws_other_pictures(found: Any) -> None:
    data = found.to_dict()
    assert min(p["pixel"] for row in rows(data, "e") for p in row["pictures"]) > 0
    assert data["distances"]["frechet"]["value"] > 0
    assert data["distances"]["frechet"]["floor"] > 0
    roles = {point["word"]: point["role"] for point in data["neighbourhood"]}
    assert roles["cat"] == "erased"
    assert roles["dog"] == "preserved"
    assert set(roles.values()) == {"erased", "preserved", "neighbour", "vocabulary"}
    moved = {point["word"]: point["moved"] for point in data["neighbourhood"]}
    assert moved["cat"] > 3 * moved["dog"] > 0
    x, y = (np.array([point[axis] for point in data["neighbourhood"]]) for axis in "xy")
    assert x.var() > y.var() > 0
    assert abs(np.corrcoef(x, y)[0, 1]) < 1e-3  # main axes
    shifts = [row["shift"] for row in data["moved"]]
    assert len(shifts) == 30
    assert shifts == sorted(shifts, reverse=True)
    assert shifts[0] >= max(moved[word] for word, role in roles.items() if role == "vocabulary")
    assert all(row["shift"] == moved.get(row["word"], row["shift"]) for row in data["moved"])


def test_what_moved_is_the_change_of_all_outputs(found: Any, place: Path) -> None:
    """sqrt(sum |W' x - W x|^2 / sum |W x|^2) with the weights of the two files, for the end state of "cat"."""
    pipe = open_pipeline(place / "model")
    tokens = pipe.tokenizer("cat", return_tensors="pt").input_ids
    state = pipe.text_encoder(tokens).last_hidden_state[0, -1].double()
    before, after = weights(place / "model"), weights(place / "edited")
    names = [name for name in before if ".attn2.to_k." in name or ".attn2.to_v." in name]
    moved = sum(((after[name] - before[name]) @ state).square().sum() for name in names)
    whole = sum((before[name] @ state).square().sum() for name in names)
    (told,) = [point["moved"] for point in found.to_dict()["neighbourhood"] if point["word"] == "cat"]
    assert told == pytest.approx(float((moved / whole) ** 0.5), rel=1e-3)


def test_map_has_the_two_main_axes() -> None:
    draw_ = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 3, generator=draw_) * torch.tensor([9.0, 3.0, 0.5])
    basis, _ = torch.linalg.qr(torch.randn(6, 3, generator=draw_))
    found = _plane(scores @ basis.T + 5)
    both = torch.corrcoef(torch.cat([found, scores.double()], 1).T)
    assert both[0, 2].abs() > 0.99
    assert both[1, 3].abs() > 0.99
    assert all(found[:, axis].amax() == found[:, axis].abs().amax() for axis in (0, 1))
    assert _plane(torch.ones(1, 6)).tolist() == [[0.0, 0.0]]


def test_preserved_neighbours_are_reported_apart(place: Path, judge: FunctionJudge) -> None:
    data = measured(place, judge, place / "report", config=replace(CONFIG, neighbours=11, far=0)).to_dict()
    every, unseen = (data["rates"][name]["edited"] for name in ("acc_n", "acc_n_unseen"))
    dog = [row["edited"] for row in rows(data, "n") if row["truth"] == "dog"]
    assert len(dog) == 2
    assert unseen["count"] == every["count"] - 4 == 40
    assert unseen["hits"] == every["hits"] - sum(dog)


def test_a_model_against_itself(place: Path, judge: FunctionJudge, tmp_path: Path) -> None:
    """The control: nothing is erased, nothing moved, no distance."""
    found = measured(place, judge, tmp_path, "model", concepts=["cat"])
    data = found.to_dict()
    assert all(rate["edited"] == rate["original"] for rate in data["rates"].values())
    assert data["harmonic"]["H_4"]["value"] == 0.0
    for name, distance in data["distances"].items():
        assert distance["value"] == pytest.approx(0, abs=1e-9), name
    assert data["recipe"] is None
    assert data["geometry"] is None
    assert max(row["shift"] for row in data["moved"]) < 1e-6
    hashes = [tree(tmp_path / "pictures" / model) for model in ("original", "edited")]
    assert hashes[0]["index.json"] == hashes[1]["index.json"]
    assert all(hashes[0][name] == content for name, content in hashes[1].items())


def test_a_second_run_draws_nothing_and_finds_the_same(
    found: Any, place: Path, judge: FunctionJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_pictures", lambda *_: pytest.fail("drawn again"))
    again = measured(place, judge, place / "report", command="as typed").to_dict()
    apart = {"seconds", "date"}
    assert {k: v for k, v in again.items() if k not in apart} == {
        k: v for k, v in found.to_dict().items() if k not in apart
    }
    with pytest.raises(CheckpointError, match=r"pictures/original: .*steps 2, not 3"):
        measured(place, judge, place / "report", config=replace(CONFIG, steps=3))


def test_loaded_pipelines(place: Path, judge: FunctionJudge, found: Any, tmp_path: Path) -> None:
    pipes = [open_pipeline(place / name) for name in ("model", "edited")]
    preserve = [label for label in LABELS if label != "cat"]
    with pytest.warns(RealEraWarning, match="no prompts for generality: these figures"):
        found_too = evaluate(pipes[0], pipes[1], ["Cat"], out=tmp_path, judge=judge, config=CONFIG, preserve=preserve)
    data = found_too.to_dict()
    assert data["model"]["original"] == "a loaded StableDiffusionPipeline"
    assert data["rates"]["acc_s"]["original"]["value"] == 1.0
    assert data["rates"]["acc_g"]["edited"]["value"] is None  # no keywords without concepts.json
    assert data["harmonic"]["H_4"] == {"value": None, "low": None, "high": None, "concepts": 0}
    own = {row["prompt"]: row["edited"] for row in rows(data, "n")}
    assert {
        row["prompt"]: row["edited"] for row in rows(found.to_dict(), "n") if row["prompt"] in own
    }.items() <= own.items()
    with pytest.raises(ConfigError, match="one and the same pipeline"):
        evaluate(pipes[0], pipes[0], ["cat"], out=tmp_path, judge=judge)


def test_prompts_of_ones_own(place: Path, judge: FunctionJudge, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "kind,prompt,truth,style,owner\ne,a picture of a cat,cat,,\ne,cat,cat,dark,\ng,tiger,cat,,\n"
        "n,dog,dog,,cat\nr,king,cat,,\n"
    )
    data = measured(place, judge, tmp_path / "out", prompts=path, config=replace(CONFIG, far=2)).to_dict()
    assert [(row["kind"], row["owner"], row["prompt"]) for row in data["prompts"][:5]] == [
        ("e", "cat", "a picture of a cat"),
        ("e", "cat", "cat"),
        ("g", "cat", "tiger"),
        ("n", "cat", "dog"),
        ("r", "cat", "king"),
    ]
    assert {row["kind"] for row in data["prompts"][5:]} == {"s"}  # what the file leaves out is chosen
    assert data["rates"]["style_kept"]["edited"]["count"] == 2
    assert data["concepts"][0]["acc_n"] == rows(data, "n")[0]["edited"] / 2


def test_requests_at_fault(place: Path, judge: FunctionJudge, tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match=r"judge nearest does not know 'unicorn'; it tells 12 labels apart \(cat, "):
        measured(place, judge, tmp_path, concepts=["unicorn"])
    with pytest.raises(ConceptError, match="name it with --concept"):
        measured(place, judge, tmp_path, "model")
    with pytest.raises(ConfigError, match="template 'a picture': write"):
        measured(place, judge, tmp_path, templates=["a picture"])
    (tmp_path / "concepts.json").write_text('[{"name": "cat"}]')
    with pytest.raises(CheckpointError, match="expected a list of concepts"):
        read_known(tmp_path)
    for wrong in ({"far": -1}, {"threshold": 2.0}, {"seeds": ()}, {"seeds": (1, 1)}, {"seeds": (-1,)}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = "):
            replace(CONFIG, **wrong)
    assert parse_numbers("0-3, 7") == (0, 1, 2, 3, 7)
    with pytest.raises(ConfigError, match="write a range such as 0-3"):
        parse_numbers("a-b")


# The command


def test_command(place: Path, judge: FunctionJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realera_edit.evaluation.open_judge", lambda *_: judge)
    small = ("--steps", "2", "--guidance", "3", "--seeds", "0-1", "--far", "2", "--neighbours", "2", "--residue", "0")
    said = run("evaluate", place / "model", place / "edited", "-o", tmp_path / "out", *small)
    assert said.exit_code == 0, said.stderr
    assert said.stdout.startswith("             edited ")
    for name in (*RATES, "H_4", "pixel", "kernel"):
        assert f"\n{name} " in said.stdout
    assert said.stdout.endswith(f"written    {tmp_path / 'out' / 'report.html'}, report.png\n")
    assert all((tmp_path / "out" / name).is_file() for name in ("report.html", "report.png"))
    again = run("evaluate", place / "model", place / "edited", "-o", tmp_path / "out", *small, "--json")
    assert json.loads(again.stdout) == json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert "drawing" not in again.stderr


@pytest.mark.filterwarnings("ignore::realera_edit.errors.RealEraWarning")  # a judge of other pictures
def test_what_may_be_published_names_no_folder_of_the_machine(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, prompts, out = tmp_path / "ours.safetensors", tmp_path / "own prompts.csv", tmp_path / "out"
    judge.symlink_to(SHIPPED)
    label = reference_judge().labels[0]
    prompts.write_text("kind,prompt,truth\n" + "".join(f"{kind},a cat,{label}\n" for kind in "egnsr"))
    first = ("evaluate", place / "model", f"{place}/edited/", f"--out={out}", "--judge", f"reference:{judge}")
    typed = [str(word) for word in (*first, "--prompts", prompts, "--template", "/ {}", "--steps", 1, "--seeds", 0)]
    monkeypatch.setattr("sys.argv", ["realera-edit", *typed])
    said = run(*typed)
    assert said.exit_code == 0, said.stderr
    data = json.loads((out / "evaluation.json").read_text("utf-8"))
    assert data["command"] == (
        "realera-edit evaluate model edited --out=out --judge reference:ours.safetensors "
        "--prompts 'own prompts.csv' --template '/ {}' --steps 1 --seeds 0"
    )
    assert data["model"] == {"original": "model", "edited": "edited"}
    assert (data["settings"]["prompts"], data["judge"]["name"]) == ("own prompts.csv", "reference:ours.safetensors")
    assert data["recipe"]["concepts"][0]["name"] == "cat"
    for written in (path for path in out.rglob("*") if path.suffix in (".json", ".html")):
        for folder in (place, tmp_path, Path.cwd()):
            assert str(folder) not in written.read_text("utf-8"), written


def test_a_relative_path_stays_as_it_was_typed(
    place: Path, judge: FunctionJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realera_edit.evaluation.open_judge", lambda *_: judge)
    monkeypatch.chdir(place)
    typed = [
        "evaluate",
        "./model",
        str(place / "edited"),
        "-o",
        str(tmp_path / "out"),
        "--steps",
        "2",
        "--guidance",
        "3",
    ]
    monkeypatch.setattr("sys.argv", ["realera-edit", *typed])
    small = ("--seeds", "0-1", "--far", "2", "--neighbours", "2", "--residue", "0")
    data = json.loads(run(*typed, *small, "--json").stdout)
    assert data["command"] == "realera-edit evaluate ./model edited -o out --steps 2 --guidance 3"
    assert data["model"] == {"original": "model", "edited": "edited"}


def test_command_at_fault(place: Path, single: Path, tmp_path: Path) -> None:
    models = (place / "model", place / "edited")
    cases = {
        (*models, "--judge", "oracle"): (1, "judge 'oracle': expected reference"),
        (*models, "--seeds", "x"): (1, "write a range such as 0-3"),
        (*models, "--far", "-1"): (1, "far = -1"),
        (*models, "--judge", "python:no:where"): (1, "cannot be imported"),
        (place / "gone", place / "edited"): (1, "gone/model_index.json: no such file"),
        (place / "model", place / "gone", "--concept", "cat"): (1, "gone/model_index.json: no such file"),
        (place / "model", single, "--concept", "cat"): (1, "pictures are drawn from diffusers folders"),
        (*models, "--alias", "puss"): (2, "--alias goes with exactly one --concept"),
    }
    for args, (code, message) in cases.items():
        said = run("evaluate", *args, "-o", tmp_path / "out")
        assert (said.exit_code, said.stdout) == (code, ""), args
        assert message in said.stderr
        assert code == 2 or said.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_number_of_the_configuration_is_an_option() -> None:
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"--alias-threshold", "--batch-size", "--residue", "--alias-count"} <= flags
