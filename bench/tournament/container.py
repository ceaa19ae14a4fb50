"""Run a container as upstream does: start it, wait for its time, kill it. Docker's, or a stand-in.

The stand-in is the runner as a process of its own with a process namespace and a private root folder: when
the first process is killed, the kernel kills all others in it, as in a container.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, Protocol

from msgspec import Struct

from bench.tournament.mounts import Mounted
from shared.processes import command_line, start_time

ROOT: Final = Path(__file__).parents[2]
NAMESPACE: Final = ("unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
JOIN: Final = 'echo $$ > "$0" && exec "$@"'
MEMORY, SHARED_MEMORY = "8g", "1g"
WORKER: Final = "trainer_node.engine"
WORKER_SHARE: Final = 0.15  # of a task's time, before a worker is ended


class Ended(Struct, frozen=True):
    """How a container ended."""

    status: int | None  # None: it was killed
    seconds: float

    @property
    def uploads(self) -> bool:
        """Return whether upstream would upload: after a kill at the end of the time, or status 0."""
        return self.status in (None, 0)


class Runtime(Protocol):
    """How containers are run."""

    def start(self, mounted: Mounted, profiles: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a container; the returned process ends with it."""
        ...

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End all processes of a container with SIGKILL."""
        ...

    def processes(self, process: subprocess.Popen[bytes]) -> list[int]:
        """Return a container's processes, as this machine numbers them."""
        ...


class Namespace(Struct, frozen=True):
    """Containers without a container engine."""

    folder: Path = ROOT  # whose code is run: this checkout, or a built entry
    group: Path | None = None  # a control group to run in

    def start(self, mounted: Mounted, profiles: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the runner in a process namespace of its own."""
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment |= mounted.environment | {
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BASELINE_STATS_PATH": f"{mounted.root}{mounted.environment['BASELINE_STATS_PATH']}",
            "PODIUM_CONTEST_ROOT": str(mounted.root),
            "PODIUM_CONTEST_PROFILES": profiles,
            "PODIUM_HARDWARE": "cpu",
            "PODIUM_THREADS": "1",
        }
        command = [*NAMESPACE, sys.executable, "-m", "trainer_node.contest", *mounted.arguments]
        if self.group:
            command = ["sh", "-c", JOIN, str(self.group / "cgroup.procs"), *command]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=mounted.root)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill `unshare`, and with it the namespace."""
        process.kill()
        process.wait()

    def processes(self, process: subprocess.Popen[bytes]) -> list[int]:
        """Return the descendants of `unshare`."""
        found = [process.pid]
        for pid in found:
            found += children_of(pid)
        return found


def children_of(pid: int) -> list[int]:
    """Return a process's children, whichever of its threads started them."""
    found = list[int]()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended meanwhile
            found += map(int, thread.read_text().split())
    return found


class Docker(Struct, frozen=True):
    """Containers of an image, with the limits that upstream sets; no network at all."""

    image: str
    memory: str = MEMORY
    name: str = f"podium-contest-{os.getpid()}"  # of this bench: several may run

    def start(self, mounted: Mounted, profiles: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a container: everything read-only but the volume of submissions."""
        subprocess.run(["docker", "rm", "--force", self.name], capture_output=True, check=False)
        cache = mounted.root / "cache"
        options = [
            *("--name", self.name, "--rm", "--network", "none", "--cap-drop", "ALL"),
            *("--security-opt", "no-new-privileges", "--memory", self.memory, "--shm-size", SHARED_MEMORY),
            *("--volume", f"{cache}:/cache:ro"),
            *("--volume", f"{mounted.root / 'app' / 'checkpoints'}:/app/checkpoints:rw"),
        ]
        variables = {
            **mounted.environment,
            "PODIUM_CONTEST_PROFILES": profiles,
            "PODIUM_HARDWARE": "cpu",
            "PODIUM_THREADS": "1",
        }
        options += [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
        command = ["docker", "run", *options, self.image, *mounted.arguments]
        return subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the container, as upstream's runtime does at the end of the time."""
        subprocess.run(["docker", "kill", "--signal", "KILL", self.name], capture_output=True, check=False)
        process.wait()

    def processes(self, process: subprocess.Popen[bytes]) -> list[int]:
        """Return what runs in the container."""
        command = ["docker", "top", self.name, "-eo", "pid"]
        answer = subprocess.run(command, capture_output=True, check=False, text=True).stdout
        return [int(line) for line in answer.split() if line.isdigit()]


def find_worker(runtime: Runtime, process: subprocess.Popen[bytes]) -> int | None:
    """Wait for a container's worker and return its process, or None if the container ends before."""
    while process.poll() is None:
        for pid in runtime.processes(process):
            if WORKER in command_line(pid):
                return pid
        time.sleep(0.5)
    return None


def kill_worker(worker: int) -> None:
    """End a worker with SIGKILL, and wait for its end: the next one that is looked for is another."""
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    while start_time(worker) is not None:
        time.sleep(0.05)


def run(
    runtime: Runtime,
    mounted: Mounted,
    profiles: str,
    seconds: float,
    *,
    worker_ends: Sequence[Callable[[int], None]] = (),
) -> Ended:
    """Run a task's container for so long at most, then kill it; end its workers in these ways before."""
    if isinstance(runtime, Namespace) and shutil.which(NAMESPACE[0]) is None:
        raise SystemExit("this bench needs `unshare` (util-linux) or --image")
    began = time.monotonic()
    with (mounted.root / "log").open("ab") as log:
        process = runtime.start(mounted, profiles, log)
        try:
            for end_worker in worker_ends:
                if worker := find_worker(runtime, process):
                    time.sleep(WORKER_SHARE * seconds)
                    end_worker(worker)
            status = process.wait(max(0.0, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            runtime.kill(process)
            return Ended(None, time.monotonic() - began)
        except BaseException:  # of the bench: its folder can't be removed while something runs in it
            runtime.kill(process)
            raise
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Ended(None, time.monotonic() - began)
    return Ended(status, time.monotonic() - began)
