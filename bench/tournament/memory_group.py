"""Memory limits by the kernel's control groups, for containers without a container engine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

GROUPS: Final = Path("/sys/fs/cgroup")
UNITS: Final = {"m": 1 << 20, "g": 1 << 30}
MOST_WAIT_S: Final = 5.0  # for the last processes of a group


def in_bytes(size: str) -> int:
    """Return a size as Docker writes it, in bytes."""
    return int(size[:-1]) * UNITS[size[-1]]


@contextmanager
def memory_group(limit: str) -> Iterator[Path]:
    """Make a control group with a limit for the time of a container."""
    first = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if first else GROUPS) / f"podium-contest-{os.getpid()}"
    why = "this fault needs control groups that can be made, or --image"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(f"{why}: {error}") from error
    try:
        try:
            (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(in_bytes(limit)))
        except OSError as error:
            raise SystemExit(f"{why}: {error}") from error
        yield group
    finally:
        until = time.monotonic() + MOST_WAIT_S
        while (group / "cgroup.procs").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        group.rmdir()
