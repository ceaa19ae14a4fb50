"""Judge independently what a fleet did, from the logs, the lock logs and the artifacts alone.

It shares only the message types with the gateway and the node, so that it can't repeat their mistakes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import merge
from itertools import pairwise
from pathlib import Path

import msgspec
from msgspec import Struct, field

from shared import subjects
from shared.broker.bus import Bus, Record
from shared.files import folder_digest
from shared.messages.jobs import (
    Claimed,
    Job,
    Moved,
    Result,
    ResultStatus,
    StateRecord,
    Submitting,
    decode_job_record,
    decode_state_record,
)


class Report(Struct, frozen=True, kw_only=True):
    """Counts of what must not happen, and sentences that say where it did."""

    jobs: int
    results: dict[str, int]
    lost: int  # acknowledged to the client, absent from JOBS
    stored_twice: int  # this and what follows count tasks, however often one is stored
    double_submissions: int
    without_result: int
    late: int
    overlaps: int  # two workers, or two jobs, on one slot at one time
    stale_writes: int = 0  # records of an epoch that another one had ended, or after a result
    resumes: int  # claims after a task's first
    takeovers: int = 0  # of them, those by another node than the one before
    findings: list[str]

    @property
    def clean(self) -> bool:
        """Return whether nothing happened that must not."""
        return not self.findings


class Logs(Struct):
    """JOBS and the slots' states as they are stored, in order; the states also by task."""

    jobs: list[Job]
    states: list[StateRecord]
    chains: dict[str, list[StateRecord]]


async def read_all(bus: Bus, stream: str) -> list[Record]:
    """Return every record of a stream, oldest first."""
    records: list[Record] = []
    while batch := await bus.read(stream, records[-1].sequence if records else 0):
        records += batch
    return records


async def read_logs(bus: Bus) -> Logs:
    """Read all logs completely."""
    records = await read_all(bus, subjects.JOBS_STREAM)
    stored = [decode_job_record(record.data) for record in records if not subjects.is_drain(record.subject)]
    slots = dict.fromkeys(subjects.slot_in(record.subject) for record in records)
    logs = [await read_all(bus, subjects.state_stream(slot)) for slot in slots if slot is not None]
    states = [decode_state_record(record.data) for record in merge(*logs, key=_stored)]
    chains: dict[str, list[StateRecord]] = {}
    for state in states:
        chains.setdefault(state.task, []).append(state)
    return Logs([record for record in stored if isinstance(record, Job)], states, chains)


def _stored(record: Record) -> str:
    """Return when the broker stored it, in a form that sorts: its fraction has no zeros at the end."""
    return record.stored.removesuffix("Z")


class Ends(Struct):
    """How the tasks ended, and what is wrong with that."""

    results: Counter[str] = field(default_factory=Counter)
    without: list[str] = []
    double: list[str] = []
    late: list[str] = []
    wrong: list[str] = []


async def check(bus: Bus, *, acknowledged: set[str], artifacts: Path, lock_logs: dict[str, Path]) -> Report:
    """Judge a settled fleet; `acknowledged` are the keys of tasks whose acceptance a client received."""
    logs = await read_logs(bus)
    counts = Counter(job.task for job in logs.jobs if job.moved_from is None)
    twice = [f"{task}: stored {count} times" for task, count in counts.items() if count > 1]
    lost = [f"{task}: acknowledged but not stored" for task in sorted(acknowledged - set(counts))]
    ends = _ends(logs, artifacts)
    overlaps = [line for slot, path in lock_logs.items() for line in _overlaps(slot, path)]
    overlaps += _two_jobs_at_once(logs)
    stale = [*_after_results(logs), *_stale_epochs(logs)]
    wrong = [*ends.wrong, *_unfenced_moves(logs)]
    claims = [[record for record in chain if isinstance(record, Claimed)] for chain in logs.chains.values()]
    return Report(
        jobs=len(counts),
        results=dict(ends.results),
        lost=len(lost),
        stored_twice=len(twice),
        double_submissions=len(ends.double),
        without_result=len(ends.without),
        late=len(ends.late),
        overlaps=len(overlaps),
        stale_writes=len(stale),
        resumes=sum(max(0, len(chain) - 1) for chain in claims),
        takeovers=sum(a.node != b.node for chain in claims for a, b in pairwise(chain)),
        findings=[*twice, *lost, *ends.without, *ends.double, *ends.late, *wrong, *overlaps, *stale],
    )


