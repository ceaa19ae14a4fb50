"""An export that was not verified: remembered, and submitted as it is when time is over."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.files import folder_digest
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import Outcome, OutcomeStatus, Phase, WorkerJob
from shared.planning.throughput import Costs
from tests.engine.worker_run import outcome_of, progress_of
from trainer_node.engine.export import unverified
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop

COSTS = Costs(import_s=10.0, load_s=5.0, ingest_s=5.0, export_s=4.0, verify_s=5.0)
NEEDED_S = 10 + 5 + 5 + (1.25 * 4 + 1) + (1.25 * 5 + 5)  # imports, load, rows, export and slack, verification


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A run that ended after its export, with no time left now."""
    export = tmp_path / "export"
    export.mkdir()
    (export / "adapter_model.safetensors").write_bytes(b"weights")
    outcome = Outcome(status=OutcomeStatus.READY, digest=folder_digest(export), export="export", step=9)
    unverified.note(tmp_path, outcome)
    (tmp_path / "run.json").write_bytes(msgspec.json.encode({"costs": COSTS, "unknown": 1}))
    return left(tmp_path / "job.json", 0.0)


def left(path: Path, seconds: float, **changes: Any) -> Path:
    """Write the job with so much time left."""
    fields: dict[str, Any] = {
        "task_id": "t",
        "task": "t",
        "slot": "a",
        "task_type": TaskType.INSTRUCT,
        "model": "m",
        "model_path": "m",
        "dataset": "d",
        "file_format": FileFormat.JSON,
        "dataset_type": DatasetType(field_instruction="q", field_output="a"),
        "start_at": 0.0,
        "ready_by": time.time() + seconds,
        "hardware": Hardware(device="cpu", count=1, memory_bytes=2**30),
    }
    path.write_bytes(encode(WorkerJob(**{**fields, **changes})))
    return path


def test_it_is_submitted_when_time_is_over(job: Path) -> None:
    assert unverified.submitted(job, Stop())
    outcome = outcome_of(job)
    assert (outcome.status, outcome.export) == (OutcomeStatus.READY, "export")
    assert outcome.digest == folder_digest(job.parent / "export")
    lines = progress_of(job)
    assert lines[-1].phase is Phase.DONE
    assert any("submitted as it is" in (line.message or "") for line in lines)


@pytest.mark.parametrize(("spare_s", "submits"), [(-2.0, True), (2.0, False)])
def test_only_a_start_that_has_no_time_to_verify_submits_it(spare_s: float, submits: bool, job: Path) -> None:
    left(job, NEEDED_S + spare_s)
    assert unverified.submitted(job, Stop()) is submits
    assert (job.parent / "outcome.json").exists() is submits


def test_time_that_the_process_has_spent_on_its_imports_is_not_counted_again() -> None:
    needed_s = NEEDED_S - COSTS.import_s
    assert unverified.is_late(needed_s - 0.1, COSTS)
    assert not unverified.is_late(needed_s + 0.1, COSTS)


def _changed(folder: Path) -> None:
    (folder / "export" / "adapter_model.safetensors").write_bytes(b"WEIGHTS")


def _torn(folder: Path) -> None:
    (folder / unverified.FILE).write_bytes(b'{"status":')


def _no_text(folder: Path) -> None:
    (folder / unverified.FILE).write_bytes(b'{"status": "ready", "digest": "\xff"}')


def _no_costs(folder: Path) -> None:
    (folder / "run.json").unlink()


def _bad_costs(folder: Path) -> None:
    (folder / "run.json").write_bytes(b'{"costs": 3}')


def _no_costs_in_text(folder: Path) -> None:
    (folder / "run.json").write_bytes(b'{"\xff": ' + b"[" * 100_000)


def _bad_job(folder: Path) -> None:
    (folder / "job.json").write_bytes(b"{}")


def _no_text_in_the_job(folder: Path) -> None:
    (folder / "job.json").write_bytes(b'{"task": "\xff"}')


def _no_export(folder: Path) -> None:
    shutil.rmtree(folder / "export")
    (folder / "export").mkdir()


def _token_clock(folder: Path) -> None:
    left(folder / "job.json", 0.0, clock="token")


@pytest.mark.parametrize(
    "spoil",
    [
        *(_changed, _no_export, _torn, _no_text, _no_costs, _bad_costs, _no_costs_in_text),
        *(_bad_job, _no_text_in_the_job, _token_clock, unverified.drop),
    ],
)
def test_what_is_not_sure_is_left_to_the_whole_engine(spoil: Any, job: Path) -> None:
    spoil(job.parent)
    assert not unverified.submitted(job, Stop())
    assert not (job.parent / "outcome.json").exists()


def test_to_drop_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    unverified.drop(tmp_path)
    assert unverified.finished(tmp_path, Reporter(tmp_path / "progress.jsonl", "t", "a")) is None
