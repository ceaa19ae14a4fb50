"""Checkpoints that a kill can't damage: a folder becomes visible only when all of it is on disk.

    checkpoints/step-00000120/{weights,optimizer,average,best}.safetensors, manifest.json

Of sharded weights each process writes its rows into a file of its own (`checkpoint_parts`). A save writes
into `.tmp-*`, the manifest with sizes and checksums last, syncs files and folder, renames. `newest` takes the
newest folder whose manifest and checksums hold and reports each that it skips.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from safetensors.torch import load_file

from shared.files import file_digest, sync, write_atomically
from shared.json_files import load_json
from trainer_node.engine.distributed.checkpoint_parts import (
    Note,
    Writer,
    blocks,
    group_of,
    take_away,
)
from trainer_node.engine.distributed.weight_slices import joined
from trainer_node.engine.safetensors_file import FileEntry, write_tensors
from trainer_node.engine.train.dev_curve import DevCurve
from trainer_node.engine.train.health import Health
from trainer_node.engine.train.schedule import ScheduleState

KEPT = 2
MOST_HASHED = 4  # files at a time

Tensors = Mapping[str, torch.Tensor]


class Position(Struct, frozen=True, kw_only=True):
    """Where a run stands in its data and time: with weights and optimiser, all that a resume needs."""

    step: int
    epoch: int  # the next step's first pack: of this epoch's pack plan ...
    pack: int  # ... this one
    tokens: int
    clock_tokens: int  # of the token clock; 0 on the wall clock
    train_s: float  # real seconds inside steps so far
    averaged: int  # weights in the average of the tail
    schedule: ScheduleState = msgspec.field(name="pulse")  # its name on disk
    loss: float | None = None  # mean over the steps since the checkpoint before
    capacity: int = 0  # of the packs that the cursor counts; 0: of an older version, the plan's
    curve: DevCurve = DevCurve()  # what was measured during training
    trial: int = 0
    steps_before: int = 0  # of earlier trials: `step` counts them, so that it always grows
    health: Health = Health()


class Manifest(Struct, frozen=True, kw_only=True):
    """What a checkpoint holds; written last."""

    position: Position
    fingerprint: str  # of the training rows: another file under the same name must not be resumed on
    files: dict[str, FileEntry]
    versions: dict[str, str]


class Checkpoint(Struct, frozen=True):
    """A verified checkpoint on disk."""

    folder: Path
    manifest: Manifest

    @property
    def has_moments(self) -> bool:
        """Return whether it holds the optimizer's moments: not without room, nor after the last step."""
        return "optimizer" in map(group_of, self.manifest.files)

    def pieces(self, group: str) -> dict[str, list[torch.Tensor]]:
        """Return a group's tensors as the blocks of rows that are on disk, mapped; empty without."""
        files = sorted(file for file in self.manifest.files if group_of(file) == group)
        return blocks([load_file(self.folder / file) for file in files])

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """Return a group's tensors, mapped into memory unless several processes wrote them; empty without."""
        return {name: joined(rows) for name, rows in self.pieces(group).items()}


def save(
    folder: Path,
    position: Position,
    fingerprint: str,
    tensors: Mapping[str, Tensors],
    versions: dict[str, str],
    unchanged: Mapping[str, Path] | None = None,
    narrow: frozenset[str] = frozenset(),
    writer: Writer | None = None,
    written: Callable[[torch.Tensor], None] = lambda tensor: None,
) -> Path:
    """Write one checkpoint below `folder`, then delete all that isn't `kept`; OSError if it can't.

    `unchanged` names files of an earlier one that hold the same tensors: they are linked. The groups in
    `narrow` are written in 16 bits. A `writer` is one of several processes, each with its rows. `written` is
    told of each tensor that may change from then on.
    """
    final = folder_of(folder, position.step)
    temporary = writer.folder if writer else open_temporary(folder, position.step)
    if writer and writer.rank:
        _write_part(writer, tensors, unchanged or {}, narrow, written)
        return final
    try:
        files = {}
        for name, group in tensors.items():
            path = temporary / (writer.file_name(name) if writer else f"{name}.safetensors")
            if group:
                files[path.name] = _linked(path, (unchanged or {}).get(name)) or write_tensors(
                    path, group, narrow=name in narrow, written=written
                )
        files |= writer.others() if writer else {}
        manifest = Manifest(position=position, fingerprint=fingerprint, files=files, versions=versions)
        write_atomically(temporary / "manifest.json", msgspec.json.encode(manifest))
        sync(temporary)
        if final.exists():  # saved at this step before; a folder that isn't empty can't be replaced
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        take_away(temporary)
    sync(folder)
    for old in set(_folders(folder)) - kept(folder):
        shutil.rmtree(old)
    return final


