"""The measured rates of transfers: from large ones only, each direction for itself, kept over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer_node.transfer_rates import Direction, measured, note, rate_file

EACH = pytest.mark.parametrize("direction", Direction)


@EACH
def test_the_newest_transfer_counts_half(tmp_path: Path, direction: Direction) -> None:
    assert measured(tmp_path, direction) is None
    note(tmp_path, direction, 200_000_000, 2.0)
    assert measured(tmp_path, direction) == 100e6
    note(tmp_path, direction, 200_000_000, 4.0)
    assert measured(tmp_path, direction) == 75e6
    assert [other for other in Direction if measured(tmp_path, other)] == [direction]


@pytest.mark.parametrize(("size", "seconds"), [(99_999_999, 1.0), (200_000_000, 0.0)])
@EACH
def test_what_tells_nothing_is_not_counted(
    tmp_path: Path, direction: Direction, size: int, seconds: float
) -> None:
    note(tmp_path, direction, size, seconds)
    assert measured(tmp_path, direction) is None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"more": ' + b"[" * 100_000, b'{"bytes_per_s": 0}', b'{"bytes_per_s": "fast"}']
)
@EACH
def test_a_damaged_file_is_no_rate(tmp_path: Path, direction: Direction, content: bytes) -> None:
    rate_file(tmp_path, direction).write_bytes(content)
    assert measured(tmp_path, direction) is None


@EACH
def test_a_folder_that_can_not_be_written_stops_nothing(tmp_path: Path, direction: Direction) -> None:
    note(tmp_path / "absent", direction, 200_000_000, 2.0)
    assert measured(tmp_path / "absent", direction) is None


def test_a_rate_that_an_older_version_kept_is_read(tmp_path: Path) -> None:
    (tmp_path / "upload_rate.json").write_bytes(b'{"bytes_per_s": 5e7}')
    assert measured(tmp_path, Direction.UPLOAD) == 5e7
