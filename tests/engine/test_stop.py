"""SIGTERM at awkward moments: while Python starts, while the engine is imported, after the last word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer_node.engine.stop import Stop

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


def test_a_signal_stops_at_once_and_a_second_changes_nothing(stop: Stop, monkeypatch: pytest.MonkeyPatch):
    said: list[object] = []
    monkeypatch.setattr(os, "_exit", said.append)
    stop.last_word = lambda: said.append("stopped")
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert said == ["stopped", 0]
    assert stop.asked


def test_inside_training_it_is_only_noted(stop: Stop):
    with stop.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stop.asked


def test_after_the_last_word_it_changes_nothing(stop: Stop):
    stop.close()
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2, 0.6])
def test_a_worker_that_just_started_says_that_it_stopped_or_dies_of_it(after_s: float, tmp_path: Path):
    job = tmp_path / "job.json"
    job.write_text("{}")
    with subprocess.Popen(
        [sys.executable, "-m", "trainer_node.engine", str(job)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    ) as worker:
        try:
            worker.wait(after_s)
        except subprocess.TimeoutExpired:
            worker.send_signal(signal.SIGTERM)
        status = worker.wait(30)
    if status == -signal.SIGTERM:
        assert not (tmp_path / "outcome.json").exists()
        assert after_s < 0.2
    else:
        assert status == 0
        assert (tmp_path / "outcome.json").read_text() == '{"status":"stopped"}'
