"""How full the logs are: nothing is accepted whose records might not be stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from shared import subjects
from shared.broker.bus import Bus
from shared.broker.stream_requests import StreamInfo, find_stream
from shared.errors import BusError
from shared.logs import get_logger

READ_S: Final = 5.0
FULL: Final = 0.95  # of the limit: the rest, 50 MB of 1 GiB, is for the records of jobs that run

log = get_logger()


class LogRoom:
    """Reads the logs' sizes now and then.

    `full` says how full JOBS is, if it is too full for another job; `full_slots` the same of slots' logs.
    """

    def __init__(self, slots: Iterable[str]) -> None:
        self.full: str | None = None
        self.full_slots: dict[str, str] = {}
        self._slots = tuple(slots)

    async def run(self, bus: Bus) -> None:
        """Read until cancelled. While the broker doesn't answer, what was found last stays."""
        while True:
            for slot in (None, *self._slots):
                name = subjects.JOBS_STREAM if slot is None else subjects.state_stream(slot)
                try:
                    full = await fullness(bus, name)
                except BusError as error:
                    log.debug("can't read how full a log is", stream=name, error=str(error))
                else:
                    self._note(name, slot, full)
            await asyncio.sleep(READ_S)

    def _note(self, name: str, slot: str | None, full: str | None) -> None:
        """Note how full JOBS is, or the log of a slot."""
        before = self.full if slot is None else self.full_slots.get(slot)
        if slot is None:
            self.full = full
        else:
            known = {other: cause for other, cause in self.full_slots.items() if other != slot}
            self.full_slots = known if full is None else known | {slot: full}
        if full and not before:
            log.error("no offer is accepted" if slot is None else f"no offer for slot {slot}", cause=full)
        if before and not full:
            log.info("a log has room again", stream=name)


async def fullness(bus: Bus, name: str) -> str | None:
    """Return how full a log is, if it is too full. Raises BusError."""
    info = await find_stream(bus, name)
    return None if info is None else how_full(name, info)


def how_full(name: str, info: StreamInfo) -> str | None:
    """Return how full a log is, if it is too full."""
    limit = info.config.get("max_bytes", -1)
    if limit <= 0 or info.bytes < FULL * limit:
        return None
    return in_words(name, info.bytes, limit)


def in_words(name: str, used: int, limit: int) -> str:
    """Return how full something is, both in bytes."""
    return f"{name} is {used / limit:.0%} full ({used >> 20} of {limit >> 20} MiB)"
