"""Benches time and replace parts of the engine by name: each name must still be what a run calls."""

import time
from pathlib import Path

import pytest

from bench.deadline import simulated_pipeline, stage_costs
from bench.harness import tiny_jobs
from shared.messages.hardware import Hardware

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_every_timed_part_is_called(tmp_path: Path) -> None:
    now = time.time()
    job = tiny_jobs.write_job(
        tmp_path / "run",
        tiny_jobs.write_rows(tmp_path / "rows.json", 100),
        clock="wall",
        start_at=now,
        ready_by=now + 120.0,  # on a busy machine 30 s leave no time to verify
        hardware=Hardware(device="cpu", count=2, memory_bytes=2**33),
    )
    report = stage_costs.measure(job)
    called = {name for name, costs in report["seconds"].items() if costs["calls"]}
    assert called == set(report["seconds"])
    assert report["step_share"] > 0


def test_every_replaced_part_exists() -> None:
    for module, name, _ in (*simulated_pipeline.COSTS, *simulated_pipeline.IDLE):
        assert callable(getattr(module, name)), name
