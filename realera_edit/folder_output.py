"""Writing an edited folder or pipeline, with its record, its original weights and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .card import refresh
from .checkpoint import Checkpoint
from .errors import CheckpointError
from .provenance import RECORD, UNDO, write_record, write_undo
from .writer import copy_rest, copy_size, staged

if TYPE_CHECKING:
    from .edit import EditResult
    from .pipeline import LoadedPipeline


def save_folder(
    result: EditResult, source: Checkpoint, out: Path, *, force: bool, link: bool, undo: bool, card: bool
) -> None:
    """Write `out` as the folder of `source` with its projections edited; see `EditResult.save`."""
    from .edit import check_changed

    if out.absolute().resolve() == source.root.resolve():
        raise CheckpointError(f"{out}: is the input; the edit never overwrites it, choose another output")
    files = [(denoiser, file) for denoiser in source.denoisers for file in denoiser.files]
    skip = {file.path for _, file in files} | set(source.dropped) | {source.root / RECORD, source.root / UNDO}
    needed = copy_size(source.root, out, skip, link) + sum(file.path.stat().st_size for _, file in files)
    if undo:
        edited = [file.entries[p.name] for d, file in files for p in d.projections if p.name in file.entries]
        needed += sum(entry.stop - entry.start for entry in edited)
    with staged(out, force=force, needed=needed, source=source.root) as folder:
        copy_rest(source.root, folder, skip, link, result.progress)
        for denoiser, file in files:
            relative = str(file.path.relative_to(source.root))
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            result.rewrite(file, denoiser.projections, folder / relative, relative)
        check_changed(source.where, result.tensors)
        if undo:
            write_undo(folder / UNDO, source.root, {name: list(hashes) for name, hashes in result.tensors.items()})
        _tell(result, folder, card)


def save_pipeline(result: EditResult, source: LoadedPipeline, out: Path, *, force: bool, card: bool) -> None:
    """Write the edited pipeline of `source` to the folder `out`; see `EditResult.save`.

    Raises `CheckpointError` where the edit is not the last that its weights carry: the record would be false.
    """
    source.check_in_force(result.tensors)
    with staged(out, force=force, needed=source.bytes()) as folder:
        source.pipe.save_pretrained(folder, safe_serialization=True)
        _tell(result, folder, card)


def _tell(result: EditResult, folder: Path, card: bool) -> None:
    """Write the record, and the card from it."""
    data = result.to_dict()
    write_record(folder / RECORD, data)
    if card:
        refresh(folder, data)
