"""Supervise service processes: start them, restart them when they exit, stop them in order."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from shared.errors import PodiumError
from shared.json_files import read_json
from shared.processes import start_time
from shared.settings_sources import PREFIX

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0  # before a restart; doubles each time
SETTLED_S = 30.0  # a service that ran this long restarts after the first pause
BAD_SETTINGS = 2  # exit code of a service with bad settings: a restart can't help
LOG_BYTES = 64 << 20  # a larger log is rotated when its service starts

AS_DESCRIPTOR_3 = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"

Say = Callable[[str], None]


class Spec(Struct, frozen=True, kw_only=True):
    """One service: what to run, and how to stop it."""

    name: str
    command: list[str]
    environment: dict[str, str] = {}
    stop_s: float = 15.0  # from SIGTERM to SIGKILL
    longest_pause_s: float = LONGEST_PAUSE_S
    on_leftover: int = signal.SIGTERM  # signal for a process that outlived its launcher


class _PidFile(Struct, frozen=True):
    """Process id and start time, which together identify one process."""

    pid: int
    start_time: int


class ManagedProcess:
    """One service under supervision; its pid file and log are in `folder`."""

    def __init__(self, spec: Spec, folder: Path, say: Say) -> None:
        self.spec = spec
        self.log = folder / "logs" / f"{spec.name}.log"
        self.pid_file = folder / "run" / f"{spec.name}.json"
        self.restarts = 0
        self.pid: int | None = None
        self.socket: int | None = None  # a listening socket's descriptor, passed as descriptor 3
        # Waits until the running process must be replaced; returns the reason.
        self.watch: Callable[[], Awaitable[str]] | None = None
        self._say = say
        self._asked_to_stop = asyncio.Event()

    async def supervise(self) -> None:
        """Keep it running until `stop`. Raises PodiumError if it exits because of bad settings."""
        pause = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            process = await self._start()
            try:
                self._note(process.pid)
                await self._ended_or_asked(process)
                if self._asked_to_stop.is_set():
                    await self._end(process)
                    return
            finally:
                await _kill(process)  # one that its watch condemns; after an error nobody else would end it
            if process.returncode == BAD_SETTINGS:
                raise PodiumError(f"{self.spec.name} can't start: {self.last_line()}")
            pause = (
                FIRST_PAUSE_S
                if time.monotonic() - began > SETTLED_S
                else min(2 * pause, self.spec.longest_pause_s)
            )
            self._say(f"{self.spec.name} {_exit_reason(process.returncode)}; restarting in {pause:g} s")
            self.restarts += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked_to_stop.wait(), pause)
                return

    def stop(self) -> None:
        """Make `supervise` stop the process and return."""
        self._asked_to_stop.set()

    async def stop_leftover(self) -> None:
        """Stop the process left behind by a launcher that was killed with -9, if it still runs."""
        try:
            left = read_json(self.pid_file, _PidFile)
        except OSError as error:
            raise PodiumError(f"{self.pid_file} can't be read: {error.strerror}") from error
        if left is None or start_time(left.pid) != left.start_time:
            return
        self._say(f"{self.spec.name} of an earlier launch still runs (process {left.pid}); stopping it")
        for number, patience in ((self.spec.on_leftover, self.spec.stop_s), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                os.kill(left.pid, number)
            until = time.monotonic() + patience
            while time.monotonic() < until:
                if start_time(left.pid) != left.start_time:
                    return
                await asyncio.sleep(0.05)
        raise PodiumError(f"{self.spec.name} of an earlier launch (process {left.pid}) can't be stopped")

    def last_line(self) -> str:
        """Return the last line of its log."""
        lines = self.log.read_bytes()[-4096:].decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "its log is empty")

    async def _start(self) -> asyncio.subprocess.Process:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.pid_file.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            return await self._spawn(log)

    def _note(self, pid: int) -> None:
        self.pid = pid
        self.pid_file.write_bytes(msgspec.json.encode(_PidFile(pid, start_time(pid) or 0)))

    async def _spawn(self, log: BinaryIO) -> asyncio.subprocess.Process:
        command = self.spec.command
        # A service's settings are all in its spec; LISTEN_* belong to this process, if systemd started it.
        inherited = {key: os.environ[key] for key in os.environ if not key.startswith((PREFIX, "LISTEN_"))}
        environment = inherited | self.spec.environment
        descriptors: tuple[int, ...] = ()
        if self.socket is not None:
            # subprocess can't renumber a descriptor, and dash redirects only single-digit ones.
            command = [sys.executable, "-ISc", AS_DESCRIPTOR_3, str(self.socket), *command]
            environment["LISTEN_FDS"] = "1"
            descriptors = (self.socket,)
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is handled by the launcher, which stops its services in order
        )

    async def _ended_or_asked(self, process: asyncio.subprocess.Process) -> None:
        """Wait until it exits, `stop` is called, or its watch returns."""
        waits: set[asyncio.Task[object]] = {
            asyncio.create_task(process.wait()),
            asyncio.create_task(self._asked_to_stop.wait()),
        }
        if self.watch is not None:
            waits.add(asyncio.create_task(self._condemned(self.watch)))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.result()
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _condemned(self, watch: Callable[[], Awaitable[str]]) -> None:
        self._say(f"{self.spec.name} {await watch()}; killing it")

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self.spec.stop_s)
            except TimeoutError:
                self._say(f"{self.spec.name} did not stop within {self.spec.stop_s:g} s; killing it")
                await _kill(process)
        self.pid_file.unlink(missing_ok=True)


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"
