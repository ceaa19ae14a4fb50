"""An independent judge of what a fleet did: reads only the two logs, the lock's log and the artifacts.

It shares no code with the gateway or the node beyond the message types, so that a wrong idea there is not
repeated here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
from msgspec import Struct

from shared import subjects
from shared.bus import Bus, Record
from shared.digest import folder_digest
from shared.messages import (
    Claimed,
    Job,
    Result,
    ResultStatus,
    StateRecord,
    decode_job_record,
    decode_state_record,
)


class Report(Struct, frozen=True, kw_only=True):
    """Counts of what must not happen, and sentences that say where it did."""

    jobs: int
    results: dict[str, int]
    lost: int  # acknowledged to the client, absent from JOBS
    stored_twice: int
    double_submissions: int
    without_result: int
    late: int
    overlaps: int  # two workers on one slot at one time
    resumes: int  # claims after a task's first
    findings: list[str]

    @property
    def clean(self) -> bool:
        """Nothing that must not happen did."""
        return not self.findings


class Chain(Struct):
    """One task's records in STATE, in order."""

    records: list[StateRecord] = []

    @property
    def results(self) -> list[Result]:
        """All terminal records; there must be exactly one."""
        return [record for record in self.records if isinstance(record, Result)]


async def read_all(bus: Bus, stream: str) -> list[Record]:
    """Every record of a stream, oldest first."""
    records: list[Record] = []
    while batch := await bus.read(stream, records[-1].sequence if records else 0):
        records += batch
    return records


async def check(bus: Bus, *, acknowledged: set[str], artifacts: Path, lock_logs: dict[str, Path]) -> Report:
    """Judge a settled fleet; `acknowledged` are the tokens of tasks that a client heard accepted."""
    findings: list[str] = []
    stored = [decode_job_record(record.data) for record in await read_all(bus, subjects.JOBS_STREAM)]
    jobs = [record for record in stored if isinstance(record, Job)]
    chains: dict[str, Chain] = {}
    for record in await read_all(bus, subjects.STATE_STREAM):
        state = decode_state_record(record.data)
        chains.setdefault(state.task, Chain([])).records.append(state)

    counts = Counter(job.task for job in jobs)
    twice = [task for task, count in counts.items() if count > 1]
    findings += [f"{task}: stored {counts[task]} times" for task in twice]
    lost = sorted(acknowledged - set(counts))
    findings += [f"{task}: acknowledged but not stored" for task in lost]

    without: list[str] = []
    double: list[str] = []
    late: list[str] = []
    results: Counter[str] = Counter()
    for job in jobs:
        chain = chains.get(job.task, Chain([]))
        if len(chain.results) != 1:
            (without if not chain.results else double).append(job.task)
            findings.append(f"{job.task}: {len(chain.results)} results")
            continue
        result = chain.results[0]
        results[result.status.value] += 1
        if chain.records[-1] is not result:
            findings.append(f"{job.task}: something was written after the result")
        findings += _artifact_findings(result, artifacts, double)
        if result.status is ResultStatus.SUBMITTED and result.at > job.deadline_at:
            late.append(job.task)
            findings.append(f"{job.task}: submitted {result.at - job.deadline_at:.1f} s late")

    overlaps = [line for slot, path in lock_logs.items() for line in _overlaps(slot, path)]
    claims = sum(isinstance(record, Claimed) for chain in chains.values() for record in chain.records)
    return Report(
        jobs=len(jobs),
        results=dict(results),
        lost=len(lost),
        stored_twice=len(twice),
        double_submissions=len(double),
        without_result=len(without),
        late=len(late),
        overlaps=len(overlaps),
        resumes=max(0, claims - sum(1 for chain in chains.values() if chain.records)),
        findings=findings + overlaps,
    )


def _artifact_findings(result: Result, artifacts: Path, double: list[str]) -> list[str]:
    """A submitted task has exactly one stored submission, and it is what the result names."""
    folder = artifacts / result.task
    found = (
        sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    )
    if result.status is not ResultStatus.SUBMITTED:
        return [f"{result.task}: {result.status.value}, yet an artifact is stored"] if found else []
    if len(found) > 1:
        double.append(result.task)
        return [f"{result.task}: {len(found)} submissions are stored"]
    if not found:
        return [f"{result.task}: submitted, but nothing is stored"]
    digest = folder_digest(found[0])
    return (
        []
        if digest == result.digest
        else [f"{result.task}: stored {digest[:12]}, result says {result.digest}"]
    )


class LockEvent(Struct):
    """One line of a slot's lock log."""

    event: str  # "acquired" or "released"
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
                findings.append(f"slot {slot}: {event.pid} took the lock while {holder.pid} held it")
            holder = event
        elif holder is not None and holder.pid == event.pid:
            holder = None
    return findings
