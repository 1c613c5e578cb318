"""Pushing to the hub: what is uploaded and what never is, and one clear error for whatever the hub says."""

from __future__ import annotations

import inspect
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from helpers import QUICK, UNET, made, run
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from single_models import erase

from realera_edit import RealEraWarning, edit_model, export_lora, push_to_hub, undo_folder
from realera_edit.errors import CheckpointError, ConfigError, HubError, RealEraError
from realera_edit.provenance import RECORD, UNDO
from realera_edit.readme import BEGIN

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
OPEN = {"license": "mit"}


class FakeHub:
    """A hub that keeps what it is given. `fail`: method -> what it raises; `remote`: files that it has already."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.remote: dict[str, Path] = {}
        self.fail: dict[str, Exception] = {}
        self.private: bool | None = None
        self.token: str | None = None

    def __call__(self, token: str) -> FakeHub:
        self.token = token
        return self

    def _asked(self, name: str, *about: Any) -> None:
        self.calls.append((name, about))
        if name in self.fail:
            raise self.fail[name]

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        self._asked("create_repo", repo_id, private, exist_ok)
        self.private = private if self.private is None else self.private
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"alice/{repo_id}")

    def repo_info(self, repo_id: str) -> Any:
        self._asked("repo_info", repo_id)
        return SimpleNamespace(private=self.private)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self._asked("create_branch", repo_id, branch, exist_ok)

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        self._asked("file_exists", repo_id, name, revision)
        return name in self.remote

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str | None) -> str:
        self._asked("hf_hub_download", repo_id, name, revision)
        return str(self.remote[name])

    def create_commit(
        self, repo_id: str, operations: Any, *, commit_message: str, revision: str | None, create_pr: bool
    ) -> Any:
        self._asked("create_commit", repo_id, commit_message, revision, create_pr)
        for operation in operations:
            with operation.as_file() as file:
                assert operation.path_in_repo not in self.files
                self.files[operation.path_in_repo] = file.read()
        page = f"https://huggingface.co/{repo_id}"
        return SimpleNamespace(commit_url=f"{page}/commit/1", pr_url=f"{page}/discussions/1" if create_pr else None)

    def asked(self, name: str) -> list[Any]:
        return [about for method, about in self.calls if method == name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return fake


@pytest.fixture
def out(sd1: Path, tmp_path: Path) -> Path:
    """An edited folder whose licence is known."""
    (sd1 / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    return edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "out")


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What is uploaded


def test_a_folder_goes_whole_but_for_the_original_weights(out: Path, hub: FakeHub) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("mine")
    found = push_to_hub(out, "alice/no-cat")
    whole = {name: data for name, data in content(out).items() if not name.startswith(".git/")}
    assert UNDO in whole
    assert hub.files == {name: data for name, data in whole.items() if name != UNDO}
    assert {RECORD, UNET, "README.md", "model_index.json"} <= set(hub.files)
    assert hub.asked("create_repo") == [("alice/no-cat", None, True)]
    ((repo, message, revision, pull),) = hub.asked("create_commit")
    assert (repo, revision, pull) == ("alice/no-cat", None, False)
    assert message.startswith("Erase cat (realera-edit ")
    assert (found.url, found.left_out) == ("https://huggingface.co/alice/no-cat/commit/1", (UNDO,))
    assert found.files == {name: len(data) for name, data in hub.files.items()}
    assert hub.token == TOKEN
    assert content(out).keys() >= whole.keys()
    hub.files.clear()
    push_to_hub(out, "alice/no-cat", with_undo=True)
    assert hub.files == whole


def test_a_single_file_goes_with_its_record_and_a_card(single: Path, tmp_path: Path, hub: FakeHub) -> None:
    erase(single, tmp_path / "out.safetensors")
    push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", **OPEN)
    record, undo = "out.realera_edit.json", "out.realera_edit_undo.safetensors"
    assert set(hub.files) == {"out.safetensors", record, "README.md"}
    assert hub.files["out.safetensors"] == (tmp_path / "out.safetensors").read_bytes()
    assert b"| cat | object" in hub.files["README.md"]
    hub.files.clear()
    push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", with_undo=True, card=False)
    assert set(hub.files) == {"out.safetensors", record, undo}
    # the record of another edit is not this file's
    erase(single, tmp_path / "b.safetensors", "dog")
    (tmp_path / record).write_bytes((tmp_path / "b.realera_edit.json").read_bytes())
    hub.files.clear()
    with pytest.warns(RealEraWarning, match="is the record of another edit"):
        push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", card=False)
    assert set(hub.files) == {"out.safetensors"}


def test_an_edit_file_and_a_lora_go_with_a_card(sd1: Path, tmp_path: Path, hub: FakeHub) -> None:
    edit = made(sd1)
    edit.save(tmp_path / "edit.safetensors")
    export_lora(edit, sd1, tmp_path / "lora.safetensors")
    for name in ("edit.safetensors", "lora.safetensors"):
        hub.files.clear()
        push_to_hub(tmp_path / name, "alice/no-cat", **OPEN)
        assert set(hub.files) == {name, "README.md"}


def test_the_card_of_the_repository_is_not_overwritten(single: Path, tmp_path: Path, hub: FakeHub) -> None:
    erase(single, tmp_path / "out.safetensors")
    hub.remote["README.md"] = tmp_path / "remote.md"
    hub.remote["README.md"].write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My edits\n")
    push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", license="mit", revision="dev")
    text = hub.files["README.md"].decode()
    assert text.endswith("# My edits\n")
    assert "- mine\n- realera-edit\n" in text
    assert hub.asked("file_exists") == [("alice/no-cat", "README.md", "dev")]
    hub.remote["README.md"].write_text(text)
    hub.files.clear()
    push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", license="mit")
    assert hub.files["README.md"].decode() == text
    assert text.count(BEGIN) == 1


def test_a_folder_without_a_card_gets_one_and_keeps_what_its_owner_wrote(
    sd1: Path, out: Path, tmp_path: Path, hub: FakeHub
) -> None:
    edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "bare", card=False)
    push_to_hub(tmp_path / "bare", "alice/no-cat")
    assert hub.files["README.md"].count(BEGIN.encode()) == 1
    assert (tmp_path / "bare" / "README.md").read_text() == (sd1 / "README.md").read_text()
    mine = (out / "README.md").read_text().replace("## Limits", "## My own words")
    (out / "README.md").write_text(mine)
    hub.files.clear()
    push_to_hub(out, "alice/no-cat")
    assert hub.files["README.md"].decode() == mine


def test_a_saved_pipeline_is_checked_by_component(sd1: Path, tmp_path: Path, hub: FakeHub) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1)
    edit_model(pipe, ["cat"], config=QUICK).save(tmp_path / "out")
    push_to_hub(tmp_path / "out", "alice/no-cat", **OPEN)
    assert UNET in hub.files
    (tmp_path / "out" / UNET).write_bytes((sd1 / UNET).read_bytes())
    with pytest.raises(CheckpointError, match="is not as the edit left it"):
        push_to_hub(tmp_path / "out", "alice/no-cat", **OPEN)


# Where to


def test_branches_pull_requests_and_messages(out: Path, hub: FakeHub) -> None:
    push_to_hub(out, "no-cat", revision="dev", message="Mine", private=True, token="hf_ofmyownchoice")
    assert hub.asked("create_repo") == [("no-cat", True, True)]
    assert hub.asked("create_branch") == [("alice/no-cat", "dev", True)]
    assert hub.asked("create_commit") == [("alice/no-cat", "Mine", "dev", False)]
    assert hub.token == "hf_ofmyownchoice"
    hub.calls.clear()
    hub.files.clear()
    found = push_to_hub(out, "bob/theirs", create_pr=True)
    assert found.url == "https://huggingface.co/bob/theirs/discussions/1"
    assert [name for name, _ in hub.calls] == ["create_commit"]  # somebody else's: nothing is made there


def test_private_is_never_public(out: Path, hub: FakeHub) -> None:
    hub.private = False
    with pytest.raises(HubError, match="alice/no-cat: exists and is public"):
        push_to_hub(out, "alice/no-cat", private=True)
    assert not hub.files
    with pytest.raises(HubError, match="leave private out"):
        push_to_hub(out, "alice/no-cat", private=True, create_pr=True)


def test_a_dry_run_asks_nothing(single: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    for name in ("HfApi", "get_token"):
        monkeypatch.setattr(huggingface_hub, name, asked)
    said = run("push", out, "alice/no-cat", "--dry-run")
    assert said.exit_code == 0
    assert f"would push {UNET}   (" in said.stdout
    assert f"left here  {UNDO}\n" in said.stdout
    assert f"would push {UNDO}" not in said.stdout
    found = json.loads(run("push", out, "alice/no-cat", "--dry-run", "--json").stdout)
    assert (found["url"], found["left_out"]) == (None, [UNDO])
    assert found["files"]["README.md"] == (out / "README.md").stat().st_size


# What is refused


def test_weights_that_are_not_the_edited_ones_are_not_published(
    sd1: Path, single: Path, out: Path, tmp_path: Path, hub: FakeHub
) -> None:
    sound = (out / UNET).read_bytes()
    (out / UNET).write_bytes((sd1 / UNET).read_bytes())
    with pytest.raises(CheckpointError, match=r"is not as the edit left it, so it may hold the concepts"):
        push_to_hub(out, "alice/no-cat")
    (out / UNET).write_bytes(sound)
    erase(single, tmp_path / "out.safetensors")
    save_file(load_file(tmp_path / "out.safetensors") | load_file(single), tmp_path / "out.safetensors",
              safe_metadata(tmp_path / "out.safetensors"))  # fmt: skip
    with pytest.raises(CheckpointError, match="is not as the edit left it"):
        push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", **OPEN)
    record = json.loads((out / RECORD).read_text())
    for name in ("../sd1/unet/x.safetensors", "/etc/passwd"):
        (out / RECORD).write_text(json.dumps({**record, "tensors": {name: record["tensors"][UNET]}}))
        with pytest.raises(CheckpointError, match="which is outside of it"):
            push_to_hub(out, "alice/no-cat")
    assert not hub.calls


def safe_metadata(path: Path) -> dict[str, str]:
    from helpers import header

    found: dict[str, str] = header(path)["__metadata__"]
    return found


def test_weights_that_came_later_stay_here(sd1: Path, out: Path, hub: FakeHub) -> None:
    (out / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes((sd1 / UNET).read_bytes())
    (out / "model.ckpt").write_bytes(b"unedited")
    (out / "vae" / "extra.safetensors").write_bytes(b"not a component that reads text")
    with pytest.warns(RealEraWarning, match="the edit did not write these weights, .*ckpt"):
        found = push_to_hub(out, "alice/no-cat")
    gone = {"unet/diffusion_pytorch_model.fp16.safetensors", "model.ckpt", UNDO}
    assert set(found.left_out) == gone
    assert not gone & set(hub.files)
    assert "vae/extra.safetensors" in hub.files


def test_what_is_no_edit_is_not_pushed(sd1: Path, single: Path, out: Path, tmp_path: Path, hub: FakeHub) -> None:
    undo_folder(out, tmp_path / "back")
    cases = {
        tmp_path / "gone": "no such file or folder",
        sd1: "was not written by realera-edit",
        single: "no record of an edit",
        tmp_path / "back": "was not written by realera-edit",
        tmp_path / "back" / UNET: "holds no edit that is in force",
        out / UNDO: "holds no edit that is in force",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            push_to_hub(path, "alice/no-cat")
    for name in ("a/b/c", "alice/no cat", "-x", "", "alice/", "alice/x.git", "../x"):
        with pytest.raises(HubError, match="is no name of a repository; write owner/name"):
            push_to_hub(out, name)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "evaluation.json").write_text('{"format": "realera-edit evaluation 1", "recipe": {}}')
    with pytest.raises(ConfigError, match="is of another edit"):
        push_to_hub(out, "alice/no-cat", evaluation=tmp_path / "report")
    assert not hub.calls


def test_who_is_not_logged_in_is_told_how(out: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    said = run("push", out, "alice/no-cat")
    assert (said.exit_code, said.stdout, said.stderr.count("\n")) == (1, "", 1)
    assert "not logged in to the Hugging Face hub: run `hf auth login`" in said.stderr
    assert not hub.calls


# What the hub says


class Refusal(Exception):
    """An error of the hub's client with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error. (Request ID: x)\n\nfor Bearer {TOKEN}")
        self.response = SimpleNamespace(status_code=status)


