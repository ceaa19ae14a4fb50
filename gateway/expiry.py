"""Expire jobs that no node ended: long after its deadline a job gets its one result, `expired`."""

from __future__ import annotations

import asyncio
import time

from gateway.operations import append_result, terminal_result
from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from shared.broker.bus import Bus
from shared.errors import BusError, ConflictError, StoreFullError
from shared.logs import get_logger
from shared.messages.jobs import Job, ResultStatus

CHECK_S = 5.0

log = get_logger()


def overdue(ledger: Ledger, now: float, expire_after_s: float) -> list[Job]:
    """Return jobs without result `expire_after_s` after their deadline, unless a node began to submit."""
    return [
        job
        for job in ledger.open_jobs()
        if now >= job.deadline_at + expire_after_s and ledger.chain_of(job).submitting is None
    ]


async def expire_for_ever(bus: Bus, ledger: Ledger, log_reader: LogReader, expire_after_s: float) -> None:
    """Check every few seconds and expire by compare-and-set: a node that writes first wins."""
    while True:
        await asyncio.sleep(min(CHECK_S, expire_after_s))
        try:
            await log_reader.catch_up()
            for job in overdue(ledger, time.time(), expire_after_s):
                await _expire(bus, job, ledger.chain_of(job).sequence, expire_after_s)
        except BusError as error:
            log.warning("can't expire overdue jobs, retrying", error=str(error))


async def _expire(bus: Bus, job: Job, last: int, expire_after_s: float) -> None:
    reason = f"no submission within {expire_after_s:g} s after the deadline"
    try:
        await append_result(bus, terminal_result(job, ResultStatus.EXPIRED, reason), last)
    except ConflictError:
        log.info("overdue job not expired: its node wrote first", task=job.task, slot=job.slot)
        return
    except StoreFullError as error:  # only this slot's: the others' jobs must still expire
        log.error(
            "overdue job not expired: its slot's log is full", task=job.task, slot=job.slot, error=str(error)
        )
        return
    log.warning("job expired", task=job.task, slot=job.slot, reason=reason)
