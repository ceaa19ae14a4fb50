"""Every answer of this gateway: one JSON line each in its own file, and published to subscribers."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec.structs import replace

from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages import BareOffer, Decision, encode

FLUSH_S = 0.5
MOST_WAITING = 100_000  # some 100 MB; more can only accumulate if the disk hangs

log = get_logger()


class DecisionLog:
    """Accept decisions at once and write them after the answer: they explain, the logs in NATS decide."""

    def __init__(self, path: Path) -> None:
        self.lost = 0  # decisions that could not be written
        self._path = path
        self._waiting: list[tuple[Decision, BareOffer]] = []
        self._some = asyncio.Event()

    def add(self, decision: Decision, offer: BareOffer) -> None:
        """Note one decision and its offer, without the data; returns at once."""
        if len(self._waiting) >= MOST_WAITING:
            self._lose(1, "too many decisions are waiting to be written")
            return
        self._waiting.append((decision, offer))
        self._some.set()

    async def run(self, bus: Bus) -> None:
        """Write and publish what was added, a few times a second."""
        while True:
            await self._some.wait()
            await asyncio.sleep(FLUSH_S)
            for task, line in await self.flush():
                await self._publish(bus, task, line)

    async def flush(self) -> list[tuple[str, bytes]]:
        """Write all waiting decisions; return the tasks and each one's line."""
        self._some.clear()
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        lines = [(decision.task, encode(replace(decision, offer=bare(offer)))) for decision, offer in waiting]
        try:
            await asyncio.to_thread(_append, self._path, b"".join(line + b"\n" for _, line in lines))
        except OSError as error:
            self._lose(len(waiting), f"{self._path} can't be written: {error.strerror}")
        return lines

    async def _publish(self, bus: Bus, task: str, line: bytes) -> None:
        try:
            await bus.publish(subjects.decision(task), line)
        except BusError as error:
            log.debug("can't publish a decision", task=task, error=str(error))

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        log.error("decisions lost: not in the gateway's file", lost=count, error=why)


def bare(offer: BareOffer) -> BareOffer:
    """Return an offer without its data."""
    if type(offer) is BareOffer:
        return offer
    return BareOffer(**{name: getattr(offer, name) for name in BareOffer.__struct_fields__})


def _append(path: Path, lines: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(lines)
