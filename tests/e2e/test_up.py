"""Two real jobs under `podium up`, while what runs them is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shared.files import folder_digest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.fault("F1", "F18")
def test_two_jobs_at_once_through_a_killed_gateway_and_a_drain(machine: Any) -> None:
    launcher = machine.up()
    assert [machine.offer(task)["slot"] for task in ("one", "two")] == ["a", "b"]
    refused = machine.offer("three")
    assert refused["reason"].startswith("At maximum accuracy capacity (2 jobs for #1)")

    os.kill(machine.pid("gateway"), signal.SIGKILL)
    machine.client.slots()  # asked at once: it waits in the launcher's socket instead of being refused
    assert launcher.stdout.readline().startswith("gateway was killed by SIGKILL; restarting in ")
    machine.until(lambda: len(machine.client.tasks()) == 2, "the gateway has read the logs again")
    assert "slots" in machine.podium("status").stdout

    watched = machine.podium("watch", "one", "two")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    results = [task.result for task in machine.client.tasks()]
    for result in results:
        assert result is not None
        assert result.artifact is not None
        assert folder_digest(Path(result.artifact)) == result.digest
        assert result.deadline_margin_s is not None
        assert result.deadline_margin_s > 0

    launcher.terminate()
    assert launcher.wait(timeout=60) == 0
    assert list((machine.data / "run").iterdir()) == []


@pytest.mark.fault("F4")
def test_a_killed_launcher_loses_nothing(machine: Any) -> None:
    launcher = machine.up()
    assert machine.offer("one")["accepted"]
    machine.until(lambda: len(machine.workers()) == 1, "the worker runs")
    worker = machine.workers()
    left = [machine.pid(service) for service in ("broker", "gateway", "node-a", "node-b")]
    launcher.kill()
    launcher.wait()

    machine.up()  # another port; takes down what was left, and the new node adopts the worker
    assert machine.workers() == worker, machine.client.tasks()
    assert not set(left) & {machine.pid(service) for service in ("broker", "gateway", "node-a", "node-b")}
    watched = machine.podium("watch", "one")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert machine.client.tasks()[0].attempts == 1
