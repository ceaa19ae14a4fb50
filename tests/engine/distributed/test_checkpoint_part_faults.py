"""Processes that fail while they write a checkpoint together: the others know, and the older one stays."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.distributed.conftest import WORLD, groups, newest, save
from tests.engine.positions import position
from trainer_node.engine.distributed import checkpoint_parts
from trainer_node.engine.distributed.checkpoint_parts import Note, Writer, take_away
from trainer_node.engine.safetensors_file import FileEntry, write_tensors
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.disk_plan import CheckpointContent, Sizes

WAIT_S = 20.0


def test_one_that_can_not_write_is_reported_by_rank_0_and_the_older_one_stays(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(savers, 7)
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
    save(savers, 9)
    for saver in savers:
        saver.wait()
    assert "the checkpoint of step 9 could not be written" in said[0]
    assert "rank 2" in said[0]
    assert "No space left on device" in said[0]
    assert not list(tmp_path.glob(".tmp-*"))
    assert newest(tmp_path).manifest.position.step == 7
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
    save(savers, 9, only=1)
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
    save(savers, 9, only=1)
    (folder,) = place.glob(".tmp-*")
    _wait_until(lambda: len(written) == 2)
    return said, folder


def test_a_full_disk_is_known_at_once_and_what_filled_it_is_removed(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for the note only after the files that this rank began are removed."""
    said, folder = _begun_by_the_first(savers, tmp_path, monkeypatch)
    _limit_disk(tmp_path, _bytes(tmp_path) + 250, monkeypatch)  # for the note, and for less than a part
    savers[1].begin(position(9), groups(1), writer=Writer(1, WORLD, folder))
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
        savers[rank].begin(position(9), groups(rank), writer=Writer(rank, WORLD, folder))
        savers[rank].wait()
    savers[0].wait()
    assert "another process" in said[0]
    assert not list(tmp_path.glob(".tmp-*"))


def _said_after(savers: list[Saver], happens: Callable[[Path], None]) -> list[str]:
    """Return what rank 0 says of a checkpoint, in whose folder this happens before it begins its part."""
    said: list[str] = []
    savers[0].report = said.append
    folder = savers[0].open(9)
    assert folder is not None
    happens(folder)
    savers[0].begin(position(9), groups(0), writer=Writer(0, WORLD, folder))
    savers[0].wait()
    return said


def test_a_failure_is_known_while_a_slower_process_still_writes(
    savers: list[Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_parts, "MOST_WAIT_S", WAIT_S)
    note = Note(error="Input/output error", errno=errno.EIO)
    said = _said_after(savers, lambda folder: Writer(2, WORLD, folder).leave(note))
    assert "rank 2: Input/output error" in said[0]


def test_a_damaged_note_costs_the_checkpoint_not_the_run(savers: list[Saver]) -> None:
    def damaged(folder: Path) -> None:
        (folder / "rank-00002.json").write_bytes(b'{"error": "\xff"}')

    assert "rank-00002.json is damaged" in _said_after(savers, damaged)[0]


def test_what_is_no_fault_of_the_disk_is_known_too(
    savers: list[Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 need not wait until the process is gone: it may itself wait for rank 0."""
    monkeypatch.setattr(checkpoint_parts, "MOST_WAIT_S", WAIT_S)
    said: list[str] = []
    savers[0].report = said.append
    save(savers, 9, only=1)
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
