"""A run that is short of time, and its record: to ask the base model with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from shared.clock import Clock, WallClock
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import WorkerJob
from shared.planning.throughput import Costs
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop


class SlowClock(WallClock):
    """Every look takes 10 s."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        """Return the time, which has gone on."""
        self.now += 10.0
        return self.now


def short_run(folder: Path, clock: Clock, seconds: float = 60.0, **changes: Any) -> RunContext:
    """Return a run of `seconds` from now, with changes to its job."""
    fields: dict[str, Any] = {
        "task_type": TaskType.INSTRUCT,
        "start_at": clock.time(),
        "ready_by": clock.time() + seconds,
    }
    job = WorkerJob(
        task_id="t",
        task="t",
        slot="a",
        model="upstream/tiny",
        model_path="",
        dataset="",
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(),
        hardware=Hardware(device="cpu", count=2, memory_bytes=2**34),
        **fields | changes,
    )
    return RunContext(job, folder, clock, Reporter(folder / "progress.jsonl", "t", "a"), Stop())


def record_of(data: JobData) -> RunRecord:
    """Return the record of a run that began with these rows."""
    return RunRecord(
        fingerprint="",
        base_losses=[math.log(2)] * len(data.dev),
        train_examples=len(data.train),
        train_tokens=0,
        dropped={},
        costs=Costs(),
    )
