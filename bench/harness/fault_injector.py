"""Faults: draw, inject and record them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from bench.harness.fleet import NODES, Fleet
from shared.processes import start_time

STOPPED_AT_ONCE = 3  # more, and the fleet stands still instead of being disturbed
STOP_S = (0.5, 12.0)  # a stopped process comes back beyond the lease's time to live, often enough
# Relative frequencies. `all` = every service at the same moment, workers too.
FAULTS = {
    ("kill", "broker"): 10,
    ("stop", "broker"): 4,
    ("term", "broker"): 2,
    ("kill", "gateway"): 10,
    ("stop", "gateway"): 6,
    ("term", "gateway"): 3,
    ("kill", "node"): 20,
    ("stop", "node"): 12,
    ("term", "node"): 6,
    ("kill", "worker"): 16,
    ("stop", "worker"): 8,
    ("kill", "all"): 2,
}


class Fault(Struct, frozen=True, kw_only=True):
    """One line of faults.jsonl."""

    what: str  # kill, stop, term
    whom: str
    pid: int
    at: float
    seconds: float = 0.0  # of a stop
    task: str = ""  # of a worker
    worker: int = 0  # of a node: its worker's process id when it was hit

    @property
    def kind(self) -> str:
        """Return the name under which it is counted: `kill broker`, `stop node-a`."""
        return f"{self.what} {self.whom}"


class Injector:
    """Draws faults and does them."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self.fleet = fleet
        self.chance = chance
        self.done: list[Fault] = []
        self.all_at_once = 0  # times; each hit counts for itself in `done`
        self._journal = fleet.folder / "faults.jsonl"
        self._stopped: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        """Faults so far."""
        return len(self.done)

    def by_kind(self) -> dict[str, int]:
        """Return the counts by kind."""
        return dict(sorted(Counter(fault.kind for fault in self.done).items()))

    async def run(self, mean_gap_s: float, may: Callable[[], bool]) -> None:
        """Inject one fault after another at random times, forever; none while not `may()`."""
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / mean_gap_s))
            if may():
                self.one()

    async def settle(self) -> None:
        """Let everything that is stopped go on."""
        for task in self._stopped:
            task.cancel()
        await asyncio.gather(*self._stopped, return_exceptions=True)
        self.fleet.wake_all()

    def one(self) -> None:
        """Inject one fault; nothing happens if the victim that was drawn isn't there."""
        what, kind = self.chance.choices(list(FAULTS), weights=list(FAULTS.values()))[0]
        if kind == "all":
            self.all_at_once += 1
            for name in self.fleet.members:
                self._hit_member(what, name)
            for node in self.fleet.nodes:
                self._hit_worker(what, node)
        elif kind == "worker":
            self._hit_worker(what, self.chance.choice(list(self.fleet.nodes)))
        else:
            victims = [name for name in self.fleet.members if _is(name, kind)]
            self._hit_member(what, self.chance.choice(victims))

    def _hit_member(self, what: str, name: str) -> None:
        member = self.fleet.members[name]
        pid = member.pid
        if pid is None:
            return
        worker = self.fleet.worker(name) if name in self.fleet.nodes else None
        fault = Fault(what=what, whom=name, pid=pid, at=time.time(), worker=worker.pid if worker else 0)
        member.expected = member.expected or what != "stop"
        self._hit(fault, lambda: member.pid == pid)

    def _hit_worker(self, what: str, node: str) -> None:
        worker = self.fleet.worker(node)
        if worker is None:
            return
        fault = Fault(
            what=what,
            whom=f"worker-{self.fleet.nodes[node]}",
            pid=worker.pid,
            at=time.time(),
            task=worker.task,
        )
        self._hit(fault, lambda: start_time(worker.pid) == worker.start_time)

    def _hit(self, fault: Fault, is_there: Callable[[], bool]) -> None:
        if fault.what == "stop":
            if len(self._stopped) >= STOPPED_AT_ONCE:
                return
            low, high = STOP_S
            fault = msgspec.structs.replace(fault, seconds=low * (high / low) ** self.chance.random())
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[fault.what]
        try:
            os.kill(fault.pid, number)
        except ProcessLookupError:
            return
        self.done.append(fault)
        with self._journal.open("ab") as file:
            file.write(msgspec.json.encode(fault) + b"\n")
        if fault.what == "stop":
            task = asyncio.create_task(_go_on(fault, is_there))
            self._stopped.add(task)
            task.add_done_callback(self._stopped.discard)


def read_faults(folder: Path) -> list[Fault]:
    """Read the journal of a run."""
    lines = (folder / "faults.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Fault) for line in lines]


async def _go_on(fault: Fault, is_there: Callable[[], bool]) -> None:
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        if is_there():
            with suppress(ProcessLookupError):
                os.kill(fault.pid, signal.SIGCONT)


def _is(name: str, kind: str) -> bool:
    if kind == "node":
        return name in NODES
    return name == kind or name.startswith(kind + "-")
