"""Compute the training lost by faults: steps and seconds that had to be trained again.

    python -m bench.reliability.lost_work FOLDER    # of a chaos run: --folder keeps it

Reads the files of a chaos run: when each worker started (the witnesses' logs), its reported progress, from
which checkpoint the next one began (the claims), and the injected faults. A worker reports once a second, so
steps after its last report are not counted; the seconds count from the last report that was not beyond the
checkpoint, which is at most one second too many.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench.harness.fault_injector import Fault, read_faults
from shared.messages.jobs import Claimed, StateRecord
from shared.messages.runs import Phase, Progress, decode_progress


class Start(Struct, frozen=True, kw_only=True):
    """One worker's start, as its witness wrote it."""

    event: str
    pid: int
    task: str
    job_file: str
    at: float

    @property
    def node(self) -> str:
        """Name of the node that started it."""
        return Path(self.job_file).parents[2].name


class Loss(Struct, frozen=True, kw_only=True):
    """Training lost by one worker's end."""

    task: str
    cause: str  # worker kill, node kill, drain, takeover, other
    steps: int
    seconds: float


def losses(folder: Path) -> list[Loss]:
    """Return one loss per worker that had a successor on the same task."""
    faults = read_faults(folder)
    claims = [record for record in read_states(folder) if isinstance(record, Claimed)]
    by_task: dict[str, list[Start]] = {}
    for start in sorted(_starts(folder), key=lambda start: start.at):
        by_task.setdefault(start.task, []).append(start)
    return [
        _loss(folder, before, after, faults, claims)
        for starts in by_task.values()
        for before, after in pairwise(starts)
    ]


def _loss(folder: Path, before: Start, after: Start, faults: list[Fault], claims: list[Claimed]) -> Loss:
    begun_from = max(
        (claim for claim in claims if claim.task == after.task and claim.at <= after.at),
        key=lambda claim: claim.at,
    ).step
    cause, ended_at = _cause(before, after, faults)
    lines = [
        line
        for line in _progress(folder, before)
        if before.at <= line.at < after.at and line.phase is Phase.TRAIN and line.step
    ]
    steps = max(0, max((line.step for line in lines), default=0) - begun_from)
    kept_at = max((line.at for line in lines if line.step <= begun_from), default=None)
    if kept_at is None:
        kept_at = min((line.at for line in lines), default=ended_at)
    return Loss(
        task=after.task, cause=cause, steps=steps, seconds=max(0.0, ended_at - kept_at) if steps else 0.0
    )


def _cause(before: Start, after: Start, faults: list[Fault]) -> tuple[str, float]:
    """Return why a worker had a successor, and when it was hit."""
    within = [fault for fault in faults if before.at <= fault.at <= after.at]
    if after.node != before.node:  # in a folder of its own, which has no checkpoint
        return "takeover", after.at
    for fault in within:
        if fault.pid == before.pid and fault.what == "kill":
            return "worker kill", fault.at
    for what, cause in (("term", "drain"), ("kill", "node kill")):
        for fault in within:
            if fault.whom == before.node and fault.what == what:
                return cause, fault.at
    return "other", after.at


def summary(folder: Path) -> dict[str, Any]:
    """Return the figures, for the last line of a bench."""
    found = losses(folder)
    faults = read_faults(folder)
    killed = [loss for loss in found if loss.cause == "worker kill"]
    seconds = [loss.seconds for loss in killed]
    return {
        "node_kills_with_worker": sum(fault.what == "kill" and fault.worker > 0 for fault in faults),
        "wasted_steps_node_kill": _steps(found, "node kill"),
        "wasted_steps_drain": _steps(found, "drain"),
        "takeovers_with_worker": sum(loss.cause == "takeover" for loss in found),
        "wasted_steps_takeover": _steps(found, "takeover"),
        "worker_kills_resumed": len(killed),
        "wasted_steps_worker_kill": _steps(found, "worker kill"),
        "wasted_s_worker_kill_median": round(statistics.median(seconds), 2) if seconds else None,
        "wasted_s_worker_kill_max": round(max(seconds), 2) if seconds else None,
        "restarts_of_other_causes": sum(loss.cause == "other" for loss in found),
    }


def _steps(found: list[Loss], cause: str) -> int:
    return sum(loss.steps for loss in found if loss.cause == cause)


def read_states(folder: Path) -> list[StateRecord]:
    """Read the state log, as the chaos run dumped it."""
    lines = (folder / "states.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=StateRecord) for line in lines]


def _starts(folder: Path) -> Iterator[Start]:
    for log in sorted((folder / "witness").glob("*.log")):
        for line in log.read_bytes().splitlines():
            start = msgspec.json.decode(line, type=Start)
            if start.event == "acquired":
                yield start


def _progress(folder: Path, start: Start) -> Iterator[Progress]:
    path = folder / "progress" / f"{start.node}.{start.task}.jsonl"
    if not path.exists():  # killed before its first word
        return
    for line in path.read_bytes().splitlines():
        try:
            yield decode_progress(line)
        except msgspec.DecodeError:  # killed inside a line
            continue


if __name__ == "__main__":
    print(msgspec.json.encode(summary(Path(sys.argv[1]))).decode())
