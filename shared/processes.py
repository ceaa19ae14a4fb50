"""Processes of this machine: what /proc tells about one, and how to end one."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

PARENT: Final = "PODIUM_PARENT"  # environment: the process that this one must not outlive
END_S: Final = 2.0  # a killed process ends at once, unless it is inside a system call that hangs


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot: unique with its id. None if not alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def command_line(pid: int) -> list[str]:
    """Return a process's arguments; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


async def kill(process: asyncio.subprocess.Process, *, group: bool = False, end_s: float = END_S) -> bool:
    """Kill a process, or all of its group, and wait for its end; return False if it hasn't ended in time.

    The kernel ends a process only after its system call. In a driver or on a disk that hangs that can take
    for ever, and the caller must not hang with it.
    """
    with suppress(ProcessLookupError):
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    try:
        async with asyncio.timeout(end_s):
            await process.wait()
    except TimeoutError:
        return False
    return True