def failures() -> Iterator[tuple[Exception, str]]:
    yield Refusal(401), "hf auth login"
    yield Refusal(403), "the token may not write there: log in with one that may, by `hf auth login`"
    yield Refusal(404), "check the name"
    yield Refusal(409), "try again"
    yield Refusal(429), "too many requests"
    yield Refusal(500), "check the network"
    yield OfflineModeIsEnabled("offline mode"), "HF_HUB_OFFLINE"
    yield ConnectionError(f"https://u:{TOKEN}@huggingface.co failed"), "check the network"
    yield RuntimeError("another one's hf_QWERTYUIOPASDF"), "check the network"


@pytest.mark.parametrize("method", ["create_repo", "create_branch", "file_exists", "create_commit"])
def test_what_the_hub_says_is_one_line_without_a_token(method: str, single: Path, tmp_path: Path, hub: FakeHub) -> None:
    erase(single, tmp_path / "out.safetensors")
    for error, remedy in failures():
        hub.fail = {method: error}
        with pytest.raises(HubError, match=remedy) as caught:
            push_to_hub(tmp_path / "out.safetensors", "alice/no-cat", revision="dev", **OPEN)
        assert str(caught.value).startswith("alice/no-cat: the hub did not take it (")
        assert "\n" not in str(caught.value)
        told = "".join(traceback.format_exception(caught.value))
        assert TOKEN not in told
        assert "QWERTY" not in told
        assert isinstance(caught.value, RealEraError)
    assert not hub.files


