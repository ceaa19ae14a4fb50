from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.watched_file import WatchedFile


def number(path: Path, status: os.stat_result) -> int:
    if status.st_size > 4:
        raise ValueError("too large")
    return int(path.read_text())


async def test_a_file_is_read_again_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "number"
    watched = WatchedFile(path, number)
    with pytest.raises(OSError, match="No such file"):
        await watched.poll()
    path.write_text("1")
    assert [await watched.poll() for _ in range(3)] == [1, None, None]
    path.write_text("12")
    assert [watched.read_if_changed() for _ in range(2)] == [12, None]


async def test_a_replaced_file_of_the_same_size_and_time_counts(tmp_path: Path) -> None:
    path, other = tmp_path / "number", tmp_path / "other"
    watched = WatchedFile(path, number)
    for file in (path, other):
        file.write_text("1" if file == path else "2")
        os.utime(file, ns=(10**18, 10**18))
    assert await watched.poll() == 1
    other.rename(path)
    assert await watched.poll() == 2


@pytest.mark.parametrize("text", ["one", "1" * 5])
async def test_a_file_that_cannot_be_used_is_tried_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "number"
    path.write_text(text)
    watched = WatchedFile(path, number)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"too large|invalid literal"):
            await watched.poll()
    path.write_text("123")
    assert await watched.poll() == 123
