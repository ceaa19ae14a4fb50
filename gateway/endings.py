"""The results that a gateway may write: `expired`, `cancelled`; never after `submitting`."""

from __future__ import annotations

import time
import uuid

from shared import subjects
from shared.broker.bus import Bus
from shared.messages import Job, Result, ResultStatus, encode


def ending(job: Job, status: ResultStatus, reason: str) -> Result:
    """The terminal record of a job that no node ends."""
    return Result(
        record_id=uuid.uuid4().hex,
        task=job.task,
        task_id=job.task_id,
        slot=job.slot,
        status=status,
        reason=reason,
        at=time.time(),
    )


async def append_ending(bus: Bus, result: Result, last: int) -> None:
    """Store it if the chain still ends at sequence `last`: a node that writes first wins. As `Bus.append`."""
    subject = subjects.state(result.slot, result.task)
    await bus.append(subjects.STATE_STREAM, subject, encode(result), last_on_subject=last)
