"""Progress lines."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from shared.messages.runs import Phase, Progress, decode_progress
from trainer_node.engine.reporter import SMOOTHING, Reporter
from trainer_node.worker.progress import ProgressTail


def _lines(path: Path) -> list[Progress]:
    return [decode_progress(line) for line in path.read_bytes().splitlines()]


def test_lines_carry_on_what_was_known(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    reporter = Reporter(path, "task", "a")
    reporter.phase(Phase.BASELINE)
    reporter.losses(base=3.0, dev=3.0)
    reporter.message("one row dropped")
    reporter.phase(Phase.TRAIN)
    reporter.step(1, 0.1, 100, 2.0, 1e-3, 50.0)
    reporter.step(2, 0.2, 200, 1.0, 9e-4, 40.0)
    lines = _lines(path)
    assert [line.phase for line in lines] == [Phase.BASELINE] * 3 + [Phase.TRAIN] * 3
    assert [line.message for line in lines] == [None, None, "one row dropped", None, None, None]
    last = lines[-1]
    assert (last.step, last.tokens, last.lr, last.eta_s, last.base_loss) == (2, 200, 9e-4, 40.0, 3.0)
    assert last.loss == pytest.approx(SMOOTHING * 2.0 + (1 - SMOOTHING) * 1.0)
    assert last.tokens_per_s is not None
    assert last.tokens_per_s > 0
    assert not reporter.due()


def test_a_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b'{"task":"x"')
    Reporter(path, "task", "a").phase(Phase.LOADING)
    cut, whole = path.read_bytes().splitlines()
    assert cut == b'{"task":"x"'
    assert decode_progress(whole).phase is Phase.LOADING


def test_a_line_cut_by_a_full_disk_does_not_swallow_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "progress.jsonl", os.write
    reporter = Reporter(path, "task", "a")

    def full(descriptor: int, data: bytes) -> int:
        if path.stat().st_size:
            raise OSError(28, "No space left on device")
        return whole(descriptor, data[:9])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        reporter.phase(Phase.LOADING)
    reporter.phase(Phase.BASELINE)
    cut, line = path.read_bytes().splitlines()
    assert (len(cut), decode_progress(line).phase) == (9, Phase.BASELINE)


def test_a_long_part_says_once_a_second_that_it_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "progress.jsonl"
    reporter = Reporter(path, "task", "a")
    reporter.phase(Phase.BASELINE)
    reporter.message("said once")
    reporter.alive()
    assert len(_lines(path)) == 2
    monkeypatch.setattr("trainer_node.engine.reporter.PERIOD_S", 0.0)
    reporter.alive()
    last = _lines(path)[-1]
    assert (len(_lines(path)), last.phase, last.message) == (3, Phase.BASELINE, None)


def test_a_call_that_is_silent_counts_as_alive_for_as_long_as_it_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "progress.jsonl"
    reporter = Reporter(path, "task", "a")
    reporter.phase(Phase.LOADING)
    monkeypatch.setattr("trainer_node.engine.reporter.PERIOD_S", 0.01)
    with reporter.patience(1000.0):
        until = time.monotonic() + 60.0
        while len(_lines(path)) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    said = len(_lines(path))
    assert said >= 4
    with reporter.patience(0.0):  # a call that takes longer is silent
        time.sleep(0.05)
    assert len(_lines(path)) == said


def test_a_full_disk_costs_lines_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The node must not take the run for a dead one."""
    path = tmp_path / "progress.jsonl"
    reporter, tail = Reporter(path, "task", "a"), ProgressTail(path)
    reporter.phase(Phase.TRAIN)
    assert [line.phase for line in tail.read()] == [Phase.TRAIN]
    assert tail.read() == []
    assert not tail.is_active

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer_node.engine.reporter.os.write", full)
    os.utime(path, ns=(0, 0))
    tail.read()
    reporter.message("the disk is full")
    assert reporter.silent_s < 10
    assert tail.read() == []
    assert tail.is_active
    monkeypatch.undo()
    reporter.step(1, 0.1, 100, 2.0, 1e-3, 50.0)
    assert [(line.step, line.message) for line in tail.read()] == [(1, None)]
    logged = capfd.readouterr()
    assert "the disk is full" in logged.out + logged.err
