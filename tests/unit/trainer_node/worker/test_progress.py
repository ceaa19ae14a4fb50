"""When a running worker must be killed, and reading progress.jsonl while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.messages.encoding import encode
from shared.messages.runs import Phase, Progress
from trainer_node.worker.progress import CATCH_UP_BYTES, READ_BYTES, ProgressTail, stop_reason


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ({}, None),
        ({"silent_s": 899.0}, None),
        ({"silent_s": 900.0}, "no progress for 900 s"),
        ({"now": 99.9}, None),
        ({"now": 89.9, "silent_s": 80.0}, None),
        ({"now": 90.0, "silent_s": 20.0}, "no progress for 20 s"),  # it should have been ready
        ({"now": 90.0, "silent_s": 20.0, "phase": Phase.VERIFY}, "no progress for 20 s"),
        ({"now": 95.0, "silent_s": 20.0, "started_at": 91.0}, None),
        ({"now": 100.0}, "the deadline passed"),
        ({"now": 100.0, "phase": None}, "the deadline passed"),
        ({"now": 100.0, "phase": Phase.EXPORT}, None),  # about to finish
        ({"now": 100.0, "phase": Phase.EXPORT, "silent_s": 900.0}, "no progress for 900 s"),
        ({"now": 120.0, "started_at": 95.0}, None),  # started late, exports at once
    ],
)
def test_a_worker_is_killed_for_silence_and_at_the_deadline(seen: dict[str, Any], why: str | None) -> None:
    usual: dict[str, Any] = {
        "now": 50.0,
        "silent_s": 1.0,
        "hang_s": 900.0,
        "started_at": 10.0,
        "ready_by": 90.0,
        "deadline_at": 100.0,
        "phase": Phase.TRAIN,
    }
    assert stop_reason(**(usual | seen)) == why


def line(step: int, message: str | None = None) -> bytes:
    return encode(Progress(task="t", slot="a", phase=Phase.TRAIN, step=step, message=message)) + b"\n"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def steps(tail: ProgressTail) -> list[int]:
    return [progress.step for progress in tail.read()]


def test_only_what_is_new_and_whole_is_read(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = ProgressTail(path)
    assert steps(tail) == []
    append(path, line(1) + line(2) + line(3)[:10])
    assert steps(tail) == [1, 2]
    assert steps(tail) == []
    append(path, line(3)[10:])
    assert steps(tail) == [3]


def test_of_an_adopted_run_only_the_newest_line_is_new(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    append(path, b"".join(map(line, range(1000))))
    assert path.stat().st_size > CATCH_UP_BYTES
    tail = ProgressTail(path)
    append(path, line(1000))
    assert steps(tail) == [1000]
    append(path, line(1001) + line(1002))
    assert steps(tail) == [1001, 1002]


def test_rubbish_is_skipped_and_a_flood_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = ProgressTail(path)
    append(path, b"not json\n\n" + b'{"task":"\xff"}\n' + line(1))
    assert steps(tail) == [1]
    append(path, b"x" * (READ_BYTES + 10) + b"\n" + line(2))
    assert steps(tail) == []
    assert steps(tail) == [2]


def test_a_new_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = ProgressTail(path)
    append(path, line(1) + line(2))
    assert steps(tail) == [1, 2]
    path.write_bytes(line(9))
    assert steps(tail) == [9]
