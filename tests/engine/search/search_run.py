"""What tests read of a search: its record, without what no two runs have alike."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from trainer_node.engine.search.trial import SearchRecord, TrialResult, read_search


def record_of(job: Path) -> SearchRecord:
    """The search's record in a job's folder."""
    found = read_search(job.parent)
    assert found is not None
    return found


def without_seconds(results: list[TrialResult]) -> list[TrialResult]:
    """What must be equal when a job is repeated: all but the real time that steps took."""
    return [replace(result, step_s=0.0, train_s=0.0) for result in results]
