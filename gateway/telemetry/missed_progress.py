"""Read the progress that runs published while this gateway did not listen: at its start, and after a break.

The broker keeps the newest thousand messages of each run in memory, some ten minutes of training. So a
gateway that restarts has no gap in its curves; a broker or a node that was down leaves one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final

from gateway.state.presence import progress_in
from gateway.telemetry.run_history import RunHistory
from shared import subjects
from shared.aio import pause
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import TroubleLog, get_logger
from shared.messages.runs import Progress

RETRY_S: Final = 5.0

log = get_logger()


async def fill_for_ever(
    bus: Bus,
    runs: RunHistory,
    catch_up: Callable[[], Awaitable[None]],
    slot_of: Callable[[str], str | None],
) -> None:
    """Fill the history now and after each reconnect, when the jobs are known; until cancelled."""
    again, trouble = asyncio.Event(), TroubleLog()
    bus.on_reconnect(again.set)
    while True:
        again.clear()
        try:
            await catch_up()
            await runs.fill(await kept_progress(bus, slot_of))
            trouble.over()
            await again.wait()
        except (BusError, OSError) as error:
            if trouble.is_new(error):
                log.warning("can't read missed progress, retrying", error=str(error))
            await pause(RETRY_S, again)


async def kept_progress(bus: Bus, slot_of: Callable[[str], str | None]) -> dict[str, list[Progress]]:
    """Return what the broker still has of jobs, by task. Raises BusError."""
    found = defaultdict[str, list[Progress]](list)
    async for records in bus.read_all(subjects.PROGRESS_STREAM):
        for record in records:
            try:
                progress = progress_in(record.subject, record.data, slot_of)
            except ValueError:  # counted when it was received, if it was
                continue
            if progress is not None:
                found[progress.task].append(progress)
        await asyncio.sleep(0)  # some ten thousand messages must not delay an offer
    return found
