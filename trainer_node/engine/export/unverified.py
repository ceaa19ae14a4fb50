"""The finished export that was not verified yet: marked as such, and submitted as it is when time is over.

Knows nothing of torch: a start that comes so late has no time for its imports either.
"""

from __future__ import annotations

import time
from pathlib import Path

from msgspec import Struct

from shared.files import folder_digest, write_atomically
from shared.json_files import read_json_if_possible
from shared.messages.encoding import encode
from shared.messages.runs import Outcome, Phase, WorkerJob
from shared.planning.throughput import Costs
from trainer_node.engine.reporter import Reporter, write_outcome
from trainer_node.engine.signals import Stop
from trainer_node.engine.time_budget import Part, affordable

FILE = "standby.json"  # the outcome it would be


class Known(Struct, frozen=True):
    """What of `run.json` this needs."""

    costs: Costs


def note(folder: Path, outcome: Outcome) -> None:
    """Record that the run's export is complete on disk."""
    write_atomically(folder / FILE, encode(outcome))


def drop(folder: Path) -> None:
    """Forget the export: it must not be submitted."""
    (folder / FILE).unlink(missing_ok=True)


def finished(folder: Path, reporter: Reporter) -> Outcome | None:
    """Return what an earlier start exported but had no time to verify, if its files are unchanged."""
    outcome = read_json_if_possible(folder / FILE, Outcome)
    if outcome is None or not _is_export(folder / "export", outcome.digest):
        return None
    reporter.message("no time is left to verify: the finished export is submitted as it is")
    reporter.phase(Phase.DONE)
    return outcome


def _is_export(folder: Path, digest: str | None) -> bool:
    """Return whether a folder's files are those with the digest; not if one of them can't be read."""
    try:
        return folder_digest(folder) == digest
    except (OSError, ValueError):
        return False


def is_late(left_s: float, costs: Costs) -> bool:
    """Return whether a start comes so late that not even the export could be verified."""
    return Part.VERIFY not in affordable(left_s - costs.load_s - costs.ingest_s, costs)


def at_once(folder: Path, job: WorkerJob, now: float, reporter: Reporter) -> Outcome | None:
    """Return the finished export if time is over; called before the imports, which take seconds."""
    known = read_json_if_possible(folder / "run.json", Known)
    if known is None or not is_late(job.ready_by - now - known.costs.import_s, known.costs):
        return None
    return finished(folder, reporter)


def submitted(job_path: Path, stop: Stop) -> bool:
    """Return whether this start only had to submit a finished export, and did."""
    folder = job_path.parent
    if not (folder / FILE).exists():
        return False
    job = read_json_if_possible(job_path, WorkerJob)  # without one its next reader says why it can't go on
    if job is None or job.clock == "token":
        return False
    reporter = Reporter(folder / "progress.jsonl", job.task, job.slot)
    outcome = at_once(folder, job, time.time(), reporter)
    if outcome is None:
        return False
    stop.close()
    write_outcome(folder, reporter, outcome)
    return True
