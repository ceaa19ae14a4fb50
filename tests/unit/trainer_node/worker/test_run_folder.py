"""The run folder: what it says about a run, and what is kept of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Job
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus, decode_worker_job
from shared.planning import hardware
from shared.planning.control_group import MemoryLimit
from shared.settings import Settings
from trainer_node.job.inputs import worker_job
from trainer_node.worker.run_folder import RUNS_KEPT, RunFolder

CPU = Hardware(device="cpu", count=1, memory_bytes=2**30)


def make_job(seconds: float) -> Job:
    offer = Offer(
        task_id="t", task_type=TaskType.INSTRUCT, model="org/m", hours_to_complete=1, dataset="https://h/x"
    )
    return Job(
        record_id="j",
        task_id="t",
        task="t",
        slot="a",
        gateway="g",
        offer=offer,
        decision=Decision(task_id="t", task="t", accepted=True, reason=""),
        received_at=1000,
        deadline_at=1000 + seconds,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path, "t")
    run.path.mkdir(parents=True)
    return run


@pytest.mark.parametrize(("seconds", "reserve"), [(3600, 30), (300, 30), (60, 6), (0, 0), (-5, 0)])
def test_time_is_kept_for_submitting_but_not_too_much(seconds: float, reserve: float) -> None:
    made = worker_job(Settings(), make_job(seconds), CPU, threads=1)
    assert made.ready_by == pytest.approx(1000 + seconds - reserve)
    assert (made.start_at, made.model, made.threads) == (1000, "org/m", 1)


@pytest.mark.parametrize(("own", "share"), [(True, 1.0), (False, 0.5)])
def test_a_worker_may_use_all_of_its_slots_own_limit(
    own: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_limits", lambda: [MemoryLimit(2**20, 0)])
    made = worker_job(Settings(own_memory_limit=own), make_job(60), CPU, threads=1)
    assert made.memory_share == share


def test_the_job_is_written_for_the_worker(run: RunFolder) -> None:
    made = worker_job(Settings(), make_job(60), CPU, threads=1)
    run.write_job(made)
    assert decode_worker_job(run.job_file.read_bytes()) == made


def test_the_newest_checkpoint_is_read_from_its_name(run: RunFolder) -> None:
    assert run.newest_step() is None
    for name in ("step-00000120", "step-00000090", "step-00000130.tmp", ".step-00000140", "other"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.newest_step() == 120


def test_the_outcome_is_the_workers_last_word(run: RunFolder) -> None:
    assert run.outcome() is None
    outcome = Outcome(status=OutcomeStatus.READY, digest="d", export="export")
    run.outcome_file.write_bytes(encode(outcome))
    assert run.outcome() == outcome
    assert run.export(outcome) == run.path / "export"
    run.remove_outcome()
    run.remove_outcome()
    assert run.outcome() is None


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"status": "ready"}', b'{"status": "sleeping"}', b'{"error": "\xff"}', b"\0" * 9]
)
def test_an_outcome_that_says_nothing_is_a_failure_that_may_pass(run: RunFolder, text: bytes) -> None:
    run.outcome_file.write_bytes(text)
    outcome = run.outcome()
    assert outcome is not None
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.INTERNAL)


def test_damaged_files_of_a_run_count_as_absent(run: RunFolder) -> None:
    for path in (run.job_file, run.download_file):
        path.write_bytes(b'{"task": "\xff", "model": "\xff"}')
    assert run.begun(make_job(60)) is None
    assert run.take_download() is None
    assert not run.download_file.exists()


def test_the_last_error_is_the_last_line(run: RunFolder) -> None:
    assert run.last_error() is None
    run.log_file.write_bytes(b"x" * 100_000 + b"\nTraceback\n  File\nRuntimeError: boom \xff\n\n  \n")
    assert run.last_error() == "RuntimeError: boom \ufffd"


def test_after_the_result_checkpoints_go_and_the_export_stays(run: RunFolder) -> None:
    for name in ("checkpoints/step-00000001", "export"):
        (run.path / name).mkdir(parents=True)
    of_the_data = ("data", "data.part", "tokens.safetensors", "reference.safetensors")
    for name in ("worker.log", *of_the_data, "base_states.bin", "base_states.json"):
        (run.path / name).write_text("x")
    run.clean()
    assert sorted(path.name for path in run.path.iterdir()) == ["export", "worker.log"]


def test_only_the_last_runs_are_kept(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path, f"t{number}") for number in range(RUNS_KEPT + 3)]
    for number, run in enumerate(runs):
        run.path.mkdir(parents=True)

        os.utime(run.path, (number, number))
    runs[0].clean()  # the oldest by its time, but it has just ended
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {"t0"} | {run.task for run in runs[-(RUNS_KEPT - 1) :]}
