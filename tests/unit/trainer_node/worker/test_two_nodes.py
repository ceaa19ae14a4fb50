"""Two nodes of one slot on one machine: the one that holds the lease has the only worker."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from shared.settings import Settings
from trainer_node.lease import LeaseLostError
from trainer_node.worker import slot_lock
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.supervisor import Supervisor

STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


async def two_nodes(tmp_path: Path) -> tuple[Supervisor, Supervisor, RunFolder]:
    """A worker of one node runs; another node of the same slot and machine has a folder of its own."""
    folders = [tmp_path / "one", tmp_path / "two"]
    settings = [
        Settings(data_dir=str(tmp_path), node_dir=str(folder), stop_grace_s=0.3) for folder in folders
    ]
    one, two = (Supervisor(each, 1, worker_command=(sys.executable, "-c", STUBBORN)) for each in settings)
    runs = [RunFolder(folder, "t") for folder in folders]
    for run in runs:
        run.path.mkdir(parents=True)
        run.job_file.write_text("{}")
    await one.start(runs[0], 1, 0)
    async with asyncio.timeout(60):
        while b"up" not in runs[0].log_file.read_bytes():
            await asyncio.sleep(0.02)
    return one, two, runs[1]


async def test_a_machine_has_one_worker_on_a_slot_whatever_node_started_it(tmp_path: Path) -> None:
    one, two, run = await two_nodes(tmp_path)
    await two.start(run, 1, 0)  # it holds the lease
    assert one.worker is not None
    async with asyncio.timeout(60):
        await one.worker.ended.wait()
    assert one.worker.manner() == "the worker was killed by SIGKILL"
    assert two.alive
    await two.stop("test")


async def test_a_node_without_the_lease_ends_no_other_nodes_worker(tmp_path: Path) -> None:
    one, two, run = await two_nodes(tmp_path)

    def must_hold() -> None:
        raise LeaseLostError("another node holds it")

    with pytest.raises(LeaseLostError):
        await two.start(run, 1, 0, must_hold=must_hold)
    assert one.alive
    assert two.worker is None
    await one.stop("test")


async def test_another_nodes_worker_that_can_not_be_killed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, run = await two_nodes(tmp_path)
    monkeypatch.setattr(slot_lock, "_send", lambda pid, number: None)
    monkeypatch.setattr(slot_lock, "STUCK_S", 1.0)
    with capture_logs() as lines:
        async with asyncio.timeout(30):
            with pytest.raises(OSError, match="killed, but alive"):
                await two.start(run, 1, 0)
    last = lines[-1]
    assert (last["event"], last["log_level"]) == ("no worker can be started", "error")
    await one.stop("test")
