"""Runs of several processes for tests: started together, each with its part of one job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shared.clock import TokenClock
from shared.net import free_port
from tests.engine.worker_run import ENVIRONMENT, bare_job
from trainer_node.engine.context import RunContext
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop

WAIT_S = 240.0
# Processes of torch: on two busy cores they take many seconds to start.


def start_together(world: int, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start a script as so many processes of one group."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [ENVIRONMENT | shared | {"RANK": str(rank)} for rank in range(world)]
    return [subprocess.Popen([sys.executable, *arguments], env=env) for env in environments]


def run_together(world: int, arguments: list[str], most_s: float = WAIT_S) -> None:
    """Run a script as so many processes of one group; all must end well, and none stays."""
    processes = start_together(world, arguments)
    try:
        for process in processes:
            assert process.wait(most_s) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_context(model: str, folder: Path, group: ProcessGroup) -> RunContext:
    """Return what a process is given of a job on a model."""
    job = bare_job(model_path=model, ready_by=1e6, clock="token")
    reporter = Reporter(Path(os.devnull), "t", "a")
    return RunContext(job, folder, TokenClock(0.0, 100.0), reporter, Stop(), group)
