"""What a part of a run may take at most: memory, and time in silence.

Data, chat templates and tokenizers come from strangers. A small file can unpack to more than the machine
holds, and a template can loop for ever: both must end one job, and nothing else.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from trainer_node.engine.reporter import Reporter

SPARE = 16 << 20  # bytes that a library may take besides what is known: threads, buffers
LOOK_S = 1.0  # between two looks at a reporter
STATUS = Path("/proc/self/status")


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Inside, this process may take so many further bytes; then Python raises MemoryError.

    Libraries in Rust and C may end the process instead: call `require_memory` or `has_memory` before them.
    What is mapped but not written, as CUDA's address space, isn't counted.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = [data_bytes() + more, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def require_memory(size: int) -> None:
    """Raise MemoryError if the limit leaves less than so many bytes, and some to spare."""
    if not has_memory(size):
        raise MemoryError(f"{size} bytes are needed, more than the limit leaves")


def has_memory(size: int) -> bool:
    """Return whether the limit leaves so many bytes, and some to spare."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return limit == resource.RLIM_INFINITY or data_bytes() + size + SPARE <= limit


def data_bytes(status: Path = STATUS) -> int:
    """Return what counts towards the limit now. Raises OSError where the system doesn't report it."""
    for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmData":
            return int(value.split()[0]) * 1024
    raise OSError(f"{status} lacks VmData")


@contextmanager
def silence_limit(reporter: Reporter, seconds: float, expired: Callable[[], None]) -> Iterator[None]:
    """Inside, a reporter must say something every so often; if it doesn't, `expired` is called in a thread.

    Code that loops can't be ended from outside: `expired` has to end the process.
    """
    over = Event()

    def watch() -> None:
        while not over.wait(min(LOOK_S, seconds)):
            if reporter.silent_s > seconds:
                expired()
                return

    watcher = Thread(target=watch, name="silence", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
