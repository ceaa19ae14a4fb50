"""Following progress.jsonl while somebody writes it."""

from __future__ import annotations

from pathlib import Path

from shared.messages import Phase, Progress, encode
from trainer_node.progress import CATCH_UP_BYTES, READ_BYTES, ProgressTail, worth_telling


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


def test_a_run_that_is_taken_on_tells_only_where_it_stands(tmp_path: Path) -> None:
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
    append(path, b"not json\n\n" + line(1))
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


def test_words_are_never_dropped() -> None:
    lines = [
        Progress(
            task="t", slot="a", phase=Phase.INGEST, step=step, message="3 rows dropped" if step == 1 else None
        )
        for step in range(5)
    ]
    assert [reported.step for reported in worth_telling(lines)] == [1, 4]
    assert worth_telling([]) == []
