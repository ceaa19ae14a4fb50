"""Read the progress that runs published while this gateway did not listen: at its start, and after a break.

The broker keeps the newest thousand messages of each run in memory, some ten minutes of training. So a
gateway that restarts has no gap in its curves; a broker or a node that was down leaves one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Final

from gateway.telemetry.run_history import RunHistory
from shared import subjects
from shared.aio import pause
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import TroubleLog, get_logger
from shared.messages import Progress, decode_progress

RETRY_S: Final = 5.0

log = get_logger()


async def fill_for_ever(bus: Bus, runs: RunHistory) -> None:
    """Fill the history now and after each reconnect; until cancelled."""
    again, trouble = asyncio.Event(), TroubleLog()
    bus.on_reconnect(again.set)
    while True:
        again.clear()
        try:
            await runs.fill(await kept_progress(bus))
            trouble.over()
            await again.wait()
        except (BusError, OSError) as error:
            if trouble.is_new(error):
                log.warning("progress of before is not read yet", error=str(error))
            await pause(RETRY_S, again)


async def kept_progress(bus: Bus) -> dict[str, list[Progress]]:
    """Return what the broker still has, by task. Raises BusError."""
    found = defaultdict[str, list[Progress]](list)
    async for records in bus.read_all(subjects.PROGRESS_STREAM):
        for record in records:
            try:
                progress = decode_progress(record.data)
            except ValueError:  # counted when it was received, if it was
                continue
            found[progress.task].append(progress)
        await asyncio.sleep(0)  # some ten thousand messages must not delay an offer
    return found
