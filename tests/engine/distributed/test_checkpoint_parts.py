"""Checkpoints that several processes write together: all of it appears, or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.positions import position
from trainer_node.engine.distributed import checkpoint_parts
from trainer_node.engine.distributed.checkpoint_parts import Note, Writer, take_away
from trainer_node.engine.distributed.weight_slices import cut, rows_of
from trainer_node.engine.safetensors_file import FileEntry, write_tensors
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.disk_plan import CheckpointContent, Sizes

WHOLE = torch.arange(35, dtype=torch.float32).view(7, 5)
WORLD = 3  # of 7 rows they have 3, 3 and 1
WAIT_S = 20.0


def _groups(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    first, end = rows_of(len(WHOLE), rank, WORLD)
    moments = {"exp_avg/w": WHOLE[first:end] / 2}
    if rank == 0:
        moments["step/w"] = torch.tensor(4.0)
    return {"weights": {"w": WHOLE[first:end]}, "optimizer": moments}


@pytest.fixture
def savers(tmp_path: Path) -> list[Saver]:
    """The savers of three processes."""
    return [
        Saver(tmp_path, "rows", {}, most_bytes=1e9, timer=lambda: 0.0, report=lambda text: None)
        for _ in range(WORLD)
    ]


def _save(savers: list[Saver], step: int, only: int = WORLD) -> None:
    folder = savers[0].open(step)
    assert folder is not None
    for rank, saver in enumerate(savers[:only]):
        saver.begin(position(step), _groups(rank), writer=Writer(rank, WORLD, folder))


def _newest(folder: Path) -> Checkpoint:
    found = checkpoint.newest(folder, pytest.fail)
    assert found is not None
    return found


def test_every_process_writes_its_rows_and_any_number_reads_them(savers: list[Saver], tmp_path: Path) -> None:
    _save(savers, 7)
    for saver in savers:
        saver.wait()
    found = _newest(tmp_path)
    parts = {f"{group}.{rank:05d}-of-00003.safetensors" for group in _groups(0) for rank in range(WORLD)}
    assert found.manifest.files.keys() == parts
    assert {path.name for path in found.folder.iterdir()} == {*parts, "manifest.json"}
    assert checkpoint.groups(found.folder) == {"weights", "optimizer"}
    assert found.has_moments
    assert torch.equal(found.tensors("weights")["w"], WHOLE)
    assert torch.equal(found.tensors("optimizer")["step/w"], torch.tensor(4.0))
    for world in (1, 2, 3, 8):
        for rank in range(world):
            first, end = rows_of(len(WHOLE), rank, world)
            assert torch.equal(cut(found.pieces("weights")["w"], first, end), WHOLE[first:end])


def test_what_has_not_changed_is_linked_by_every_process(savers: list[Saver], tmp_path: Path) -> None:
    best = [{"w": WHOLE[slice(*rows_of(len(WHOLE), rank, WORLD))] / 3} for rank in range(WORLD)]
    for step in (7, 9):
        folder = savers[0].open(step)
        assert folder is not None
        for rank, saver in enumerate(savers):
            writer = Writer(rank, WORLD, folder)
            saver.begin(position(step), _groups(rank), frozen={"best": best[rank]}, writer=writer)
        for saver in savers:
            saver.wait()
    for rank in range(WORLD):
        name = f"best.{rank:05d}-of-00003.safetensors"
        assert (tmp_path / "step-00000009" / name).samefile(tmp_path / "step-00000007" / name)
    assert torch.equal(_newest(tmp_path).tensors("best")["w"], WHOLE / 3)


def test_a_step_that_is_saved_again_and_fails_is_not_linked(savers: list[Saver], tmp_path: Path) -> None:
    """Its folder is that of the save before, which holds other weights."""

    def begin(step: int, values: torch.Tensor, ranks: Sequence[int]) -> None:
        folder = savers[0].open(step)
        assert folder is not None
        for rank in ranks:
            rows = values[slice(*rows_of(len(values), rank, WORLD))]
            best = held.setdefault((rank, id(values)), {"w": rows})
            writer = Writer(rank, WORLD, folder)
            savers[rank].begin(position(step), _groups(rank), frozen={"best": best}, writer=writer)
        for rank in ranks:
            savers[rank].wait()

    held: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    new = WHOLE / 5
    begin(7, WHOLE / 3, range(WORLD))
    begin(7, new, range(1, WORLD))  # the first process fails
    begin(9, new, range(WORLD))
    assert torch.equal(_newest(tmp_path).tensors("best")["w"], new)


def test_it_appears_when_the_last_process_is_done(savers: list[Saver], tmp_path: Path) -> None:
    _save(savers, 7)
    for saver in savers:
        saver.wait()
    _save(savers, 9, only=2)  # the third is slow, or about to be killed
    savers[1].wait()
    assert savers[0].written() is None
    assert _newest(tmp_path).manifest.position.step == 7
    (folder,) = tmp_path.glob(".tmp-*")
    savers[2].begin(position(9), _groups(2), writer=Writer(2, WORLD, folder))
    for saver in savers:
        saver.wait()
    assert _newest(tmp_path).manifest.position.step == 9
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_a_kill_leaves_of_it_is_deleted_and_the_older_one_is_whole(
    savers: list[Saver], tmp_path: Path
) -> None:
    _save(savers, 7)
    for saver in savers:
        saver.wait()
    folder = checkpoint.open_temporary(tmp_path, 9)  # and all are killed before rank 0 is done
    checkpoint.save(tmp_path, position(9), "rows", _groups(1), {}, writer=Writer(1, WORLD, folder))
    assert len(list(folder.iterdir())) == 3
    checkpoint.clean(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
    assert torch.equal(_newest(tmp_path).tensors("weights")["w"], WHOLE)


def test_one_that_can_not_write_is_reported_by_rank_0_and_the_older_one_stays(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(savers, 7)
    for saver in savers:
        saver.wait()
    real = write_tensors

    def full(path: Path, *rest: object, **options: object) -> object:
        if "00002-of" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    said: list[str] = []
    savers[0].report = said.append
    _save(savers, 9)
    for saver in savers:
        saver.wait()
    assert "the checkpoint of step 9 could not be written" in said[0]
    assert "rank 2" in said[0]
    assert "No space left on device" in said[0]
    assert not list(tmp_path.glob(".tmp-*"))
    assert _newest(tmp_path).manifest.position.step == 7
    sizes = Sizes(weights=4, moments=8, extras=0)
    assert savers[0].make_room(sizes, 0) is CheckpointContent.NARROW_MOMENTS


def test_a_process_that_still_writes_finds_no_folder_when_rank_0_gives_up(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that appears while the folder is deleted would keep it on a disk that may be full."""
    folders, there = list[Path](), list[bool]()
    real = shutil.rmtree

    def deleted(path: Path, **options: Any) -> None:
        there.extend(folder.exists() for folder in folders)
        real(path, **options)

    def full(path: Path, *_: object, **__: object) -> object:
        folders.append(path.parent)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    monkeypatch.setattr(shutil, "rmtree", deleted)
    _save(savers, 9, only=1)
    savers[0].wait()
    assert there == [False]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_file_that_was_being_opened_does_not_keep_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was looked up under the old name, and is there after the folder was emptied."""
    folder, real, opened = checkpoint.open_temporary(tmp_path, 9), os.rmdir, list[str]()

    def not_empty(path: Any, **options: Any) -> None:
        if not opened:
            opened.append("late")
            (next(tmp_path.glob(".tmp-*")) / "late").touch()
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", not_empty)
    take_away(folder)
    assert opened
    assert not list(tmp_path.glob(".tmp-*"))


def _begun_by_the_first(
    savers: list[Saver], place: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Path]:
    """Rank 0 has written its part of a checkpoint: what it will say, and the checkpoint's folder."""
    monkeypatch.setattr(checkpoint_parts, "MOST_WAIT_S", WAIT_S)
    said, written, real = list[str](), list[FileEntry](), write_tensors

    def counted(*arguments: Any, **options: Any) -> FileEntry:
        written.append(real(*arguments, **options))  # and synced: the disk may be full from now on
        return written[-1]

    monkeypatch.setattr(checkpoint, "write_tensors", counted)
    savers[0].report = said.append
    _save(savers, 9, only=1)
    (folder,) = place.glob(".tmp-*")
    _wait_until(lambda: len(written) == 2)
    return said, folder


