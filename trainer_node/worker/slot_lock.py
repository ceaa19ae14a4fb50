"""The slot's locks: an flock that a worker inherits lasts exactly as long as the worker does.

Each node has its own (`SlotLock`). All nodes that serve a slot on one machine share a second (`MachineLock`).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from shared.files import append_lines
from shared.logs import get_logger
from shared.messages.encoding import decode
from shared.processes import command_line
from shared.settings import Settings

POLL_S: Final = 0.05  # between two looks at a lock that is held; a look reads all of /proc
SLOWEST_POLL_S: Final = 1.0  # once its holders were killed, and are still there
STUCK_S: Final = 60.0  # after which a process that is killed counts as one that the kernel can't end

log = get_logger()


class LockEvent(Struct, frozen=True, kw_only=True):
    """One line of `slot.log`."""

    event: str  # acquired, adopted or released
    pid: int
    task: str
    attempt: int
    at: float


class SlotLock:
    """`slot.lock` in a node's folder, and `slot.log`, the record of who held it when."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "slot.lock"
        self.log_path = folder / "slot.log"

    def take(self) -> int:
        """Return a descriptor that holds the lock, to be inherited and closed; BlockingIOError if held."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_held(self) -> bool:
        """Return whether a worker, or a child it left behind, holds the lock."""
        try:
            os.close(self.take())
        except BlockingIOError:
            return True
        return False

    def holders(self) -> list[int]:
        """Return the ids of the processes that have the lock open, as far as this user may see them."""
        path = str(self.path.resolve())
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has_open(pid, path)]

    def record(self, event: str, pid: int, task: str, attempt: int) -> None:
        """Append one line to `slot.log`; a full disk costs the line, not the worker."""
        line = LockEvent(event=event, pid=pid, task=task, attempt=attempt, at=time.time())
        try:
            with self.log_path.open("a+b", buffering=0) as file:
                append_lines(file.fileno(), msgspec.json.encode(line) + b"\n")
        except OSError as error:
            log.error("slot.log not written", event_name=event, pid=pid, error=str(error))

    def record_missed_release(self) -> None:
        """Record that the lock is free, if the last whole line says that a process holds it."""
        try:
            lines = self.log_path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        except OSError as error:  # the record is for people
            log.error("slot.log not read", error=str(error))
            return
        last = next((event for line in reversed(lines) if (event := _event(line)) is not None), None)
        if last is not None and last.event != "released":
            self.record("released", last.pid, last.task, last.attempt)


def _event(line: bytes) -> LockEvent | None:
    """Return a line's event; None for one that a kill or a full disk cut short."""
    try:
        return decode(line, LockEvent)
    except ValueError:  # msgspec's errors, and bytes that are not UTF-8
        return None


class StuckError(OSError):
    """A process that holds a lock can't be ended; a later try may find it gone."""


class LockWait:
    """The looks at a lock whose holders are asked to end: slower after a kill, and not for ever."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.killed: set[int] = set()
        self._began = time.monotonic()
        self._pause_s = POLL_S

    async def pause(self) -> None:
        """Wait until the next look. Raises StuckError after STUCK_S: a system call may never end."""
        if time.monotonic() - self._began > STUCK_S:
            pids = sorted(self.killed)
            who = f"killed, but alive: {pids}" if pids else "none that this user can end"
            raise StuckError(f"{self.path} is held for more than {STUCK_S:.0f} s by processes ({who})")
        await asyncio.sleep(self._pause_s)
        if self.killed:
            self._pause_s = min(2 * self._pause_s, SLOWEST_POLL_S)


class MachineLock:
    """A second lock that every worker inherits, in the data folder: the slot's nodes on one machine share it.

    A node's own lock isn't enough: a standby node has its own folder, and so its own lock.
    """

    def __init__(self, settings: Settings) -> None:
        self.lock = SlotLock(settings.data / "slots" / settings.slot)

    async def clear(self, must_hold: Callable[[], None], grace_s: float) -> None:
        """Return when no worker is on the slot's devices; end the worker of a node that lost the lease.

        `must_hold` raises if this node doesn't hold the lease: then it has no right to end a process.
        Raises StuckError if such a worker can't be ended.
        """
        await asyncio.to_thread(self.lock.path.parent.mkdir, parents=True, exist_ok=True)
        asked: dict[int, float] = {}
        wait = LockWait(self.lock.path)
        while await asyncio.to_thread(self.lock.is_held):
            must_hold()
            for pid in await asyncio.to_thread(lambda: list(self._foreign_workers())):
                if pid not in asked:
                    log.warning("another node's worker is on this slot's devices; ending it", pid=pid)
                    asked[pid] = time.monotonic()
                    _send(pid, signal.SIGTERM)
                elif time.monotonic() - asked[pid] > grace_s:
                    if pid not in wait.killed:
                        log.warning("another node's worker doesn't stop, killing it", pid=pid)
                    wait.killed.add(pid)
                    _send(pid, signal.SIGKILL)
            await wait.pause()

    def _foreign_workers(self) -> Iterator[int]:
        """Yield the holders of the lock, except nodes: they open it for a moment to test it."""
        for pid in self.lock.holders():
            if pid != os.getpid() and command_line(pid)[-1:] != ["trainer_node"]:
                yield pid


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _has_open(pid: int, path: str) -> bool:
    """Return whether a process has a file open, whatever else it opens and closes meanwhile."""
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # gone meanwhile, or another user's
        return False
    return any(_target(f"{folder}/{name}") == path for name in names)


def _target(link: str) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # this file was closed since
        return None
