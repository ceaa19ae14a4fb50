"""When this container started: its time began then, not when Python had loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

MOST_AGE_S = 600.0  # an older process is not the container's first one, or the clocks don't fit together


def age_from(stat: str, ticks_per_s: int, boot_s: float) -> float | None:
    """Return a process's age in seconds from its line in /proc, or None if that can't be so."""
    try:
        started = int(stat.rpartition(")")[2].split()[19]) / ticks_per_s
    except (IndexError, ValueError):
        return None
    age = boot_s - started
    return age if 0.0 <= age <= MOST_AGE_S else None


def started_at() -> float:
    """Return when this process was started, in Unix seconds; it is the container's entrypoint."""
    now = time.time()
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return now
    age = age_from(stat, os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME))
    return now - (age or 0.0)
