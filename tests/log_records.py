"""Records of the logs, and their ledger."""

from __future__ import annotations

import time
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from gateway.state.ledger import Ledger, TaskState
from shared import subjects
from shared.broker.jetstream import Record
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Job, Reservation, Result, ResultStatus, Submitting
from shared.messages.offers import Decision, Offer, TaskType

JOBS, STATE_A = subjects.JOBS_STREAM, subjects.state_stream("a")
NOW = 1000.0


def decision(task: str, slot: str) -> Decision:
    return Decision(task_id=task, task=task, accepted=True, reason="yes", slot=slot)


def job(task: str, slot: str) -> Job:
    offer = Offer(task_id=task, task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1.0, dataset="d")
    return Job(
        record_id=f"job-{task}",
        task_id=task,
        task=task,
        slot=slot,
        gateway="g",
        offer=offer,
        decision=decision(task, slot),
        received_at=NOW,
        deadline_at=NOW + 3600,
    )


def job_due(task: str, slot: str, in_s: float) -> Job:
    """A job of two hours ago whose deadline is in so many seconds, by the real clock."""
    now = time.time()
    return replace(job(task, slot), received_at=now - 7200, deadline_at=now + in_s)


def reservation(task: str, slot: str, expires_at: float) -> Reservation:
    return Reservation(
        record_id=f"reservation-{task}",
        task_id=task,
        task=task,
        slot=slot,
        gateway="g",
        reserved_at=expires_at - 900,
        expires_at=expires_at,
        decision=decision(task, slot),
    )


def claimed(task: str, slot: str, epoch: int = 1, attempt: int = 1) -> Claimed:
    return Claimed(record_id="c", task=task, slot=slot, node="n", epoch=epoch, attempt=attempt)


def submitting(task: str, slot: str, epoch: int = 1) -> Submitting:
    return Submitting(record_id="s", task=task, slot=slot, node="n", epoch=epoch, digest="d")


def result(task: str, slot: str, status: ResultStatus = ResultStatus.SUBMITTED) -> Result:
    return Result(record_id="r", task=task, task_id=task, slot=slot, status=status)


def subject_of(message: Any) -> str:
    if isinstance(message, Job):
        return subjects.job(message.slot, message.task)
    if isinstance(message, Reservation):
        return subjects.reservation(message.slot, message.task)
    return subjects.state(message.slot, message.task)


def records(messages: list[Any]) -> list[Record]:
    return [
        Record(sequence, subject_of(message), encode(message))
        for sequence, message in enumerate(messages, start=1)
    ]


def ledger_of(jobs: list[Struct], states: list[Struct] = ()) -> Ledger:  # type: ignore[assignment]
    ledger = Ledger()
    for record in records(jobs):
        ledger.apply(JOBS, record)
    for stream, of_slot in state_logs(list(states)).items():
        for record in of_slot:
            ledger.apply(stream, record)
    return ledger


def state_logs(states: list[Any]) -> dict[str, list[Record]]:
    """The slots' logs with these records."""
    slots = dict.fromkeys(message.slot for message in states)
    return {
        subjects.state_stream(slot): records([message for message in states if message.slot == slot])
        for slot in slots
    }


def state_of(ledger: Ledger, token: str, now: float = NOW) -> TaskState:
    task = ledger.task(token)
    assert task is not None
    return ledger.state(task, now)
