"""An edited model on the Hugging Face hub: its files, its record and its card, as one commit."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .card import model_card, read_card
from .errors import CheckpointError, HubError, RealEraError, RealEraWarning
from .folder import UNDO_FILE, chosen_weights, walk
from .front_matter import CARD, licence_in
from .history import sidecars
from .provenance import inspect_path
from .readme import has_section
from .tensorfile import open_tensors
from .unedited import name_some, unedited_weights
from .writer import digest

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}")
_REMEDIES = {
    401: "log in with `hf auth login`",
    403: "the token may not write there: log in with one that may, by `hf auth login`, or choose another repository",
    404: "check the name; the hub also says so of what you may not see: `hf auth login`",
    409: "somebody else has just changed it; try again",
    429: "too many requests; wait, and try again",
}


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be: name in the repository -> bytes; `left_out`: files that stay here."""

    repo_id: str
    url: str | None
    files: Mapping[str, int]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**vars(self), "files": dict(self.files), "left_out": list(self.left_out)}

    def report(self) -> str:
        """A few lines of text; of a dry run, each file."""
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        lines = [f"pushed     {self.url}   ({total})"]
        if self.url is None:
            lines = [f"would push {name}   ({size:,} bytes)" for name, size in self.files.items()]
            lines.append(f"           to {self.repo_id}: {total}")
        return "\n".join([*lines, *(f"left here  {name}" for name in self.left_out)])


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    with_undo: bool = False,
    card: bool = True,
    evaluation: str | Path | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Upload an edited folder or single file, an edit file or an exported LoRA to the hub, with record and card.

    One commit on `revision` (a branch, made where it is missing; default: main), or with `create_pr` a pull request.
    The repository is made where it is missing, private if `private`. The original weights stay here unless
    `with_undo`: with them, anybody can bring the concepts back; so do weights that the edit did not write. `card`,
    `evaluation`, `license`: as in `model_card`; the card of a folder is its README.md, that of a file goes into the
    README.md that the repository has. `token`: default, that of `hf auth login`. `dry_run`: only lists the files.
    Raises `CheckpointError` where `path` is no edit of ours, or its weights are not those of its record, `HubError`
    where the hub refuses.
    """
    path = Path(path)
    _check_id(repo_id)
    if private and create_pr:
        raise HubError(f"{repo_id}: a pull request goes to a repository that exists; leave private out")
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder; name what `erase`, `apply` or `export-lora` wrote")
    data = inspect_path(path)
    if "concepts" not in data:
        raise CheckpointError(f"{path}: holds no edit that is in force; name what `erase` or `apply` wrote")
    _check_weights(path, data)
    files, left_out = _files(path, data, with_undo)
    options = {"evaluation": evaluation, "license": license}
    text = _card(path, "", **options) if card else None
    _warn(files, text)
    if dry_run:
        return Push(repo_id, None, _sizes(files, text), left_out)
    secret = token or _saved_token()
    with _asking(repo_id, secret):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=secret)
        if not create_pr:
            repo_id = _repository(api, repo_id, private, revision)
        if card and not path.is_dir():
            text = _card(path, _remote_card(api, repo_id, revision), **options)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()
                      if text is None or name != CARD]  # fmt: skip
        if text is not None:
            operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode()))
        names = [str(row["name"]) for row in data["concepts"]]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or f"Erase {shown} (realera-edit {__version__})",
            revision=revision,
            create_pr=create_pr,
        )
    return Push(repo_id, str(commit.pr_url or commit.commit_url), _sizes(files, text), left_out)


def _check_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r}: is no name of a repository; write owner/name with letters, digits, '-', '_' and '.'"
        ) from error


def _saved_token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError("not logged in to the Hugging Face hub: run `hf auth login`, or set HF_TOKEN")
    return str(token)


@contextlib.contextmanager
def _asking(repo_id: str, token: str) -> Iterator[None]:
    """Errors of the hub's client, which has many kinds, as one of ours, without any token in it."""
    try:
        yield
    except RealEraError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        clean = _TOKEN.sub("(token)", first.replace(token, "(token)"))
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = _REMEDIES.get(status or 0, "check the network, and that HF_HUB_OFFLINE is not set; then try again")
        secret = token in str(error) or _TOKEN.search(str(error))
        raise HubError(f"{repo_id}: the hub did not take it ({clean}): {remedy}") from (None if secret else error)


