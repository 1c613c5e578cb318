"""Writing an edited single file, its record and its original weights beside it, and the way back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError
from .history import record_before, sidecars, undone_metadata
from .layouts import unet_prefixes
from .modelspec import of_checkpoint, originals_in, replaced, seal
from .provenance import check_hashes, inspect_path, originals_of, write_record, write_undo
from .singlefile import SingleFile
from .tensorfile import open_tensors, rewrite
from .writer import publish_file, staged_file

if TYPE_CHECKING:
    from .edit import EditResult


def save_single(
    result: EditResult,
    source: SingleFile,
    out: Path,
    *,
    force: bool,
    link: bool,
    undo: bool,
    metadata: Mapping[str, str],
) -> None:
    """Write `out` as the file of `source` with its projections edited; see `EditResult.save`."""
    from .edit import check_changed

    if link:
        raise CheckpointError(f"{out}: is one file, of which nothing can be hard-linked; leave --link out")
    check_place(out, source.root, force)
    group = source.root.name
    entries = [source.file.entries[p.name] for p in source.projections]
    edited = sum(entry.stop - entry.start for entry in entries)
    needed = source.root.stat().st_size + (edited if undo else 0)
    names, before = [concept.name for concept in result.edit.concepts], result.previous
    earlier = [str(row["name"]) for old in before for row in old["concepts"]]
    changes = of_checkpoint(source.file, unet_prefixes(source.file.entries)[0], names, earlier, metadata)
    with staged_file(out, force=force, needed=needed, publish=_publish) as path:
        result.rewrite(source.file, source.projections, path, group, changes)
        seal(path)
        check_changed(source.where, result.tensors)
        record, originals = sidecars(path)
        if undo:
            told = replaced(changes, source.file.metadata)
            write_undo(originals, source.root.parent, {group: list(result.tensors[group])}, told)
        write_record(record, result.to_dict())


def undo_file(path: str | Path, out: str | Path, *, force: bool = False) -> Path:
    """Write the file `out` as the edited single file `path` with the original weights, to the bit.

    Reads the record and the original weights beside `path`, which stays as it is. Raises `CheckpointError` where one
    is missing or damaged, or a weight is not the one that the edit wrote.
    """
    path, out = Path(path), Path(out)
    data = inspect_path(path)
    record, originals = sidecars(path)
    if "tensors" not in data or not originals.is_file():
        missing = originals if "tensors" in data else record
        raise CheckpointError(
            f"{path}: its {missing.name} is not beside it: it was saved without (--no-undo), moved, or deleted before "
            "publishing"
        )
    check_place(out, path, force)
    file, stored, tensors = open_tensors(path), open_tensors(originals), data["tensors"]
    if len(tensors) != 1:
        raise CheckpointError(f"{record}: is damaged: it tells of {len(tensors)} files; take a sound copy")
    ((group, names),) = originals_of(stored, tensors, record).items()
    for name in names:
        check_hashes(file, stored, group, name, tensors[group][name])
    with staged_file(out, force=force, needed=path.stat().st_size, publish=_publish) as temporary:
        restored = ((name, stored.read(f"{group}::{name}")) for name in names)
        rewrite(file, temporary, {**originals_in(stored), **undone_metadata(data)}, names, restored)
        if (before := record_before(data)) is not None:
            write_record(sidecars(temporary)[0], before)
    return out


def check_place(out: Path, source: Path, force: bool) -> None:
    """Raise `CheckpointError` where `out` cannot be the output of an edit of the file `source`."""
    if out.suffix != ".safetensors":
        raise CheckpointError(
            f"{out}: the output of a single file is one, too; give it a name that ends in .safetensors"
        )
    record, originals = sidecars(out)
    for path in (out, record, originals):
        if os.path.exists(path) and os.path.samefile(path, source):
            raise CheckpointError(f"{path}: is the input, which is never changed; choose another output")
    for path in (record, originals):
        if os.path.lexists(path) and not os.path.lexists(out) and not force:
            raise CheckpointError(
                f"{path}: already exists, and belongs to another edit; remove it, choose another output, or use --force"
            )


def _publish(path: Path, out: Path, force: bool) -> None:
    """Move the new record and originals beside `out`, then the new file in its place: it never is without them.

    With `force`, those of an old `out` go. Where a move fails, all is as before.
    """
    aside = path.parent / "aside"
    aside.mkdir()
    gone, new = [], []
    try:
        for fresh, target in zip(sidecars(path), sidecars(out), strict=True):
            if force and os.path.lexists(target):
                os.rename(target, aside / target.name)
                gone.append(target)
            if fresh.exists():
                publish_file(fresh, target, False)
                new.append(target)
        publish_file(path, out, force)
    except BaseException:  # an interrupt, too
        for target in new:
            with contextlib.suppress(OSError):
                target.unlink()
        for target in gone:
            with contextlib.suppress(OSError):
                os.rename(aside / target.name, target)
        raise