# Warnings


def test_a_missing_licence_is_warned_of(sd1: Path, out: Path, tmp_path: Path, hub: FakeHub) -> None:
    (sd1 / "README.md").unlink()
    edit_model(sd1, ["cat"], config=QUICK).save(tmp_path / "bare")
    with pytest.warns(RealEraWarning, match="the card states no licence; .*--license"):
        push_to_hub(tmp_path / "bare", "alice/no-cat")
    hub.files.clear()
    push_to_hub(tmp_path / "bare", "alice/no-cat", license="mit")
    assert b"license: mit" in hub.files["README.md"]


def test_folders_of_the_user_are_warned_of(
    out: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", classmethod(lambda _: Path("/home/alice")))
    push_to_hub(out, "alice/no-cat")
    config = out / "unet" / "config.json"
    config.write_text(config.read_text().replace("{", '{"_name_or_path": "/home/alice/sd1",', 1))
    hub.files.clear()
    with pytest.warns(RealEraWarning, match=r"unet/config\.json: names your home folder \(/home/alice\)"):
        push_to_hub(out, "alice/no-cat")


def test_the_command(out: Path, hub: FakeHub) -> None:
    said = run("push", out, "alice/no-cat", "--private", "--revision", "dev", "-m", "Mine")
    assert (said.exit_code, said.stderr) == (0, "")
    total = sum(map(len, hub.files.values()))
    page = "https://huggingface.co/alice/no-cat/commit/1"
    assert said.stdout == f"pushed     {page}   ({len(hub.files)} files, {total:,} bytes)\nleft here  {UNDO}\n"
    hub.files.clear()
    assert run("push", out, "alice/no-cat", "-q").stdout == ""
    hub.files.clear()
    assert json.loads(run("push", out, "alice/no-cat", "--create-pr", "--json").stdout)["url"].endswith("discussions/1")


@pytest.mark.parametrize(
    "name", ["create_repo", "repo_info", "create_branch", "file_exists", "hf_hub_download", "create_commit"]
)
def test_the_fake_asks_as_the_client_is_asked(name: str) -> None:
    """Every argument of the fake is one of the real client, by the same name and place."""
    real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
    ours = inspect.signature(getattr(FakeHub, name)).parameters
    assert [p for p in ours if ours[p].kind is inspect.Parameter.KEYWORD_ONLY and p not in real] == []
    places = [p for p in ours if ours[p].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(places) <= len([p for p in real if real[p].kind is not inspect.Parameter.KEYWORD_ONLY])
