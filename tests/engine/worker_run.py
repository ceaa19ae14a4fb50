"""Whole runs of the worker for tests: a job in a folder, started, waited for, read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import structlog

from bench.harness.dataset_types import SHAREGPT
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import (
    Outcome,
    OutcomeStatus,
    Progress,
    WorkerJob,
    decode_outcome,
    decode_progress,
    decode_worker_job,
)
from trainer_node.engine import pipeline
from trainer_node.engine.signals import Stop

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
WAIT_S = 90.0


def write_rows(folder: Path, count: int = 300) -> Path:
    kinds = max(37, count // 10)
    rows = [
        {"q": f"Define number {i % kinds}.", "a": f"It comes after {i % kinds - 1}."} for i in range(count)
    ]
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    return data


def data_of(task_type: TaskType, folder: Path, count: int = 300) -> dict[str, Any]:
    """What a job of this kind says of its data, and the data in `folder`."""
    asked = [f"Define number {i % 37}." for i in range(count)]
    right = [f"It comes after {i % 37 - 1}." for i in range(count)]
    wrong = [f"They never said {i % 37 + 5}!" for i in range(count)]
    if task_type is TaskType.CHAT:
        columns = SHAREGPT
        talks = [
            [("human", q), ("gpt", a), ("human", "Again."), ("gpt", a)]
            for q, a in zip(asked, right, strict=True)
        ]
        rows: list[Any] = [
            {"conversations": [{"from": who, "value": what} for who, what in talk]} for talk in talks
        ]
    else:
        columns = DatasetType(field_prompt="q", field_chosen="c", field_rejected="r")
        rows = [{"q": q, "c": c, "r": r} for q, c, r in zip(asked, right, wrong, strict=True)]
    data = folder / f"{task_type.value}.json"
    data.write_text(json.dumps(rows))
    return {"task_type": task_type, "dataset": str(data), "dataset_type": columns}


def bare_job(**changes: Any) -> WorkerJob:
    """A job of the tiny model on this CPU; without data, for what reads none."""
    fields: dict[str, Any] = {
        "task_id": "t",
        "task": "t",
        "slot": "a",
        "task_type": TaskType.INSTRUCT,
        "model": "upstream/tiny",
        "model_path": "",
        "dataset": "",
        "file_format": FileFormat.JSON,
        "dataset_type": DatasetType(),
        "start_at": 0.0,
        "ready_by": 25.0,
        "hardware": Hardware(device="cpu", count=2, memory_bytes=16 * 2**30),
    }
    return WorkerJob(**{**fields, **changes})


def write_job(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "model_path": str(model),
        "dataset": str(data),
        "dataset_type": DatasetType(field_instruction="q", field_output="a"),
        "threads": 1,
        "clock": "token",
        "token_clock_rate": 1000.0,
        "checkpoint_interval_s": 5.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_bytes(encode(bare_job(**{**fields, **changes})))
    return path


def start_worker(job: Path) -> subprocess.Popen[bytes]:
    with (job.parent / "worker.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer_node.engine", str(job)], stdout=log, stderr=log, env=ENVIRONMENT
        )


def outcome_of(job: Path) -> Outcome:
    return decode_outcome((job.parent / "outcome.json").read_bytes())


def finish(job: Path) -> Outcome:
    """Run to the end in this process; the exit status must say what the outcome says."""
    status = pipeline.main(job, Stop())
    outcome = outcome_of(job)
    assert status == (1 if outcome.status is OutcomeStatus.FAILED else 0)
    job_read = decode_worker_job(job.read_bytes())
    in_every_line = structlog.contextvars.get_contextvars()
    assert in_every_line == {"task": job_read.task, "slot": job_read.slot}
    return outcome


def progress_of(job: Path) -> list[Progress]:
    path = job.parent / "progress.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [decode_progress(line) for line in whole.splitlines()]


def wait_for_checkpoint(job: Path, worker: subprocess.Popen[bytes]) -> None:
    """Until there is a checkpoint that wasn't there when this was called."""
    until = time.monotonic() + WAIT_S
    before = set((job.parent / "checkpoints").glob("step-*"))
    while not set((job.parent / "checkpoints").glob("step-*")) - before:
        assert worker.poll() is None, (job.parent / "worker.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)


def weights_of(job: Path) -> dict[str, bytes]:
    export = job.parent / "export"
    return {path.name: path.read_bytes() for path in sorted(export.glob("*.safetensors"))}
