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
from pathlib import Path
from typing import IO, Final, Protocol

from msgspec import Struct

from bench.tournament.mounts import Mounted

ROOT: Final = Path(__file__).parents[2]
NAMESPACE: Final = ("unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
MEMORY, SHARED_MEMORY = "8g", "1g"


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


class Namespace(Struct, frozen=True):
    """Containers without a container engine."""

    folder: Path = ROOT  # whose code is run: this checkout, or a built entry

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
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=mounted.root)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill `unshare`, and with it the namespace."""
        process.kill()
        process.wait()


class Docker(Struct, frozen=True):
    """Containers of an image, with the limits that upstream sets; no network at all."""

    image: str
    name: str = f"podium-contest-{os.getpid()}"  # of this bench: several may run

    def start(self, mounted: Mounted, profiles: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a container: everything read-only but the volume of submissions."""
        subprocess.run(["docker", "rm", "--force", self.name], capture_output=True, check=False)
        cache = mounted.root / "cache"
        options = [
            *("--name", self.name, "--rm", "--network", "none", "--cap-drop", "ALL"),
            *("--security-opt", "no-new-privileges", "--memory", MEMORY, "--shm-size", SHARED_MEMORY),
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


def run(runtime: Runtime, mounted: Mounted, profiles: str, seconds: float) -> Ended:
    """Run a task's container for so long at most, then kill it."""
    if isinstance(runtime, Namespace) and shutil.which(NAMESPACE[0]) is None:
        raise SystemExit("this bench needs `unshare` (util-linux) or --image")
    began = time.monotonic()
    with (mounted.root / "log").open("ab") as log:
        process = runtime.start(mounted, profiles, log)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            runtime.kill(process)
            return Ended(None, time.monotonic() - began)
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Ended(None, time.monotonic() - began)
    return Ended(status, time.monotonic() - began)
