"""Why a worker exited without writing outcome.json: a code, and a sentence for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from shared.messages.runs import ErrorCode

FULL_BYTES: Final = 64 << 10  # with less than this free a worker could not even write its outcome
KILLED: Final = frozenset({None, -9, 137})  # exit codes that a SIGKILL may leave; None = not our child

# What the runtimes say last, when they end a process without asking Python.
_WORDS: Final = (
    (
        re.compile(
            r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|std::bad_alloc"
            r"|memory allocation of \d+ bytes failed"
        ),
        ErrorCode.OUT_OF_MEMORY,
    ),
    (re.compile(r"No space left on device|Disk quota exceeded"), ErrorCode.DISK_FULL),
    (re.compile(r"CUDA error|CUDA driver error|NCCL error|CUBLAS_STATUS|AcceleratorError"), ErrorCode.DEVICE),
)


class Failure(Struct, frozen=True):
    """Why a worker's end counts against the limit of attempts."""

    text: str
    code: ErrorCode = ErrorCode.INTERNAL


def explain(manner: str, last_line: str | None, *, out_of_memory: bool, free_bytes: int) -> Failure:
    """Judge an end by what the kernel counted, then by the worker's last line, then by the disk."""
    if out_of_memory:
        return Failure(f"{manner}: the kernel's out-of-memory killer ended it", ErrorCode.OUT_OF_MEMORY)
    said = last_line or ""
    for words, code in _WORDS:
        if words.search(said):
            return Failure(f"{manner}: {said}", code)
    if free_bytes < FULL_BYTES:
        return Failure(
            f"{manner}: {said or 'its log is empty'}; the disk is full (No space left on device)",
            ErrorCode.DISK_FULL,
        )
    return Failure(f"{manner}: {said or 'its log is empty'}")


def out_of_memory_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel killed because memory ran out: in this control group, else on this
    machine.

    A container or unit is a group of its own, so the other slot's kills are not counted there.
    """
    for path in _counters(root):
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


def _counters(root: Path) -> list[Path]:
    """Return where the counter may be, narrowest first; inside a container a group is its own root."""
    groups = root / "sys/fs/cgroup"
    own = {"": "", "memory": ""}
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in own:
                own[controllers] = path.lstrip("/")
    except OSError:  # no such file system
        pass
    return [
        groups / own[""] / "memory.events",
        groups / "memory.events",
        groups / "memory" / own["memory"] / "memory.oom_control",
        groups / "memory" / "memory.oom_control",
        root / "proc/vmstat",
    ]
