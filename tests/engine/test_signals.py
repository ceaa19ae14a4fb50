"""SIGTERM at awkward moments: while Python starts, while the engine is imported, after the last word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer_node.engine.signals import Stop

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stop() -> Iterator[Stop]:
    """Listens to the test process's signals until the test is over."""
    before = {number: signal.getsignal(number) for number in (1, 2, 13, 15)}
    stop = Stop()
    stop.install()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_stops_at_once_and_a_second_changes_nothing(
    stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr(os, "_exit", said.append)
    stop.write_outcome = lambda: said.append("stopped")
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert said == ["stopped", 0]
    assert stop.asked


def test_inside_training_it_is_only_noted(stop: Stop) -> None:
    with stop.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stop.asked


def test_after_close_it_changes_nothing(stop: Stop) -> None:
    stop.close()
    signal.raise_signal(signal.SIGTERM)


def _listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("after_s", [0.0, 0.2, 1.0])
def test_a_worker_that_is_still_importing_says_that_it_stopped(after_s: float, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text("{}")
    with subprocess.Popen(
        [sys.executable, "-m", "trainer_node.engine", str(job)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    ) as worker:
        while not _listens(worker.pid):
            time.sleep(0.001)
        time.sleep(after_s)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    assert (tmp_path / "outcome.json").read_text() == '{"status":"stopped"}'
