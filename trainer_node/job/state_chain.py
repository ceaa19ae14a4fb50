"""One task's chain in its slot's log: claimed, submitting, result, each a compare-and-set on its subject."""

from __future__ import annotations

import time
import uuid
from typing import Any

from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError, BusTimeoutError, ConflictError, PodiumError
from shared.messages.encoding import encode
from shared.messages.jobs import (
    Claimed,
    Job,
    Result,
    ResultStatus,
    StateRecord,
    Submitting,
    decode_state_record,
)
from shared.messages.runs import Outcome
from trainer_node.artifacts.interface import Stored
from trainer_node.lease import SlotLease


class FencedError(PodiumError):
    """Another writer extended the chain: read it and decide again."""


class Chain:
    """The chain as its writer last saw it; every append expects exactly that."""

    def __init__(self, bus: Bus, lease: SlotLease, task: str) -> None:
        self.bus = bus
        self.lease = lease
        self.task = task
        self.slot = lease.settings.slot
        self.stream = subjects.state_stream(self.slot)
        self.subject = subjects.state(self.slot, task)
        self.last: StateRecord | None = None
        self._sequence = 0

    async def read(self) -> StateRecord | None:
        """Return the newest record, or None for a task that nobody has claimed. Raises BusError."""
        record = await self.bus.last(self.stream, self.subject)
        self._sequence = record.sequence if record else 0
        try:
            self.last = decode_state_record(record.data) if record else None
        except ValueError as error:
            raise BusError(f"{self.subject} ends with a record that can't be read: {error}") from error
        return self.last

    async def claim(self, attempt: int, step: int) -> None:
        """Store that this node takes the job on, from the checkpoint of `step`. Raises as `append` does."""
        record = Claimed(**self._stamp(), task=self.task, slot=self.slot, attempt=attempt, step=step)
        await self.append(record)

    def is_claimed(self, attempt: int, step: int) -> bool:
        """Return whether the record last seen is the claim that this node would store now."""
        last, wanted = self.last, (self.lease.node, self.lease.epoch, attempt, step)
        return isinstance(last, Claimed) and (last.node, last.epoch, last.attempt, last.step) == wanted

    async def announce(self, digest: str) -> None:
        """Store which submission is about to be stored. Raises as `append` does."""
        await self.append(Submitting(**self._stamp(), task=self.task, slot=self.slot, digest=digest))

    async def end(self, job: Job, status: ResultStatus, reason: str, **fields: Any) -> None:
        """Store the job's result. Raises as `append` does."""
        named: dict[str, Any] = {"task": self.task, "task_id": job.task_id, "slot": self.slot, **fields}
        await self.append(Result(**self._stamp(), **named, status=status, reason=reason))

    async def end_submitted(
        self, job: Job, stored: Stored, outcome: Outcome | None, model_hash: str | None
    ) -> None:
        """Store that the job ended with a submission. Raises as `append` does."""
        margin = job.deadline_at - time.time()
        how = "submitted" if margin >= 0 else f"submitted {-margin:.0f} s after the deadline"
        await self.end(
            job,
            ResultStatus.SUBMITTED,
            f"{how}; {stored.remark}" if stored.remark else how,
            digest=stored.digest,
            artifact=stored.artifact,
            # Another holder's submission may have been first.
            metrics=outcome.metrics if outcome is not None and outcome.digest == stored.digest else None,
            deadline_margin_s=margin,
            model_hash=model_hash,
        )

    def _stamp(self) -> dict[str, Any]:
        node, epoch = self.lease.node, self.lease.epoch
        return {"record_id": uuid.uuid4().hex, "node": node, "epoch": epoch, "at": time.time()}

    async def append(self, record: StateRecord) -> None:
        """Store the chain's next record; if only the answer was lost, recognise the record when read again.

        Raises LeaseLostError and BusUnavailableError (nothing was sent), FencedError (another record is
        there), and BusTimeoutError (not there when read; should it still land, the next read decides).
        """
        self.lease.must_hold()
        try:
            self._sequence = await self.bus.append(
                self.stream, self.subject, encode(record), last_on_subject=self._sequence
            )
            self.last = record
        except (ConflictError, BusTimeoutError) as error:
            found = await self.read()
            if found is not None and found.record_id == record.record_id:
                return
            if isinstance(error, ConflictError):
                raise FencedError(str(error)) from error
            raise
