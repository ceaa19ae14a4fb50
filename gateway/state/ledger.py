"""The fold over JOBS and the slots' states: every task, and which slots are busy.

Pure: records go in, nothing is read or written. The result depends only on what is stored, not on how the
records of the logs are interleaved when they are folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

from msgspec import Struct

from shared import subjects
from shared.broker.jetstream import Record
from shared.logs import get_logger
from shared.messages.jobs import (
    Claimed,
    Job,
    Moved,
    Reservation,
    Result,
    SlotDrain,
    StateRecord,
    Submitting,
    decode_drain,
    decode_job_record,
    decode_state_record,
)
from shared.messages.offers import Decision

log = get_logger()


class TaskState(StrEnum):
    """The state of a task, as shown to people (a rejected offer leaves no task)."""

    RESERVED = "reserved"
    LAPSED = "lapsed"
    QUEUED = "queued"
    RUNNING = "running"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class ChainRecord(Struct, frozen=True):
    """One record of a chain, and when the broker stored it (RFC 3339)."""

    sequence: int
    stored: str
    record: StateRecord


class TaskHistory(Struct):
    """The states of one task on one slot."""

    sequence: int = 0  # of the newest record on the chain's subject
    records: list[ChainRecord] = []  # every one, oldest first
    moved: Moved | None = None  # then no node of this slot may claim the task
    claimed: Claimed | None = None  # the newest
    submitting: Submitting | None = None  # the newest; once there was one, a gateway may write no result
    result: Result | None = None  # the first: nothing after it counts
    damaged: str | None = None  # why the newest record can't be read, if no result came before


class Task(Struct):
    """One accepted task. Of reservation and job at least one is there."""

    first: int  # sequence of its first record in JOBS: the order of acceptance
    reservation: Reservation | None = None
    job: Job | None = None
    job_sequence: int = 0  # of the job's record in JOBS

    @property
    def record(self) -> Job | Reservation:
        """Return the job, or the reservation while there is no job."""
        record = self.job or self.reservation
        if record is None:
            raise ValueError("a task without reservation and job")
        return record


class MalformedRecordError(ValueError):
    """A stored record contradicts its subject or the protocol."""


class Ledger:
    """The state of all logs, up to the sequences in `folded`.

    These are JOBS, and the states of every slot that there is (`slots`) or that got a job.
    """

    def __init__(self, slots: Iterable[str] = ()) -> None:
        self.folded = {subjects.JOBS_STREAM: 0, **{subjects.state_stream(slot): 0 for slot in slots}}
        self.newest: dict[str, Record] = {}  # by stream, the last one folded
        self.malformed = 0
        self.ended: list[tuple[str, str]] = []  # slot and key of every result, as they were folded
        self.on_task: Callable[[str], None] = lambda key: None  # after each record that changes a task
        self.on_drain: Callable[[str], None] = lambda slot: None  # was drained or put to work again
        self._tasks: dict[str, Task] = {}  # by key, in order of acceptance
        self._chains: dict[tuple[str, str], TaskHistory] = {}  # by slot and key
        self._newest_job: dict[str, str] = {}  # slot -> key
        self._newest_reservation: dict[str, Reservation] = {}  # by slot
        self._drains: dict[str, SlotDrain] = {}  # by slot, the newest

    def apply(self, stream: str, record: Record) -> None:
        """Fold one record; one folded before changes nothing, a malformed one is logged and counted."""
        if record.sequence <= self.folded.get(stream, 0):
            return
        self.folded[stream], self.newest[stream] = record.sequence, record
        try:
            if subjects.is_drain(record.subject):
                self._apply_drain(record)
            elif stream == subjects.JOBS_STREAM:
                self._apply_job(record)
            else:
                self._apply_state(record)
        except ValueError as error:  # msgspec's errors and ours
            self.malformed += 1
            log.error(
                "malformed record skipped",
                stream=stream,
                sequence=record.sequence,
                subject=record.subject,
                error=str(error),
                **subjects.task_in(record.subject),
            )
        else:
            self.on_task(record.subject.rpartition(".")[2])

    def task(self, key: str) -> Task | None:
        """Return the task of this key, if one was accepted."""
        return self._tasks.get(key)

    def slot_of(self, key: str) -> str | None:
        """Return the slot that a task's job is on; None without a job."""
        task = self._tasks.get(key)
        return None if task is None or task.job is None else task.job.slot

    def tasks(self) -> Iterator[Task]:
        """Return all tasks, newest first."""
        return reversed(self._tasks.values())

    def chain_of(self, record: Job | Reservation) -> TaskHistory:
        """Return the state chain of a job; an empty one if no node wrote yet."""
        return self._chains.get((record.slot, record.task)) or TaskHistory()

    def accepted(self, key: str, now: float) -> Decision | None:
        """Return the stored decision of an accepted task; a lapsed reservation doesn't count."""
        task = self._tasks.get(key)
        if task is None or self.state(task, now) is TaskState.LAPSED:
            return None
        return task.record.decision

    def holder(self, slot: str, now: float) -> Task | None:
        """Return the task that occupies a slot: its newest job without result, or an active reservation."""
        key = self._newest_job.get(slot)
        if key is not None and self._open(slot, key):
            return self._tasks[key]
        reservation = self._newest_reservation.get(slot)
        if reservation is None or reservation.expires_at <= now:
            return None
        task = self._tasks[reservation.task]
        return task if task.job is None and task.reservation is reservation else None

    def drain_of(self, slot: str) -> SlotDrain | None:
        """Return the operator's drain of a slot; None if the slot may get jobs."""
        newest = self._drains.get(slot)
        return newest if newest is not None and newest.drained else None

    def reserved_for(self, validator: str, now: float) -> Reservation | None:
        """Return a validator's active reservation, if it holds one."""
        for slot in self._newest_reservation:
            holder = self.holder(slot, now)
            reservation = holder.reservation if holder is not None and holder.job is None else None
            if reservation is not None and reservation.decision.validator == validator:
                return reservation
        return None

    def unclaimed(self) -> list[Job]:
        """Return the open jobs that no node has claimed and that may move to another slot."""
        return [
            job for job in self.open_jobs() if job.moved_from is None and self.chain_of(job).claimed is None
        ]

    def open_jobs(self) -> list[Job]:
        """Return the jobs without a result."""
        jobs = (task.job for task in self._tasks.values() if task.job is not None)
        return [job for job in jobs if self._open(job.slot, job.task)]

    def state(self, task: Task, now: float) -> TaskState:
        """Return the state of the task."""
        if task.job is None:
            lapsed = task.reservation is not None and task.reservation.expires_at <= now
            return TaskState.LAPSED if lapsed else TaskState.RESERVED
        chain = self.chain_of(task.job)
        if chain.result is not None:
            return TaskState(chain.result.status.value)
        if chain.submitting is not None:
            return TaskState.SUBMITTING
        return TaskState.QUEUED if chain.claimed is None else TaskState.RUNNING

    def _open(self, slot: str, key: str) -> bool:
        job = self._tasks[key].job
        if job is None or job.slot != slot:  # moved to another slot
            return False
        chain = self._chains.get((slot, key))
        return chain is None or chain.result is None

    def _apply_drain(self, record: Record) -> None:
        message = decode_drain(record.data)
        _must_match(record, subjects.drain(message.slot))
        self._drains[message.slot] = message
        self.on_drain(message.slot)

    def _apply_job(self, record: Record) -> None:
        message = decode_job_record(record.data)
        wanted = subjects.job if isinstance(message, Job) else subjects.reservation
        _must_match(record, wanted(message.slot, message.task))
        if (slot := subjects.slot_in(record.subject)) is not None:
            self.folded.setdefault(subjects.state_stream(slot), 0)
        if isinstance(message, Reservation):
            task = self._tasks.setdefault(message.task, Task(first=record.sequence))
            task.reservation = message
            self._newest_reservation[message.slot] = message
            return
        known = self._tasks.get(message.task)
        if known is not None and known.job is not None and not _moves(known.job, message):
            raise MalformedRecordError("a second job for one task")
        task = self._tasks.setdefault(message.task, Task(first=record.sequence))
        task.job, task.job_sequence = message, record.sequence
        self._newest_job[message.slot] = message.task

    def _apply_state(self, record: Record) -> None:
        slot, key = _slot_and_key(record)
        chain = self._chains.setdefault((slot, key), TaskHistory())
        chain.sequence = record.sequence  # also of a malformed record: the next write must expect it
        try:
            message = decode_state_record(record.data)
            _must_match(record, subjects.state(message.slot, message.task))
        except ValueError as error:
            if chain.result is None:
                chain.damaged = str(error)
                self.on_task(key)
            raise
        if chain.result is not None:
            raise MalformedRecordError("a record after the task's result")
        chain.damaged = None
        chain.records.append(ChainRecord(record.sequence, record.stored, message))
        if isinstance(message, Claimed):
            chain.claimed = message
        elif isinstance(message, Moved):
            chain.moved = message
        elif isinstance(message, Submitting):
            chain.submitting = message
        else:
            chain.result = message
            self.ended.append((slot, key))


def _moves(known: Job, message: Job) -> bool:
    """Return whether a second job record of a task is the one that moves it."""
    return known.moved_from is None and message.moved_from == known.slot != message.slot


def _slot_and_key(record: Record) -> tuple[str, str]:
    parts = record.subject.split(".")
    if len(parts) != 4:
        raise MalformedRecordError("a state subject has four parts")
    return parts[2], parts[3]


def _must_match(record: Record, subject: str) -> None:
    if record.subject != subject:
        raise MalformedRecordError(f"the message belongs on {subject}")
