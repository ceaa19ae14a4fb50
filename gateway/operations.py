"""Operators' commands: cancel and requeue a task, drain a slot; and the results that a gateway may write.

The results are `expired` and `cancelled`, and never after `submitting`.
"""

from __future__ import annotations

import time
import uuid

from gateway.errors import NodeSilentError, NotPossibleError, UnknownSlotError, UnknownTaskError
from gateway.state.jobs_writer import JobsWriter
from gateway.state.ledger import Ledger, Task
from gateway.state.log_reader import LogReader
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConflictError,
)
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.jobs import Job, Result, ResultStatus, SlotDrain
from shared.messages.slots import Control, ControlKind, decode_control_answer
from shared.settings import Settings

CANCEL_TRIES = 8  # each lost to a record that a node wrote meanwhile
ANSWER_S = 30.0  # a node gives a worker ten seconds to write its checkpoint

log = get_logger()


class Operations:
    """Operators' commands. Results are written by compare-and-set, so a node that ends a task first wins."""

    def __init__(
        self, bus: Bus, ledger: Ledger, log_reader: LogReader, writer: JobsWriter, settings: Settings
    ) -> None:
        self._bus = bus
        self._ledger = ledger
        self._log_reader = log_reader
        self._writer = writer
        self._slots = settings.slots
        self._gateway = settings.gateway_name

    async def cancel(self, key: str, reason: str) -> Task:
        """End a task as `cancelled`, for good.

        Raises UnknownTaskError, NotPossibleError, and BusError: then it may or may not be cancelled.
        """
        mine = None
        for _ in range(CANCEL_TRIES):
            await self._log_reader.catch_up()
            task = self._find(key)
            if mine is not None and task.job is not None:
                result = self._ledger.chain_of(task.job).result
                if result is not None and result.record_id == mine.record_id:
                    log.warning("task cancelled", task=key, slot=task.job.slot, reason=mine.reason)
                    await self._wake(task.job)
                    return task
            job = self._open_job(task)
            mine = mine or terminal_result(job, ResultStatus.CANCELLED, reason)
            try:
                await append_result(self._bus, mine, self._ledger.chain_of(job).sequence)
            except (ConflictError, BusTimeoutError) as error:
                log.info("cancel not confirmed, retrying", task=key, slot=job.slot, error=str(error))
        raise BusUnavailableError(f"cancelling {key} was not confirmed in {CANCEL_TRIES} tries")

    async def requeue(self, key: str, reason: str) -> Task:
        """Have the slot's node end the worker and restart the job, with attempts counted from 1.

        Returns once the node's claim is in the chain. Raises UnknownTaskError, NotPossibleError (the node
        refuses), NodeSilentError (it may still do it), and BusError.
        """
        await self._log_reader.catch_up()
        job = self._open_job(self._find(key))
        request = self._request(ControlKind.REQUEUE, job, reason)
        try:
            reply = await self._bus.request(subjects.control(job.slot), request, timeout_s=ANSWER_S)
            answer = decode_control_answer(reply.data)
        except (BusTimeoutError, ValueError) as error:  # late, or an answer that can't be read
            raise NodeSilentError(
                f"the node of slot {job.slot} did not confirm and may still do it ({error}): "
                "check the task's chain"
            ) from error
        except BusUnavailableError as error:
            raise NodeSilentError(
                f"no node of slot {job.slot} is listening; a node that starts resumes the job by itself"
            ) from error
        if not answer.done:
            raise NotPossibleError(f"not requeued: {answer.reason}")
        log.warning("task requeued", task=key, slot=job.slot, reason=reason)
        await self._log_reader.catch_up()
        return self._find(key)

    async def drain(self, slot: str, reason: str) -> None:
        """Give a slot no new job; the one it has is seen through. Raises UnknownSlotError and BusError.

        The record is in JOBS, by compare-and-set on the log's end like every acceptance. So a job is either
        stored before it, or decided with it, on every gateway and after every restart.
        """
        await self._set_drained(slot, True, reason)

    async def resume(self, slot: str, reason: str) -> None:
        """Let a drained slot get jobs again. Raises UnknownSlotError and BusError."""
        await self._set_drained(slot, False, reason)

    async def _set_drained(self, slot: str, drained: bool, reason: str) -> None:
        if slot not in self._slots:
            raise UnknownSlotError(f"unknown slot {slot[:50]!r}; the slots are {', '.join(self._slots)}")

        def make() -> tuple[SlotDrain | None, bool]:
            if (self._ledger.drain_of(slot) is not None) is drained:  # also if only the answer was lost
                return None, False
            record = SlotDrain(
                record_id=uuid.uuid4().hex,
                slot=slot,
                drained=drained,
                reason=reason,
                gateway=self._gateway,
                at=time.time(),
            )
            return record, True

        await self._log_reader.catch_up()
        async with self._writer.exclusive():
            new = await self._writer.store(make)
        if new:
            log.warning("slot drained" if drained else "slot put to work again", slot=slot, reason=reason)

    def _find(self, key: str) -> Task:
        task = self._ledger.task(key)
        if task is None:
            raise UnknownTaskError(f"unknown task {key!r}; rejected offers are not stored")
        return task

    def _open_job(self, task: Task) -> Job:
        """Return the task's job if a gateway may still end it, else raise NotPossibleError with why."""
        job = task.job
        if job is None:
            raise NotPossibleError("it is only reserved, and the reservation will lapse by itself")
        chain = self._ledger.chain_of(job)
        if chain.result is not None:
            raise NotPossibleError(f"it has already ended as {chain.result.status}")
        if chain.submitting is not None:
            raise NotPossibleError("its submission is being stored, which can't be undone")
        return job

    def _request(self, kind: ControlKind, job: Job, reason: str) -> bytes:
        return encode(Control(kind=kind, task=job.task, reason=reason, gateway=self._gateway))

    async def _wake(self, job: Job) -> None:
        """Have the node poll now instead of at its next interval."""
        try:
            await self._bus.publish(subjects.control(job.slot), self._request(ControlKind.LOOK, job, ""))
        except BusError as error:
            log.debug("can't wake the node", task=job.task, slot=job.slot, error=str(error))


def terminal_result(job: Job, status: ResultStatus, reason: str) -> Result:
    """Return the terminal record of a job that no node ended."""
    return Result(
        record_id=uuid.uuid4().hex,
        task=job.task,
        task_id=job.task_id,
        slot=job.slot,
        status=status,
        reason=reason,
        at=time.time(),
    )


async def append_result(bus: Bus, result: Result, last: int) -> None:
    """Store it if the chain still ends at sequence `last`, so a node that writes first wins.

    Raises what `Bus.append` raises.
    """
    stream, subject = subjects.state_stream(result.slot), subjects.state(result.slot, result.task)
    await bus.append(stream, subject, encode(result), last_on_subject=last)