def test_a_full_disk_is_known_at_once_and_what_filled_it_is_removed(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for the note only after the files that this rank began are removed."""
    said, folder = _begun_by_the_first(savers, tmp_path, monkeypatch)
    _limit_disk(tmp_path, _bytes(tmp_path) + 250, monkeypatch)  # for the note, and for less than a part
    savers[1].begin(position(9), _groups(1), writer=Writer(1, WORLD, folder))
    savers[1].wait()
    savers[0].wait()
    assert "rank 1: No space left on device" in said[0]
    assert "[Errno 28]" in said[0]
    assert not list(tmp_path.glob(".tmp-*"))


def test_without_room_for_a_word_the_folder_is_taken_away(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, folder = _begun_by_the_first(savers, tmp_path, monkeypatch)
    _limit_disk(tmp_path, 0, monkeypatch)
    for rank in (1, 2):
        savers[rank].begin(position(9), _groups(rank), writer=Writer(rank, WORLD, folder))
        savers[rank].wait()
    savers[0].wait()
    assert "another process" in said[0]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_failure_is_known_while_a_slower_process_still_writes(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_parts, "MOST_WAIT_S", WAIT_S)
    said: list[str] = []
    savers[0].report = said.append
    folder = savers[0].open(9)
    assert folder is not None
    Writer(2, WORLD, folder).leave(Note(error="Input/output error", errno=errno.EIO))
    savers[0].begin(position(9), _groups(0), writer=Writer(0, WORLD, folder))
    savers[0].wait()
    assert "rank 2: Input/output error" in said[0]


def test_a_damaged_note_costs_the_checkpoint_not_the_run(savers: list[Saver], tmp_path: Path) -> None:
    said: list[str] = []
    savers[0].report = said.append
    folder = savers[0].open(9)
    assert folder is not None
    (folder / "rank-00002.json").write_bytes(b'{"error": "\xff"}')
    savers[0].begin(position(9), _groups(0), writer=Writer(0, WORLD, folder))
    savers[0].wait()
    assert "rank-00002.json is damaged" in said[0]


def test_what_is_no_fault_of_the_disk_is_known_too(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 need not wait until the process is gone: it may itself wait for rank 0."""
    monkeypatch.setattr(checkpoint_parts, "MOST_WAIT_S", WAIT_S)
    said: list[str] = []
    savers[0].report = said.append
    _save(savers, 9, only=1)
    (folder,) = tmp_path.glob(".tmp-*")
    odd = {"weights": {"w": torch.zeros(3, dtype=torch.complex64)}}  # no dtype of the files
    savers[1].begin(position(9), odd, writer=Writer(1, WORLD, folder))
    savers[0].wait()
    assert "rank 1: KeyError" in said[0]
    with pytest.raises(KeyError):
        savers[1].wait()


def test_a_note_that_comes_after_rank_0_gave_up_is_dropped(tmp_path: Path) -> None:
    Writer(1, 2, tmp_path / "gone").leave(Note())
    assert not (tmp_path / "gone").exists()


def test_kept_trials_have_all_parts(savers: list[Saver], tmp_path: Path) -> None:
    _save(savers, 7)
    for saver in savers:
        saver.wait()
    checkpoint.link(_newest(tmp_path).folder, tmp_path / "trials" / "000", {"weights"})
    kept = checkpoint.load(tmp_path / "trials" / "000", "weights")
    assert torch.equal(kept.tensors("weights")["w"], WHOLE)


@pytest.mark.parametrize("damage", ["one part", "no part"])
def test_a_damaged_part_damages_the_checkpoint(savers: list[Saver], tmp_path: Path, damage: str) -> None:
    for step in (7, 9):
        _save(savers, step)
        for saver in savers:
            saver.wait()
    part = tmp_path / "step-00000009" / "weights.00001-of-00003.safetensors"
    content = part.read_bytes()
    part.unlink()
    if damage == "one part":
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found.manifest.position.step == 7
    assert len(said) == 1


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _limit_disk(folder: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files below `folder` that are larger together not reach the disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if _bytes(folder) > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def _wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)
