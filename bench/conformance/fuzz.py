"""Check that no HTTP input makes the gateway fail: broken messages, and bytes that are not HTTP.

    python -m bench fuzz [--count 100000] [--seed 0]     # about 3 minutes

A real broker, gateways that require signatures, nodes with scripted workers. Most requests are messages of
the protocol with a few errors (bench/conformance/fuzz_messages.py), correctly signed, over keep-alive
connections, on every endpoint of upstream and of /v1. Ids repeat, so that tasks are offered, started,
cancelled and read in any order. One in fifty is malformed HTTP (bench/conformance/fuzz_bytes.py). The fleet
is healthy, so a 503 counts like any other 5xx. Failures are: a 5xx, no response to a complete request, an
exit of a gateway, an exception in its log, growing memory. Memory is the mean of each quarter of the
requests. In the first two quarters it fills bounded stores: the event ring (16 MB) and the nonces of the
last minutes (about 70 bytes each). From the third to the fourth it must be flat. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import select
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.conformance import fuzz_bytes
from bench.conformance.fuzz_messages import Mutator, Request
from bench.harness.fleet import GATEWAYS, Fleet
from bench.harness.http_load_client import Connection
from bench.harness.signed_fleet import make_fleet, scripted_data, started
from shared.logs import set_up_logs

CONNECTIONS = 8
RAW_EVERY = 50
RAW_AT_ONCE = 8
PATIENCE_S = 10.0
TELL_S = 15.0
GROWTH_LIMIT_MB = 48.0  # from the first quarter to the last
FLAT_MB = 4.0  # from the third to the last
SAMPLES = 200  # of memory
SHOWN = 10
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


class Fuzz:
    """One gateway under fire; runs in a thread of its own."""

    def __init__(self, port: int, pid: int, count: int, seed: int) -> None:
        self.port = port
        self.pid = pid
        self.count = count
        self.mutator = Mutator(random.Random(seed))
        self.chance = random.Random(seed + 1)
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self.memory: list[float] = []
        self.sent = 0
        self._poll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._pending: dict[int, Request] = {}
        self._before: dict[int, Request] = {}  # on the same connection
        self._reported_at = time.monotonic()

    def run(self) -> None:
        """Send all requests over a few connections, each reused."""
        for _ in range(CONNECTIONS):
            self._next(self._open())
        while self._pending:
            ready = self._poll.poll(PATIENCE_S)
            if not ready:
                self.failures += [f"no answer: {request.data[:300]!r}" for request in self._pending.values()]
                return
            for descriptor, _ in ready:
                if descriptor in self._connections:
                    self._receive(descriptor)
        self._poll.close()

    def run_raw(self, count: int) -> None:
        """Send malformed HTTP, each case on its own connection."""
        for _ in range(count):
            case = fuzz_bytes.make(self.chance)
            statuses = fuzz_bytes.attempt(self.port, case)
            self._note(statuses, case.name)
            if case.answers is not None and len(statuses) < case.answers:
                self.failures.append(f"{case.name}: {len(statuses)} of {case.answers} answers")

    def _open(self) -> int:
        connection = Connection(self.port)
        descriptor = connection.socket.fileno()
        self._connections[descriptor] = connection
        self._poll.register(descriptor, select.EPOLLIN)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._before.pop(descriptor, None)
        self._connections.pop(descriptor).socket.close()

    def _next(self, descriptor: int) -> None:
        if self.sent >= self.count:
            self._close(descriptor)
            return
        request = self.mutator.next()
        self.sent += 1
        self._sample()
        self._pending[descriptor] = request
        try:
            self._connections[descriptor].send(request.data)
        except OSError as error:
            self._broken(descriptor, error)

    def _receive(self, descriptor: int) -> None:
        try:
            answer = self._connections[descriptor].receive()
        except OSError as error:
            self._broken(descriptor, error)
            return
        if answer is None:
            return
        request = self._before[descriptor] = self._pending.pop(descriptor)
        head = answer.partition(b"\r\n\r\n")[0]
        self._note([int(answer[9:12])], request.data[:300].decode("latin-1"), answer)
        if b"connection: close" in head.lower() or head.startswith(b"HTTP/1.0"):
            self._close(descriptor)
            descriptor = self._open()
        self._next(descriptor)

    def _broken(self, descriptor: int, error: OSError) -> None:
        request = self._pending.pop(descriptor)
        before = self._before.pop(descriptor, None)
        after = before.data[:500] if before else b"nothing"
        self.failures.append(f"{error!r} instead of an answer to {request.data[:300]!r}, after {after!r}")
        self._close(descriptor)
        self._next(self._open())

    def _note(self, statuses: list[int], what: str, answer: bytes = b"") -> None:
        self.statuses.update(statuses)
        if bad := [status for status in statuses if status >= 500]:
            self.failures.append(f"{bad} to {what} {answer[-300:]!r}")

    def _sample(self) -> None:
        if self.sent % max(1, self.count // SAMPLES) == 0:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            self.memory.append(pages * PAGE_MB)
        if time.monotonic() - self._reported_at > TELL_S:
            self._reported_at = time.monotonic()
            print(f"{self.sent} sent, {len(self.failures)} failures, {self.memory[-1]:.0f} MB", flush=True)

    def quarters_mb(self) -> list[float]:
        """Return the mean of memory in each quarter of the requests."""
        size = max(1, len(self.memory) // 4)
        return [round(statistics.mean(self.memory[part * size :][:size]), 1) for part in range(4)]


async def measure(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Start a fleet, send all requests, return the figures."""
    fleet = make_fleet(folder)
    async with started(fleet):
        scripted_data(folder, "data.json", steps=2, step_s=0.02)
        gateway = fleet.members[GATEWAYS[0]]
        pid, port = gateway.pid, int(fleet.url(GATEWAYS[0]).rpartition(":")[2])
        if pid is None:
            raise SystemExit("the gateway does not run")
        fuzz = Fuzz(port, pid, count, seed)
        raw = [Fuzz(port, pid, 0, seed + 2 + number) for number in range(RAW_AT_ONCE)]
        each = max(1, count // RAW_EVERY // RAW_AT_ONCE)
        await asyncio.gather(
            asyncio.to_thread(fuzz.run), *(asyncio.to_thread(one.run_raw, each) for one in raw)
        )
        crashes = sum(len(fleet.members[name].own_ends) for name in GATEWAYS)
        alive = gateway.pid == pid
    parts = [fuzz, *raw]
    statuses = sum((one.statuses for one in parts), Counter[int]())
    failures = [failure for one in parts for failure in one.failures]
    quarters = fuzz.quarters_mb()
    return {
        "requests": fuzz.sent + each * RAW_AT_ONCE,
        "answers": statuses.total(),
        "answers_5xx": sum(number for status, number in statuses.items() if status >= 500),
        "failures": failures,
        "crashes": crashes + (not alive),
        "exceptions_logged": exceptions(fleet),
        "rss_growth_mb": round(quarters[3] - quarters[0], 1),
        "rss_growth_late_mb": round(quarters[3] - quarters[2], 1),
        "rss_quarters_mb": quarters,
        "by_status": {str(status): number for status, number in sorted(statuses.items())},
    }


def exceptions(fleet: Fleet) -> int:
    """Tracebacks in the gateways' logs."""
    return sum(count for name, count in fleet.tracebacks().items() if name in GATEWAYS)


def main() -> int:
    """Run, print, fail on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, default=100_000, help="messages, plus a fiftieth as many of raw bytes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary one)")
    args = parser.parse_args()
    set_up_logs("console", "error", service="bench")
    with tempfile.TemporaryDirectory(prefix="podium-fuzz-") as temporary:
        folder = args.folder or Path(temporary)
        figures = asyncio.run(measure(folder, args.count, args.seed))
    failures = figures.pop("failures")
    for failure in failures[:SHOWN]:
        print("FAILURE", failure)
    print(json.dumps(figures | {"failures": len(failures)}))
    grew = figures["rss_growth_mb"] > GROWTH_LIMIT_MB or figures["rss_growth_late_mb"] > FLAT_MB
    return 1 if failures or figures["crashes"] or figures["exceptions_logged"] or grew else 0


if __name__ == "__main__":
    sys.exit(main())
