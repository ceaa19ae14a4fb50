"""One process per GPU: start them, watch them, and end all of them when one is gone. Knows nothing of torch.

The parent is the worker that the node knows: it hands SIGTERM on to rank 0, which decides for all, and its
exit status is rank 0's. Rank 0 may be waiting for the others inside a call of C, and then handles no signal:
so the parent also writes the file that ranks look for which each train something else. Every rank inherits
the slot's lock, so that the slot counts as held until the last one is gone; and every rank dies with the
parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from shared.json_files import read_json_if_possible
from shared.messages.runs import WorkerJob
from shared.net import free_port
from shared.processes import PARENT

POLL_S = 0.05
GRACE_S = 10.0  # what rank 0 has to write the outcome after another rank has failed
LEAVE_S = 2.0  # what the others have to leave in after rank 0 is done
# Exit status of a rank that wrote down a smaller plan or a failed trial, or could not meet the others.
AGAIN = 75
MOST_STARTS = 12  # more rungs than the memory ladder has
PR_SET_PDEATHSIG = 1


def world_of(job_path: Path) -> int:
    """Return a job's number of processes; one for an unreadable job, whose worker says what is wrong."""
    job = read_json_if_possible(job_path, WorkerJob)
    return 1 if job is None else processes(job)


def processes(job: WorkerJob) -> int:
    """Return how many processes train: one per GPU, one on a CPU, unless the job says otherwise."""
    return job.processes or (1 if job.hardware.device == "cpu" else job.hardware.count)


def rank_of(environment: Mapping[str, str]) -> int | None:
    """Return this process's rank if torchrun or our own parent started it, else None."""
    return int(environment["RANK"]) if "RANK" in environment and "WORLD_SIZE" in environment else None


def die_with_parent() -> None:
    """Have this rank killed when its parent dies, for whatever reason (Linux only)."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # gone before we asked
        os._exit(1)


class Ranks:
    """The processes of one worker; `stop_file` is what those look for that rank 0 doesn't reach."""

    def __init__(self, arguments: Sequence[str], world: int, stop_file: Path | None = None) -> None:
        self.arguments = list(arguments)
        self.world = world
        self.stop_file = stop_file
        self.inherited = inherited()
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopping = False

    def run(self) -> int:
        """Start all ranks and wait for them; rank 0's exit status, or another that says what went wrong."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        status = AGAIN
        try:
            for _ in range(MOST_STARTS):
                self._start()
                status = self._watch()
                if status != AGAIN or self.stopping:
                    break
        finally:
            self._kill()
        return status

    def _start(self) -> None:
        environment = os.environ | {
            "WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            PARENT: str(os.getpid()),
        }
        # One machine: no name service and no network card is needed to talk to ourselves.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
        for rank in range(self.world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(self.arguments, env=environment | place, pass_fds=self.inherited)
            self.running.append(process)
        if self.stopping:  # the signal may have come before rank 0 was there
            self.running[0].terminate()

    def _watch(self) -> int:
        """Wait until rank 0 ends, or until another fails; no rank is left afterwards."""
        first, others = self.running[0], self.running[1:]
        while first.poll() is None and not any(process.poll() for process in others):
            time.sleep(POLL_S)
        codes = [process.poll() for process in self.running]
        if first.returncode == 0:
            _wait(others, LEAVE_S)
        elif not any(code is not None and (code < 0 or code == AGAIN) for code in codes):
            # What all ranks fail at is rank 0's to report; one that ran out of memory may be about to say so.
            _wait(self.running, GRACE_S if first.returncode is None else LEAVE_S)
            codes = [process.poll() for process in self.running]
        self._kill()
        status = codes[0]
        if AGAIN in codes:
            return AGAIN
        if status is None:
            return 1
        return status if status >= 0 else 128 - status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self.running and self.running[0].poll() is None:
            # Before the file: a round that begins removes one that is left from an earlier stop.
            self.running[0].terminate()
            if self.stop_file is not None:
                with contextlib.suppress(OSError):  # a full disk; rank 0 still has its signal
                    self.stop_file.touch()

    def _kill(self) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()
        self.running = []


def inherited() -> list[int]:
    """Descriptors above stderr that were handed to this process: among them the slot's lock."""
    found = []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def command(job_path: Path) -> list[str]:
    """Return the command that starts a rank."""
    return [sys.executable, "-m", "trainer_node.engine", str(job_path)]


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(POLL_S)
