"""The measured rate of uploads: from large ones only, kept over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer_node import upload_rate


def test_the_newest_upload_counts_half(tmp_path: Path) -> None:
    assert upload_rate.measured(tmp_path) is None
    upload_rate.note(tmp_path, 200_000_000, 2.0)
    assert upload_rate.measured(tmp_path) == 100e6
    upload_rate.note(tmp_path, 200_000_000, 4.0)
    assert upload_rate.measured(tmp_path) == 75e6


@pytest.mark.parametrize(("size", "seconds"), [(99_999_999, 1.0), (200_000_000, 0.0)])
def test_what_tells_nothing_is_not_counted(tmp_path: Path, size: int, seconds: float) -> None:
    upload_rate.note(tmp_path, size, seconds)
    assert upload_rate.measured(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b'{"bytes_per_s": 0}', b'{"bytes_per_s": "fast"}'])
def test_a_damaged_file_is_no_rate(tmp_path: Path, content: bytes) -> None:
    (tmp_path / upload_rate.FILE).write_bytes(content)
    assert upload_rate.measured(tmp_path) is None


def test_a_folder_that_can_not_be_written_stops_nothing(tmp_path: Path) -> None:
    upload_rate.note(tmp_path / "absent", 200_000_000, 2.0)
    assert upload_rate.measured(tmp_path / "absent") is None
