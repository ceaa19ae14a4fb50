"""How full JOBS and STATE are: nothing is accepted whose records might not be stored."""

from __future__ import annotations

import asyncio
from typing import Final

from shared import subjects
from shared.broker.bus import Bus
from shared.broker.streams import StreamInfo, find_stream
from shared.errors import BusError
from shared.logs import get_logger

READ_S: Final = 5.0
FULL: Final = 0.95  # of the limit: the rest, 50 MB of 1 GiB, is for the records of jobs that run

log = get_logger()


class LogRoom:
    """Reads both logs' sizes now and then; `full` says which one is too full for another job."""

    def __init__(self) -> None:
        self.full: str | None = None

    async def run(self, bus: Bus) -> None:
        """Read until cancelled. While the broker doesn't answer, what was found last stays."""
        while True:
            try:
                found = [await fullness(bus, name) for name in (subjects.STATE_STREAM, subjects.JOBS_STREAM)]
            except BusError as error:
                log.debug("can't read how full the logs are", error=str(error))
            else:
                full = next(filter(None, found), None)
                if full and not self.full:
                    log.error("no offer is accepted", cause=full)
                elif self.full and not full:
                    log.info("the logs have room again")
                self.full = full
            await asyncio.sleep(READ_S)


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
