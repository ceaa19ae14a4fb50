"""What tests read of a search: its record, without what no two runs have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from shared.messages.runs import OutcomeStatus
from shared.planning.throughput import Costs
from tests.engine.worker_run import outcome_of, weights_of
from trainer_node.engine.context import RunRecord
from trainer_node.engine.search.trial import SearchRecord, TrialResult, read_search


def run_record(costs: Costs, **changes: Any) -> RunRecord:
    """A run of ten rows that took so long to save and to score."""
    fixed = {"fingerprint": "", "base_losses": [3.0], "train_examples": 10, "train_tokens": 100}
    return RunRecord(**{**fixed, "dropped": {}, "costs": costs, **changes})


def record_of(job: Path) -> SearchRecord:
    """The search's record in a job's folder."""
    found = read_search(job.parent)
    assert found is not None
    return found


def without_seconds(results: list[TrialResult]) -> list[TrialResult]:
    """What must be equal when a job is repeated: all but the real time that steps took."""
    return [replace(result, step_s=0.0, train_s=0.0) for result in results]


def assert_alike(rough: Path, calm: Path, resumes: int) -> None:
    """Check that a search that was killed so often decided and submitted what an undisturbed one does."""
    found, wanted = outcome_of(rough), outcome_of(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.metrics.resumes == resumes
    assert found.metrics.final_loss == wanted.metrics.final_loss
    assert without_seconds(record_of(rough).done) == without_seconds(record_of(calm).done)
    assert weights_of(rough) == weights_of(calm)