def folder_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def open_temporary(folder: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written into. Raises OSError."""
    temporary = folder / f".tmp-{step:08d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _write_part(
    writer: Writer,
    tensors: Mapping[str, Tensors],
    unchanged: Mapping[str, Path],
    narrow: frozenset[str],
    written: Callable[[torch.Tensor], None],
) -> None:
    """Write the rows of a process that isn't rank 0. What this raises rank 0 learns, too, for all."""
    try:
        files = {
            writer.file_name(name): _linked(path, unchanged.get(name))
            or write_tensors(path, group, narrow=name in narrow, written=written)
            for name, group in tensors.items()
            if group and (path := writer.folder / writer.file_name(name))
        }
        writer.leave(Note(files))
    except Exception as error:
        writer.give_up(tensors, error)
        raise


def _linked(path: Path, earlier: Path | None) -> FileEntry | None:
    """Link a file of an earlier checkpoint under another name; None if it is gone."""
    if earlier is None:
        return None
    try:
        entry = _manifest(earlier.parent).files[earlier.name]
        os.link(earlier, path)
    except (OSError, KeyError, ValueError):
        return None
    return entry


def kept(folder: Path) -> set[Path]:
    """Return the KEPT newest, and the one that ended the best stretch: a run may go wrong after it."""
    folders = _folders(folder)
    return {*folders[:KEPT], *sorted(folders, key=_loss)[:1]}


def by_value(folder: Path) -> list[Path]:
    """Return all checkpoints, least valuable first; last the end of the best stretch, and the newest."""
    newest, older = _folders(folder)[:1], _folders(folder)[1:]
    best = sorted(older, key=_loss)[:1]
    return [*(one for one in reversed(older) if one not in best), *best, *newest]


def freed_by(checkpoint: Path) -> int:
    """Return the bytes that deleting a checkpoint frees; files that have another name, too, stay."""
    stats = [path.stat() for path in checkpoint.iterdir()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def whole(folder: Path, report: Callable[[str], None], only: str = "") -> Iterator[Checkpoint]:
    """Yield the checkpoints that are whole, newest first; report damaged ones and leave them.

    With `only` no more than that group of tensors is looked at: a checksum takes a second per GB.
    """
    for candidate in _folders(folder):
        try:
            yield Checkpoint(candidate, _verified(candidate, only))
        except (OSError, ValueError) as error:
            report(f"checkpoint {candidate.name} is damaged and skipped: {error}")


def load(folder: Path, only: str = "") -> Checkpoint:
    """Load one checkpoint. Raises OSError or ValueError if it is damaged."""
    return Checkpoint(folder, _verified(folder, only))


def groups(folder: Path) -> frozenset[str]:
    """Return the names of the groups of tensors that a checkpoint holds; none if it was not written."""
    if not folder.is_dir():
        return frozenset()
    return frozenset(map(group_of, _manifest(folder).files))


def position_at(folder: Path) -> Position:
    """Return where a checkpoint stands. Raises OSError or ValueError if it can't be read."""
    return _manifest(folder).position


def link(source: Path, target: Path, groups: Collection[str]) -> None:
    """Keep these groups of a checkpoint under another name too, without a copy of their files."""
    shutil.rmtree(target, ignore_errors=True)
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = [file for file in _manifest(source).files if group_of(file) in groups]
    for name in ("manifest.json", *files):
        os.link(source / name, temporary / name)
    os.replace(temporary, target)
    sync(target.parent)


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None."""
    return next(whole(folder, report), None)


def drop_later(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: they are of a trial that failed, whose steps don't count.

    Next to them those of the next trial, which begins at that step, would pass for older ones.
    """
    for one in _folders(folder):
        if one > folder_of(folder, step):
            shutil.rmtree(one)


def clean(folder: Path) -> None:
    """Delete what interrupted saves left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _loss(folder: Path) -> float:
    """Return the training loss before a checkpoint; infinite if it isn't known."""
    try:
        loss = _manifest(folder).position.loss
    except (OSError, ValueError):
        return math.inf
    return math.inf if loss is None else loss


def _manifest(folder: Path) -> Manifest:
    return load_json(folder / "manifest.json", Manifest)


def _verified(folder: Path, only: str) -> Manifest:
    manifest = _manifest(folder)
    files = {name: entry for name, entry in manifest.files.items() if only in ("", group_of(name))}
    for name, entry in files.items():
        if (size := (folder / name).stat().st_size) != entry.bytes:
            raise ValueError(f"{name} has {size} bytes instead of {entry.bytes}")
    with ThreadPoolExecutor(MOST_HASHED) as pool:
        digests = pool.map(file_digest, [folder / name for name in files])
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry.sha256:
                raise ValueError(f"{name} has another checksum than its manifest")
    return manifest
