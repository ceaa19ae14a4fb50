"""The slot's lock: who holds it, and what its log says after a process was killed inside a line."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from trainer_node.worker.slot_lock import LockEvent, SlotLock


@pytest.mark.parametrize("cut", [b"", b'{"event":"rel', b"\xff\xfe"])
def test_a_missed_release_is_recorded_whatever_was_cut_after_it(tmp_path: Path, cut: bytes) -> None:
    lock = SlotLock(tmp_path)
    lock.record("acquired", 7, "t1", 2)
    with lock.log_path.open("ab") as file:
        file.write(cut)
    for _ in range(2):  # once is enough
        lock.record_missed_release()
    lines = [line for line in lock.log_path.read_bytes().splitlines() if line != cut]
    events = [msgspec.json.decode(line, type=LockEvent) for line in lines]
    assert [(event.event, event.pid, event.attempt) for event in events] == [
        ("acquired", 7, 2),
        ("released", 7, 2),
    ]


def test_a_record_that_can_not_be_read_holds_nothing_up(tmp_path: Path) -> None:
    lock = SlotLock(tmp_path)
    lock.log_path.mkdir()
    lock.record_missed_release()


def test_a_holder_is_seen_whatever_it_closes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts opens and closes thousands of files, with lower numbers than its lock."""
    lock, listed = SlotLock(tmp_path), os.listdir
    held = lock.take()
    monkeypatch.setattr(os, "listdir", lambda path: ["closed"] * path.endswith("/fd") + listed(path))
    try:
        assert lock.holders() == [os.getpid()]
    finally:
        os.close(held)
    assert lock.holders() == []
