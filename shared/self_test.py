"""A slot's self-test: what a node asks of the engine, and what each of its processes answers, as files.

<folder>/request.json    written by the node
<folder>/rank-0.json     one per process, replaced after every check
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from shared.files import write_atomically
from shared.json_files import read_json_if_possible
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware

REQUEST_FILE = "request.json"


class SelfTestRequest(Struct, frozen=True, kw_only=True):
    """What to test."""

    hardware: Hardware
    processes: int  # one per GPU; on a CPU one, or several that talk to each other
    checks: list[str] = []  # names; empty = all


class CheckResult(Struct, frozen=True, kw_only=True):
    """The result of one check in one process."""

    name: str
    ok: bool
    what: str  # a measured figure, or what is wrong
    seconds: float
    warns: bool = False  # jobs run here, but worse than they should: `what` says how


class ProcessReport(Struct, frozen=True, kw_only=True):
    """What one process has found so far."""

    results: list[CheckResult] = []
    running: str | None = None  # the check that was begun last; None = all are done


class SlotHealth(Struct, frozen=True, kw_only=True):
    """What a self-test found, in one sentence each."""

    faults: list[str] = []  # the slot gets no job
    warnings: list[str] = []  # it gets jobs, which are worse off than they should be


def write_request(folder: Path, request: SelfTestRequest) -> None:
    """Write what to test, and remove the answers to an earlier request."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.json"):
        old.unlink()
    write_atomically(folder / REQUEST_FILE, encode(request))


def read_request(folder: Path) -> SelfTestRequest:
    """Read what to test."""
    return msgspec.json.decode((folder / REQUEST_FILE).read_bytes(), type=SelfTestRequest)


def write_report(folder: Path, rank: int, report: ProcessReport) -> None:
    """Replace a process's answer."""
    write_atomically(folder / f"rank-{rank}.json", encode(report))


def read_reports(folder: Path, processes: int) -> list[ProcessReport | None]:
    """Read every process's answer; None for one that has written none that can be read."""
    found: list[ProcessReport | None] = []
    for rank in range(processes):
        found.append(read_json_if_possible(folder / f"rank-{rank}.json", ProcessReport))
    return found


def faults_in(reports: list[ProcessReport | None], manner: str) -> list[str]:
    """Return what is wrong, in one sentence each; `manner` says how the test ended, empty = as it should.

    A check that all processes fail at alike is named once.
    """
    faults: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        if report is None:
            faults.setdefault(f"the test did not start: {manner or 'no answer'}", []).append(rank)
            continue
        for result in report.results:
            if not result.ok:
                faults.setdefault(f"{result.name}: {result.what}", []).append(rank)
        if report.running is not None:
            faults.setdefault(f"{report.running}: {manner or 'the test ended inside it'}", []).append(rank)
    if manner and not faults:
        return [manner]
    return _with_processes(faults, len(reports))


def warnings_in(reports: list[ProcessReport | None]) -> list[str]:
    """Return what is worse than it should be and yet no fault, in one sentence each."""
    warnings: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for result in report.results if report else []:
            if result.warns:
                warnings.setdefault(f"{result.name}: {result.what}", []).append(rank)
    return _with_processes(warnings, len(reports))


def _with_processes(found: dict[str, list[int]], processes: int) -> list[str]:
    """Return sentences with the processes that they are true of, unless there is one only."""
    if processes == 1:
        return list(found)
    return [f"{what} (process {', '.join(map(str, ranks))})" for what, ranks in found.items()]
