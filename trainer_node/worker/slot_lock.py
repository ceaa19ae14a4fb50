"""The slot's lock: an flock that a worker inherits, so that it lasts exactly as long as the worker does."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.logs import get_logger

log = get_logger()


class LockEvent(Struct, frozen=True, kw_only=True):
    """One line of `slot.log`."""

    event: str  # acquired, adopted or released
    pid: int
    task: str
    attempt: int
    at: float


class SlotLock:
    """`slot.lock` in a node's folder, and `slot.log`, which tells afterwards who held it when."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "slot.lock"
        self.log_path = folder / "slot.log"

    def take(self) -> int:
        """A descriptor that holds the lock, to be inherited and closed. Raises BlockingIOError if held."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_held(self) -> bool:
        """Whether a worker, or a child it left behind, holds the lock."""
        try:
            os.close(self.take())
        except BlockingIOError:
            return True
        return False

    def holders(self) -> list[int]:
        """Ids of the processes that hold the lock open, as far as this user may see them."""
        path = str(self.path.resolve())
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has_open(pid, path)]

    def record(self, event: str, pid: int, task: str, attempt: int) -> None:
        """Append one line to `slot.log`; a full disk costs the line, not the worker."""
        line = LockEvent(event=event, pid=pid, task=task, attempt=attempt, at=time.time())
        try:
            with self.log_path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            log.error("slot.log not written", event_name=event, pid=pid, error=str(error))

    def record_missed_release(self) -> None:
        """Log that the lock is free, if the log last said that somebody holds it."""
        try:
            lines = self.log_path.read_bytes().splitlines()
            last = msgspec.json.decode(lines[-1], type=LockEvent) if lines else None
        except (FileNotFoundError, msgspec.DecodeError):
            return
        if last is not None and last.event != "released":
            self.record("released", last.pid, last.task, last.attempt)


def _has_open(pid: int, path: str) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{name}") == path for name in os.listdir(folder))
    except OSError:  # gone meanwhile, or another user's
        return False


def start_time(pid: int) -> int | None:
    """Clock ticks since boot when a process was started: with its id, unique. None = not alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def command_line(pid: int) -> list[str]:
    """A process's arguments; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []
