"""Append to JOBS: one record at a time, each made from the newest state of the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from shared import subjects
from shared.broker.bus import Bus, Record
from shared.errors import BusError, BusTimeoutError, BusUnavailableError, ConflictError
from shared.messages.encoding import encode
from shared.messages.jobs import Job, JobRecord, SlotDrain

JOBS = subjects.JOBS_STREAM
APPEND_TIMEOUT_S = 0.9
STORE_TRIES = 8  # each lost to another gateway's job, of which a fleet stores one per free slot

T = TypeVar("T")


class JobsWriter:
    """The only writer of jobs and reservations in this gateway; the compare-and-set is between gateways."""

    def __init__(self, bus: Bus, ledger: Ledger, log_reader: LogReader) -> None:
        self._bus = bus
        self._ledger = ledger
        self._log_reader = log_reader
        self._storing: asyncio.Future[None] | None = None  # done when the record being stored is stored

    @property
    def idle(self) -> bool:
        """Return whether nothing is being stored."""
        return self._storing is None

    async def wait(self) -> None:
        """Return when the record that is being stored now is stored or refused."""
        if self._storing is not None:
            await asyncio.shield(self._storing)

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the right to store; enters without a pause if `idle`."""
        while not self.idle:
            await self.wait()
        done = self._storing = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            self._storing = None
            done.set_result(None)

    async def store(self, make: Callable[[], tuple[JobRecord | SlotDrain | None, T]]) -> T:
        """Append the record that `make` returns, if any; return the answer that it returns with it.

        Both are made again until the log's end is the one they were made on. Without a record nothing is
        stored, for instance because the task is there already. Raises BusError: then it may be stored.
        """
        made: tuple[JobRecord | SlotDrain | None, T] | None = None
        expected = -1
        cause: BusError | None = None
        for _ in range(STORE_TRIES):
            if made is None or expected != self._ledger.folded[JOBS]:
                # A record sent for an older end of the log can't be stored any more: decide again. While the
                # end is the same, a record whose answer was lost may still be stored: resend it unchanged.
                made, expected = make(), self._ledger.folded[JOBS]
            record, answer = made
            if record is None:
                return answer
            try:
                await self._append(record, expected)
            except (ConflictError, BusTimeoutError) as error:
                cause = error
                await self._log_reader.catch_up()
                continue
            return answer
        raise BusUnavailableError(
            f"the record could not be stored in {STORE_TRIES} tries: {cause}"
        ) from cause

    async def _append(self, record: JobRecord | SlotDrain, expected: int) -> None:
        """Store one record if JOBS still ends at `expected`; a job also only as the task's next one."""
        known, pattern, data = None, None, encode(record)
        if isinstance(record, SlotDrain):
            subject = subjects.drain(record.slot)
        elif isinstance(record, Job):
            known = self._ledger.task(record.task)
            subject, pattern = subjects.job(record.slot, record.task), subjects.job_on_any_slot(record.task)
        else:
            subject = subjects.reservation(record.slot, record.task)
        sequence = await self._bus.append(
            JOBS,
            subject,
            data,
            last=expected,
            last_on_subject=None if pattern is None else known.job_sequence if known is not None else 0,
            pattern=pattern,
            timeout_s=APPEND_TIMEOUT_S,
        )
        self._ledger.apply(JOBS, Record(sequence, subject, data))
