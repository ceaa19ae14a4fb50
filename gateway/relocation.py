"""Move jobs that no node claims to a free, live slot: a slot that is down must not cost its job.

The first record of the old slot's chain is the fence: `moved`, written by compare-and-set, so either it or a
node's claim is there. Only then is the job stored for the new slot, once, by compare-and-set in JOBS. If a
gateway is killed in between, the job is off its slot, and any gateway finishes the move.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

from gateway.admission import Admission
from gateway.policy.house import free_slot
from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from gateway.telemetry.counters import Measures
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError, ConflictError, StoreFullError
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.jobs import Job, Moved
from shared.settings import Settings

CHECK_S = 5.0

log = get_logger()


class Waiting:
    """Since when this process has seen each unclaimed job: a new gateway gives nodes their time, too."""

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._since: dict[str, float] = {}  # by record id

    def too_long(self, unclaimed: list[Job]) -> list[Job]:
        """Return those of the unclaimed jobs that have waited for `patience_s`; forget all others."""
        now = self._clock()
        self._since = {job.record_id: self._since.get(job.record_id, now) for job in unclaimed}
        return [job for job in unclaimed if now - self._since[job.record_id] >= self._patience_s]

    def start_over(self) -> None:
        """Count from now: while the broker is away no node can claim."""
        self._since = {}


class Relocation:
    """Move unclaimed jobs one by one."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        ledger: Ledger,
        reader: LogReader,
        admission: Admission,
        measures: Measures,
    ) -> None:
        self._gateway = settings.gateway_name
        self._patience_s = settings.unclaimed_s
        self._bus = bus
        self._ledger = ledger
        self._reader = reader
        self._admission = admission
        self._measures = measures
        self._waiting = Waiting(settings.unclaimed_s)

    async def run(self) -> None:
        """Check every few seconds, for ever."""
        while True:
            await asyncio.sleep(min(CHECK_S, self._patience_s / 4))
            try:
                await self._reader.catch_up()
                unclaimed = self._ledger.unclaimed()
                fenced = [job for job in unclaimed if self._ledger.chain_of(job).moved is not None]
                for job in [*fenced, *self._waiting.too_long(unclaimed)]:
                    await self._move(job)
            except BusError as error:
                self._waiting.start_over()
                log.warning("can't move unclaimed jobs, retrying", error=str(error))

    async def _move(self, job: Job) -> None:
        if free_slot(self._admission.views.now()) is None:
            return
        if self._ledger.chain_of(job).moved is None and not await self._fence(job):
            return
        moved = await self._admission.move(job.task)
        if moved is not None:
            self._measures.moved_jobs += 1
            log.warning("job moved: no node claimed it", task=job.task, slot=moved.slot, moved_from=job.slot)

    async def _fence(self, job: Job) -> bool:
        """Close the old slot's chain to its nodes; False if one of them claimed the job first."""
        record = Moved(
            record_id=uuid.uuid4().hex,
            task=job.task,
            slot=job.slot,
            gateway=self._gateway,
            reason=f"no node claimed it for {self._patience_s:g} s",
            at=time.time(),
        )
        subject = subjects.state(job.slot, job.task)
        try:
            await self._bus.append(
                subjects.state_stream(job.slot), subject, encode(record), last_on_subject=0
            )
        except ConflictError:
            log.info("job not moved: its node wrote first", task=job.task, slot=job.slot)
            return False
        except StoreFullError as error:  # only this slot's: the others' jobs must still move
            log.error("job not moved: its slot's log is full", task=job.task, slot=job.slot, error=str(error))
            return False
        await self._reader.catch_up()
        return True
