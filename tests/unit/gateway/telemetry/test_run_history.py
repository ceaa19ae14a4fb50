"""The points of runs: what is kept, in which order, and what a broken file or disk changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry import run_history
from gateway.telemetry.run_history import RunHistory
from shared.messages.runs import Phase, Progress


def progress(at: float, step: int = 0, **fields: Any) -> Progress:
    values: dict[str, Any] = {"task": "t", "slot": "a", "phase": Phase.TRAIN, "loss": 2.0} | fields
    return Progress(at=at, step=step, **values)


async def test_points_survive_a_restart_in_order(tmp_path: Path) -> None:
    for start in (0, 10):
        history = RunHistory(tmp_path / "new")
        for step in range(start, start + 10):
            history.note(progress(float(step), step, loss=2.0 - step / 100))
        await history.flush()
    points = RunHistory(tmp_path / "new").read("t")
    assert [point.step for point in points] == list(range(20))
    assert points[-1].loss == pytest.approx(1.81)


async def test_what_says_nothing_new_is_kept_now_and_then(tmp_path: Path) -> None:
    history = RunHistory(tmp_path)
    for second in range(25):
        history.note(progress(float(second), 1))
    history.note(progress(25.0, 1, message="a row is dropped"))
    await history.flush()
    assert [point.at for point in history.read("t")] == [0.0, 10.0, 20.0, 25.0]


async def test_equal_points_of_two_gateways_are_one(tmp_path: Path) -> None:
    for _ in range(2):
        history = RunHistory(tmp_path)
        history.note(progress(1.0, 1))
        history.note(progress(2.0, 2, message="said"))
        await history.flush()
    assert [point.at for point in RunHistory(tmp_path).read("t")] == [1.0, 2.0]


async def test_missed_points_are_filled_in_once_and_only_where_they_say_something(tmp_path: Path) -> None:
    published = [progress(float(at), at // 5, loss=2.0) for at in range(100)]
    whole = RunHistory(tmp_path / "whole")
    for each in published:
        whole.note(each)
    await whole.flush()
    history = RunHistory(tmp_path / "cut")
    for each in published[:30] + published[70:]:
        history.note(each)
    for _ in range(2):
        await history.fill({"t": published, "no/key": published})
        assert [point.step for point in history.read("t")] == [point.step for point in whole.read("t")]
    assert len((tmp_path / "cut" / "t.jsonl").read_bytes().splitlines()) == 20
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["t.jsonl"]


async def test_filling_in_keeps_messages_and_adds_no_repetition(tmp_path: Path) -> None:
    history = RunHistory(tmp_path)
    for at in range(0, 30, 2):
        history.note(progress(float(at), 1))
    await history.flush()
    said = progress(13.0, 1, message="a row is dropped")
    await history.fill({"t": [progress(float(at), 1) for at in range(3, 30)] + [said, said]})
    assert [point.at for point in history.read("t")] == [0.0, 10.0, 13.0, 20.0]


@pytest.mark.parametrize("cut", ['[2.0,"tra\n', '[2.0,"tra'])
async def test_a_cut_line_is_skipped_and_the_next_begins_on_a_new_one(tmp_path: Path, cut: str) -> None:
    history = RunHistory(tmp_path)
    history.note(progress(1.0, 1))
    await history.flush()
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write(cut)
    history.note(progress(3.0, 3))
    await history.flush()
    assert [point.step for point in history.read("t")] == [1, 3]


async def test_points_that_are_written_in_parts_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, whole = RunHistory(tmp_path), os.write
    history.note(progress(1.0, 1))
    history.note(progress(2.0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:7]))
        await history.flush()
    assert [point.step for point in history.read("t")] == [1, 2]
    assert history.lost == 0


@pytest.mark.parametrize("task", ["../../etc/passwd", "a/b", "", "."])
async def test_a_name_that_is_no_key_makes_no_file(tmp_path: Path, task: str) -> None:
    history = RunHistory(tmp_path / "runs")
    history.note(progress(1.0, 1, task=task))
    await history.flush()
    assert os.listdir(tmp_path) == []


async def test_only_the_newest_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_history, "RUNS_KEPT", 3)
    (tmp_path / "other.txt").write_text("not ours")
    history = RunHistory(tmp_path)
    for number in range(6):
        history.note(progress(1.0, 1, task=f"t{number}"))
        await history.flush()
    assert sum(name.endswith(".jsonl") for name in os.listdir(tmp_path)) == 3
    assert (tmp_path / "t5.jsonl").exists()
    assert (tmp_path / "other.txt").exists()


async def test_a_disk_that_fails_loses_points_and_says_how_many(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    history = RunHistory(tmp_path / "runs")
    history.note(progress(1.0, 1))
    history.note(progress(2.0, 2))
    with pytest.raises(OSError, match="runs"):
        await history.flush()
    assert history.lost == 2


async def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_history, "MOST_WAITING", 3)
    history = RunHistory(tmp_path)
    for step in range(5):
        history.note(progress(float(step), step))
    await history.flush()
    assert (len(history.read("t")), history.lost) == (3, 2)
