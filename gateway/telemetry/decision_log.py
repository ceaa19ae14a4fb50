"""Every answer of this gateway: one JSON line each in its own file, and published to subscribers."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from gateway.views.schemas import DecisionPage
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.files import append_lines
from shared.logs import get_logger
from shared.messages.encoding import decoder, encode
from shared.messages.offers import BareOffer, Decision

FLUSH_S = 0.5
BLOCK = 64 << 10
MOST_WAITING = 100_000  # some 100 MB; more can only accumulate if the disk hangs

log = get_logger()
_decode = decoder(Decision)


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

    def read_page(self, limit: int, before: int | None = None) -> DecisionPage:
        """Return the newest decisions that end at byte `before` of the file, newest first. Blocks."""
        try:
            with self._path.open("rb") as file:
                end = file.seek(0, os.SEEK_END) if before is None else before
                return _page_before(file, end, limit)
        except FileNotFoundError:
            return DecisionPage([], None)

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


def _page_before(file: BinaryIO, end: int, limit: int) -> DecisionPage:
    """Read backwards, block by block, until there are enough whole lines."""
    start, data = end, b""
    while start > 0 and data.count(b"\n") <= limit:
        step = min(BLOCK, start)
        start -= step
        file.seek(start)
        data = file.read(step) + data
    if start > 0:  # the first line may be cut
        cut = data.index(b"\n") + 1
        start, data = start + cut, data[cut:]
    found: list[Decision] = []
    for line in reversed(data.splitlines(keepends=True)):
        if len(found) == limit:
            break
        end -= len(line)
        with suppress(ValueError):  # cut off by a crash: not a decision
            found.append(_decode(line))
    return DecisionPage(found, end if end > 0 else None)


def bare(offer: BareOffer) -> BareOffer:
    """Return an offer without its data."""
    if type(offer) is BareOffer:
        return offer
    return BareOffer(**{name: getattr(offer, name) for name in BareOffer.__struct_fields__})


def _append(path: Path, lines: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        append_lines(file.fileno(), lines)