def _ends(logs: Logs, artifacts: Path) -> Ends:
    """Judge each task's result by its newest job record: a job may have moved once."""
    found = Ends()
    for job in {job.task: job for job in logs.jobs}.values():
        chain = logs.chains.get(job.task, [])
        ends = [record for record in chain if isinstance(record, Result)]
        if len(ends) != 1:
            (found.double if ends else found.without).append(f"{job.task}: {len(ends)} results")
            continue
        result = ends[0]
        found.results[result.status.value] += 1
        stored = _submissions(artifacts, job.task)
        if len(stored) > 1:
            found.double.append(f"{job.task}: {len(stored)} submissions are stored")
        found.wrong += _artifact_findings(result, stored, chain)
        if result.status is ResultStatus.SUBMITTED and result.at > job.deadline_at:
            found.late.append(f"{job.task}: submitted {result.at - job.deadline_at:.1f} s late")
    return found


def _submissions(artifacts: Path, task: str) -> list[Path]:
    """Return all that lies under a task's name, except copies whose node was killed while it wrote them."""
    folder = artifacts / task
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _artifact_findings(result: Result, stored: list[Path], chain: list[StateRecord]) -> Iterator[str]:
    """Check that a submitted task has one stored submission: the announced one that the result names."""
    task = result.task
    if result.status is not ResultStatus.SUBMITTED:
        if stored:
            yield f"{task}: {result.status.value}, yet an artifact is stored"
        return
    if not stored:
        yield f"{task}: submitted, but nothing is stored"
    elif (digest := folder_digest(stored[0])) != result.digest:
        yield f"{task}: stored {digest[:12]}, result says {result.digest}"
    announced = {record.digest for record in chain if isinstance(record, Submitting)}
    if result.digest not in announced:
        yield f"{task}: submitted {result.digest}, which nobody had announced"


def _unfenced_moves(logs: Logs) -> Iterator[str]:
    """Check that a job moves once, off the slot it was stored for, which writes nothing after it."""
    first: dict[str, Job] = {}
    for job in logs.jobs:
        before = first.setdefault(job.task, job)
        if job.moved_from is None:
            continue
        if before is job or before.slot != job.moved_from or before.moved_from is not None:
            yield f"{job.task}: moved off slot {job.moved_from}, for which it was not stored"
        chain = [record for record in logs.chains.get(job.task, []) if record.slot == job.moved_from]
        if not any(isinstance(record, Moved) for record in chain):
            yield f"{job.task}: stored for slot {job.slot} while slot {job.moved_from} could still claim it"
        if any(not isinstance(record, Moved) for record in chain):
            yield f"{job.task}: slot {job.moved_from} wrote about it, though it had moved"
    moves = Counter(job.task for job in logs.jobs if job.moved_from is not None)
    yield from (f"{task}: moved {count} times" for task, count in moves.items() if count > 1)


def _after_results(logs: Logs) -> Iterator[str]:
    for task, chain in logs.chains.items():
        first = next((place for place, record in enumerate(chain) if isinstance(record, Result)), len(chain))
        if any(not isinstance(record, Result) for record in chain[first:]):
            yield f"{task}: something was written after the result"


def _stale_epochs(logs: Logs) -> Iterator[str]:
    """Per slot, whatever the task: the epoch never falls, and each is one node's. Gateways write none."""
    newest: dict[str, StateRecord] = {}
    for record in logs.states:
        if not record.epoch:
            continue
        before = newest.setdefault(record.slot, record)
        if record.epoch < before.epoch:
            yield f"{record.task}: epoch {record.epoch} was written after epoch {before.epoch}"
        elif record.epoch == before.epoch and record.node != before.node:
            yield f"{record.task}: {record.node} and {before.node} both wrote under epoch {record.epoch}"
        else:
            newest[record.slot] = record


def _two_jobs_at_once(logs: Logs) -> Iterator[str]:
    """Check that a slot gets its next job after the result of the one before (one clock)."""
    newest: dict[str, Job] = {}
    for job in logs.jobs:
        before = newest.get(job.slot)
        newest[job.slot] = job
        begun = max(job.decision.decided_at, job.moved_at or 0.0)
        if before is None or before.task == job.task:
            continue
        ends = [
            record.at
            for record in logs.chains.get(before.task, [])
            if isinstance(record, Result) or (isinstance(record, Moved) and record.slot == job.slot)
        ]
        if not ends or min(ends) > begun:
            yield f"slot {job.slot}: {job.task} was accepted before {before.task} had a result"


class LockEvent(Struct):
    """One line of a slot's lock log."""

    event: str  # acquired, adopted or released
    pid: int
    task: str
    at: float


def _overlaps(slot: str, path: Path) -> list[str]:
    """Times at which a worker took the slot while another's process was still there."""
    if not path.exists():
        return []
    holder: LockEvent | None = None
    findings = []
    for line in path.read_bytes().splitlines():
        event = msgspec.json.decode(line, type=LockEvent)
        if event.event == "acquired":
            if holder is not None and holder.pid != event.pid:
                findings.append(
                    f"slot {slot}: {event.pid} ({event.task}) took the lock at {event.at:.2f} "
                    f"while {holder.pid} ({holder.task}) held it"
                )
            holder = event
        elif event.event == "released" and holder is not None and holder.pid == event.pid:
            holder = None
    return findings
