"""A task's rows, with and without the packages that they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.arena import task as tasks
from bench.arena.rows import Row
from bench.arena.task import Task, pack_rows, rows_of


def test_packed_rows_make_the_same_task_without_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(f"what is {number}", f"it is number {number}, not {number * 7}") for number in range(400)]
    monkeypatch.setattr(tasks, "load", lambda source, cache: rows)
    task = Task("wordnet", "smollm2", 50, 2.0, 3)
    known = rows_of(task, tmp_path)
    pack_rows("wordnet", tmp_path, tmp_path / "there")

    def fail(source: str, cache: Path) -> list[Row]:
        raise AssertionError("no package can be fetched there")

    monkeypatch.setattr(tasks, "load", fail)
    assert rows_of(task, tmp_path / "there") == known
    assert len(known[0]) == 50
    assert not set(known[0]) & set(known[1])
