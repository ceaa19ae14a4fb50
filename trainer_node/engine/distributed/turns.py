"""Several processes load one model: rank 0 first, the others together or in turn, as main memory allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shared.planning.hardware import machine_memory
from trainer_node.engine.distributed.process_group import ProcessGroup

MOST_SHARE = 0.5  # of the free main memory: what all processes may take while they load
T = TypeVar("T")


def weighed(load: Callable[[], T]) -> tuple[T, int]:
    """Load; return what was loaded, and the bytes of this process's own memory that it took.

    Files that are mapped are not counted: all processes share them, and they give way to anything else.
    """
    before = _own_bytes()
    loaded = load()
    return loaded, max(0, _own_bytes() - before)


def first_then_others(process_group: ProcessGroup, load: Callable[[], tuple[T, int]]) -> T:
    """Collective: what each process loads. Rank 0 reads the disk, the others what is then in memory.

    `load` also returns the bytes that it takes until it is done. If those of all don't fit in memory
    together, the processes load one after the other.
    """
    if process_group.is_single:
        return load()[0]
    loaded: T | None = None
    size = 0
    if process_group.is_main:
        loaded, size = load()
    together = (process_group.world - 1) * size <= MOST_SHARE * machine_memory()[1]
    (in_turn,) = process_group.broadcast_floats(0.0 if together else 1.0)
    for rank in range(1, process_group.world):
        if rank == process_group.rank:
            loaded, _ = load()
        if in_turn:  # nobody goes on before this one is done
            process_group.broadcast_object(None, source=rank)
    assert loaded is not None
    return loaded


def _own_bytes() -> int:
    """Return this process's anonymous memory; 0 where the system doesn't tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