def _repository(api: Any, repo_id: str, private: bool, revision: str | None) -> str:
    """The full name of the repository, made where it is missing, with its branch."""
    name = str(api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id)
    if private and not api.repo_info(name).private:
        raise HubError(f"{name}: exists and is public; make it private in its settings, or leave private out")
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return name


def _remote_card(api: Any, repo_id: str, revision: str | None) -> str:
    if not api.file_exists(repo_id, CARD, revision=revision):
        return ""
    return read_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))


def _card(path: Path, remote: str, **options: Any) -> str:
    """The card to upload: the folder's own as it is, if it tells of the edit; else one made now."""
    if not path.is_dir():
        return model_card(path, existing=remote, **options)
    own = path / CARD
    if own.is_file() and not any(options.values()) and has_section(text := read_card(own)):
        return text
    return model_card(path, **options)


def _files(path: Path, data: Mapping[str, Any], with_undo: bool) -> tuple[dict[str, Path], tuple[str, ...]]:
    """(name in the repository -> file, names of those that stay here)."""
    if path.is_dir():
        found = {relative.as_posix(): file for file, relative in walk(path)}
    else:
        beside = sidecars(path) if "tensors" in data else ()
        found = {file.name: file for file in (path, *beside) if file.is_file()}
    foreign = _foreign(path, found, data) if path.is_dir() else ()
    if foreign:
        warnings.warn(
            f"{path}: left out, since the edit did not write these weights, and they may hold the concepts: "
            f"{name_some([found[name] for name in foreign], path)}",
            RealEraWarning,
            stacklevel=3,
        )
    undo = () if with_undo else tuple(name for name in found if name.endswith(UNDO_FILE))
    left_out = (*undo, *foreign, *(name for name in found if ".realera-" in name))
    return {name: file for name, file in found.items() if name not in left_out}, left_out


def _foreign(path: Path, found: Mapping[str, Path], data: Mapping[str, Any]) -> tuple[str, ...]:
    """Weights that may be those of the unedited model, as the record does not name them."""
    edited = {file for name in data["tensors"] for file in _weight_files(path / name)}
    unedited = set(unedited_weights(path, edited))
    return tuple(name for name, file in found.items() if file in unedited and not name.endswith(UNDO_FILE))


def _weight_files(place: Path) -> tuple[Path, ...]:
    """The file that a record names; of a pipeline that was saved, recorded by component, those that a program loads."""
    return chosen_weights(place, None)[1] if place.is_dir() else (place,)


def _check_weights(path: Path, data: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where an edited weight is not the one that the record tells of."""
    for relative, names in data.get("tensors", {}).items():
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise CheckpointError(f"{path}: its record names {relative!r}, which is outside of it; take a sound copy")
        place = path / relative if path.is_dir() else path
        places = {key: file for file in map(open_tensors, _weight_files(place)) for key in file.entries}
        for name, hashes in names.items():
            if name not in places or digest(places[name].read(name)) != hashes["after"]:
                raise CheckpointError(
                    f"{place}: {name} is not as the edit left it, so it may hold the concepts; edit the model again"
                )


def _sizes(files: Mapping[str, Path], card: str | None) -> dict[str, int]:
    sizes = {name: file.stat().st_size for name, file in files.items()}
    return sizes if card is None else {**sizes, CARD: len(card.encode())}


def _warn(files: Mapping[str, Path], card: str | None) -> None:
    """Warn of a card without a licence, and of small files that name the user's folder."""
    if card is not None and not licence_in(card):
        warnings.warn(
            "the card states no licence; an edited model is under that of the unedited one: give it with --license",
            RealEraWarning,
            stacklevel=3,
        )
    home = str(Path.home()).encode()
    small = {name: file for name, file in files.items() if file.suffix in (".json", ".md", ".txt", ".yaml")}
    told = [name for name, file in small.items() if len(home) > 5 and home in file.read_bytes()]  # longer than /root
    if told:
        warnings.warn(
            f"{', '.join(told[:4])}: names your home folder ({home.decode()}); change that if others should not see it",
            RealEraWarning,
            stacklevel=3,
        )
