"""The processes that train one model together: who decides, and how values and rows are shared.

Rank 0 decides whatever depends on a clock, a signal or a file, and broadcasts it; everything else follows
from the same plan in every process. So no two ranks can disagree about what comes next.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from shared.clock import Clock, TokenClock
from shared.errors import EngineError, in_a_line
from shared.messages.hardware import Hardware
from shared.messages.runs import ErrorCode

CPU = torch.device("cpu")
SHORTEST_TIMEOUT_S = 600.0
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one model. Every process must call the methods marked *Collective*."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    others: int = 0  # processes of the same job that train something else at the same time

    @property
    def sharers(self) -> int:
        """Return how many processes share the job's memory and disk."""
        return self.world + self.others

    def alone(self) -> ProcessGroup:
        """Return this process as a group of its own, while the others train something else."""
        return ProcessGroup(device=self.device, others=self.sharers - 1)

    @property
    def is_main(self) -> bool:
        """Return whether this process decides, reports and writes files."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Return whether there are no other processes."""
        return self.world == 1

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Collective: the `value` of the rank `source`; the others' values are ignored."""
        if self.is_single:
            return value
        box = [value if self.rank == source else None]
        dist.broadcast_object_list(box, src=source, device=CPU)
        return box[0]  # type: ignore[return-value]

    def gather_objects(self, value: T) -> list[T]:
        """Collective: the `value` of every rank, in their order. Waits for the slowest."""
        if self.is_single:
            return [value]
        return [self.broadcast_object(value, rank) for rank in range(self.world)]

    def raise_in_all(self, error: Exception | None) -> None:
        """Collective: raise the first process's error, if one has any, in all: so none waits for another."""
        for one in self.gather_objects(None if error is None else portable(error)):
            if one is not None:
                raise one from error

    def broadcast_floats(self, *numbers: float) -> tuple[float, ...]:
        """Collective: rank 0's numbers; the one collective of a step besides its gradients, between CPUs."""
        if self.is_single:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return tuple(shared.tolist())

    def total(self, value: Tensor) -> Tensor:
        """Collective: the sum of every process's `value`."""
        if not self.is_single:
            dist.all_reduce(value)
        return value

    def merged(self, values: NDArray[Any]) -> NDArray[Any]:
        """Collective: one array of what each process has filled in, where the others have zeros."""
        return self.total(torch.from_numpy(values)).numpy()

    def share(self, items: Sequence[T]) -> list[tuple[int, T, bool]]:
        """Return this process's items, with their numbers: i * world + rank.

        Every process gets as many, as they compute in step: where the items run out the last one is repeated,
        marked False, and must not count.
        """
        numbers = [turn + self.rank for turn in range(0, len(items), self.world)]
        last = len(items) - 1
        return [(number, items[min(number, last)], number <= last) for number in numbers]


SINGLE_PROCESS = ProcessGroup()


def portable(error: Exception) -> Exception:
    """Return an error as another process can be sent it: without its traceback, with its text at least."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a library's class brings pickle to
        return RuntimeError(in_a_line(error, 500))
    return copy if isinstance(error, type(copy)) and str(copy) == str(error) else RuntimeError(str(error))


@dataclass(frozen=True)
class ProcessGroupClock:
    """Rank 0's clock for all, so that all decide alike by it. All must read it together."""

    clock: Clock
    process_group: ProcessGroup

    def time(self) -> float:
        """Rank 0's time."""
        return self.process_group.broadcast_floats(self.clock.time())[0]

    def advance(self, tokens: int) -> None:
        """Tokens were trained."""
        self.clock.advance(tokens)


def common_clock(clock: Clock, process_group: ProcessGroup) -> Clock:
    """Return the clock of all processes, rank 0's: all must read it together."""
    if process_group.is_single or isinstance(clock, TokenClock):
        return clock
    return ProcessGroupClock(clock, process_group)


class NotMetError(Exception):
    """The processes could not meet: the port was taken, or one did not come. Elsewhere they may."""


def join(hardware: Hardware, left_s: float) -> ProcessGroup:
    """Meet the worker's other processes, as torchrun's environment says; without one there are none.

    Nobody waits for another for longer than the job lasts. Raises EngineError(DEVICE) if there are fewer GPUs
    than processes, NotMetError if they can't meet at that place.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = CPU
    if hardware.device != "cpu":
        seen = torch.cuda.device_count()
        if seen < world or not seen:
            raise EngineError(
                ErrorCode.DEVICE, f"torch sees {seen} GPUs, but this slot has {world} of {hardware.name}"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=max(SHORTEST_TIMEOUT_S, left_s))
        try:
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
        except dist.DistError as error:
            raise NotMetError(str(error)) from error
    return ProcessGroup(rank, world, device)


def least_free_memory(process_group: ProcessGroup) -> int | None:
    """Collective: bytes that are free on the GPU with the least; None on a CPU.

    On one that is shared, or a slice of one (MIG), that is less than nvidia-smi states.
    """
    if process_group.device.type != "cuda":
        return None
    free = np.zeros(process_group.world, dtype=np.int64)
    free[process_group.rank] = torch.cuda.mem_get_info(process_group.device)[0]
    return int(process_group.merged(free).min())


def destroy(process_group: ProcessGroup) -> None:
    """Collective: leave the group, without a complaint from the library."""
    if not process_group.is_single:
        dist.destroy_process_group()


def is_lost_peer(error: Exception) -> bool:
    """Return whether an error says that another process is gone, or too late for a collective."""
    if not dist.is_initialized():
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "nccl", "by peer"))
    )
