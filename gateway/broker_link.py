"""Connect to the broker, retrying forever. If the connection closes for good, the gateway exits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.state.mirror import LostRecordsError, Mirror
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import GATEWAY
from shared.broker.streams import ready
from shared.errors import BusTimeoutError, BusUnavailableError
from shared.logs import get_logger
from shared.settings import Settings

RETRY_S = 1.0
LOST_S = 2.0  # between two checks whether the lost records were restored
log = get_logger()


async def reach(settings: Settings, mirror: Mirror, report_lost: Callable[[str | None], None]) -> Bus:
    """Connect and make the streams ready, retrying forever: services may start in any order.

    `report_lost` gets the records that the mirror has and the broker lost, and None once they are restored.
    """
    lost = None
    while True:
        try:
            bus = await connect(settings, name=f"gateway {settings.gateway_name}", user=GATEWAY)
        except BusUnavailableError as error:
            log.warning(str(error))
            await asyncio.sleep(RETRY_S)
            continue
        try:
            await ready(bus, settings, _needed(settings))
            await _begin(mirror, bus)
        except LostRecordsError as error:
            if lost is None:
                log.error(str(error))
            lost = str(error)
            report_lost(lost)
            await bus.close()
            await asyncio.sleep(LOST_S)
        except (BusUnavailableError, BusTimeoutError) as error:
            log.warning("JetStream is not usable yet", error=str(error))
            await bus.close()
            await asyncio.sleep(RETRY_S)
        except BaseException:
            await bus.close()
            raise
        else:
            report_lost(None)
            return bus


async def end_with(bus: Bus) -> None:
    """Wait until the connection is closed for good, then raise why."""
    await bus.closed.wait()
    raise bus.why_closed()


def _needed(settings: Settings) -> list[tuple[str, str]]:
    """Return the subjects that every gateway reads."""
    return [
        (subjects.JOBS_STREAM, subjects.ANY_JOB),
        *((subjects.state_stream(slot), subjects.states_of_slot(slot)) for slot in settings.slots),
        (subjects.LEASES_STREAM, subjects.ANY_LEASE),
    ]


async def _begin(mirror: Mirror, bus: Bus) -> None:
    """Begin the mirror. A gateway that can't write its mirror still decides."""
    try:
        await mirror.begin(bus)
    except OSError as error:
        mirror.fail(error)
