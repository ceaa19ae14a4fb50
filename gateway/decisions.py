"""Every answer this gateway gave: one JSON line each in its own file, and said to whoever watches."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec.structs import replace

from shared import subjects
from shared.bus import Bus
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages import BareOffer, Decision, encode

FLUSH_S = 0.5
MOST_WAITING = 100_000  # some 100 MB; more can only wait if the disk stands still

log = get_logger()


class DecisionLog:
    """Takes decisions at once and writes them behind the answer: they explain, the logs in NATS decide."""

    def __init__(self, path: Path) -> None:
        self.lost = 0  # decisions that could not be written
        self._path = path
        self._waiting: list[Decision] = []
        self._some = asyncio.Event()

    def add(self, decision: Decision, offer: BareOffer) -> None:
        """Note one decision with what was offered, without its data; returns at once."""
        if len(self._waiting) >= MOST_WAITING:
            self._lose(1, "too many decisions wait to be written")
            return
        self._waiting.append(replace(decision, offer=bare(offer)))
        self._some.set()

    async def run(self, bus: Bus) -> None:
        """Write and publish what was added, a few times a second."""
        while True:
            await self._some.wait()
            await asyncio.sleep(FLUSH_S)
            for decision in await self.flush():
                await self._say(bus, decision)

    async def flush(self) -> list[Decision]:
        """Write everything that waits; returns it."""
        self._some.clear()
        waiting, self._waiting = self._waiting, []
        lines = b"".join(encode(decision) + b"\n" for decision in waiting)
        if lines:
            try:
                await asyncio.to_thread(_append, self._path, lines)
            except OSError as error:
                self._lose(len(waiting), f"{self._path} can't be written: {error.strerror}")
        return waiting

    async def _say(self, bus: Bus, decision: Decision) -> None:
        try:
            await bus.publish(subjects.decision(decision.task), encode(decision))
        except BusError as error:
            log.debug("a decision was not published", task=decision.task, error=str(error))

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        log.error("decisions are missing in the gateway's file", lost=count, error=why)


def bare(offer: BareOffer) -> BareOffer:
    """An offer without its data."""
    return BareOffer(**{name: getattr(offer, name) for name in BareOffer.__struct_fields__})


def _append(path: Path, lines: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(lines)
