"""The end of an early export's process, also of one that can't be killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer_node.contest import early_exports, training_run
from trainer_node.contest.early_exports import EarlyExports
from trainer_node.contest.training_run import TrainingRun
from trainer_node.contest.worker_jobs import Times
from trainer_node.worker.run_folder import RunFolder


class Unkillable:
    """A process that a system call holds: a kill has no effect."""

    pid = 4711

    def kill(self) -> None:
        """Have no effect."""

    def wait(self, timeout: float | None = None) -> int:
        """Raise TimeoutExpired, or fail where a real one would block for ever."""
        assert timeout is not None, "it waits without bound"
        raise subprocess.TimeoutExpired("export", timeout)


@pytest.fixture
def exports(tmp_path: Path) -> EarlyExports:
    return EarlyExports(RunFolder(tmp_path, "t"), cast(Times, None), {})


def test_an_export_is_ended(exports: EarlyExports) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    exports._process = process
    exports.stop()
    assert process.returncode == -9
    assert exports._process is None
    exports.stop()


def test_an_export_that_does_not_end_holds_nothing_up(exports: EarlyExports) -> None:
    exports._process = cast(Any, Unkillable())
    exports.stop()
    assert exports._process is None
    assert early_exports.END_S < training_run.STOP_S


def test_a_damaged_outcome_of_an_export_is_none(exports: EarlyExports) -> None:
    exports.run.path.mkdir(parents=True)
    exports._outcome_file.write_bytes(b'{"status": "ready", "digest": "\xff"}')
    exports._process = subprocess.Popen([sys.executable, "-c", ""])
    exports._process.wait()
    assert exports.take() is None


async def test_the_event_loop_does_not_wait_for_it() -> None:
    asked_in: list[threading.Thread] = []
    offered: list[str] = []

    async def stop(why: str, grace_s: float) -> None:
        """End no worker: there is none."""

    run = TrainingRun.__new__(TrainingRun)
    run.early = cast(Any, SimpleNamespace(stop=lambda: asked_in.append(threading.current_thread())))
    run.folder = cast(Any, SimpleNamespace(outcome=object, export=str, write_job=id))
    run.best = cast(Any, SimpleNamespace(offer=lambda kind, *rest: offered.append(kind)))
    run.job = cast(Any, SimpleNamespace(profile="auto"))
    run.supervisor = cast(Any, SimpleNamespace(stop=stop, close=lambda: None))
    run.log = cast(Any, SimpleNamespace(warning=str))
    await run._take_export()
    stopping = asyncio.Event()
    stopping.set()
    await run.follow(stopping)
    assert offered == ["final"]
    assert len(asked_in) == 2
    assert threading.main_thread() not in asked_in
