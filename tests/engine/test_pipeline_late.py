"""Runs whose time is over, or nearly: what is on disk is submitted."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from shared.clock import TokenClock
from shared.files import folder_digest
from shared.messages.encoding import encode
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus, Phase, decode_worker_job
from shared.planning.plan import Deviation, Plan
from tests.engine.worker_run import (
    ENVIRONMENT,
    ROOT,
    WAIT_S,
    finish,
    outcome_of,
    progress_of,
)
from trainer_node.engine import finish as finishing
from trainer_node.engine import pipeline
from trainer_node.engine.assemble import load_base
from trainer_node.engine.context import RunContext, read_record
from trainer_node.engine.data import token_cache
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.evaluate import metric
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.export import unverified as unverified_export
from trainer_node.engine.export import writer
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.oom_fallback import OUT_OF_MEMORY

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_late_resume_submits_the_newest_checkpoint_as_it_is(killed_job: Path) -> None:
    old = decode_worker_job(killed_job.read_bytes())
    late = replace(old, clock="wall", start_at=time.time() - 100, ready_by=time.time())
    killed_job.write_bytes(encode(late))
    outcome = finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.dev_examples == 0
    assert outcome.metrics.final_loss is None
    assert "held-out loss: not measured" in (killed_job.parent / "export" / "README.md").read_text()
    assert any("as it is" in (line.message or "") for line in progress_of(killed_job))


def test_few_scored_rows_are_the_ones_that_are_reported_and_verified(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When time is short, only the first rows are scored: other losses must be of the same rows."""
    scored = metric.measure

    def hurried(*arguments: Any, **options: Any) -> tuple[Evaluation, float]:
        result, seconds = scored(*arguments, **options)
        few = result.per_example[:3]
        return Evaluation(float(few.mean()), few), seconds

    monkeypatch.setattr(finishing, "measure", hurried)
    job = make_job()
    metrics = finish(job).metrics
    assert metrics is not None
    assert metrics.dev_examples == 3
    last = progress_of(job)[-1]
    assert (last.base_loss, last.dev_loss) == (metrics.base_loss, metrics.final_loss)


@pytest.fixture
def unverified(make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job of a run that was killed when its export was on disk."""

    def killed(*_: object) -> str | None:
        raise KeyboardInterrupt  # passes through the pipeline, as a kill would

    job = make_job()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "verify", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.main(job, Stop())
    return job


def _left(job: Path, seconds: float, **changes: Any) -> None:
    """Let the job have so much time left, on the wall clock."""
    old, now = decode_worker_job(job.read_bytes()), time.time()
    job.write_bytes(encode(replace(old, clock="wall", start_at=now - 100, ready_by=now + seconds, **changes)))


def test_an_export_that_nobody_could_verify_is_submitted_at_once_when_time_is_over(unverified: Path) -> None:
    job = unverified
    _left(job, 0.0)
    began = time.monotonic()
    outcome = finish(job)
    assert time.monotonic() - began < 1.0
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.digest == folder_digest(job.parent / "export")

    for weights in job.parent.glob("export/*.safetensors"):  # not what was exported: the checkpoint is
        weights.write_bytes(b"damaged")
    outcome = finish(job)
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is None


def test_a_finished_export_is_submitted_though_the_runs_record_is_damaged(unverified: Path) -> None:
    (unverified.parent / "run.json").write_bytes(b"\0" * 100)
    _left(unverified, 0.0)
    outcome = finish(unverified)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.digest == folder_digest(unverified.parent / "export")


@pytest.mark.parametrize(
    ("left_s", "processes", "submits"), [(0.0, 0, True), (0.0, 2, True), (600.0, 0, False)]
)
def test_it_is_submitted_before_torch_is_imported(
    left_s: float, processes: int, submits: bool, unverified: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('torch was imported')")
    _left(unverified, left_s, processes=processes)
    done = subprocess.run(
        [sys.executable, "-m", "trainer_node.engine", str(unverified)],
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=tmp_path,
    )
    if not submits:
        assert "torch was imported" in (unverified.parent / "worker.log").read_text()
        return
    assert done.returncode == 0, done.stderr
    outcome = outcome_of(unverified)
    assert outcome.status is OutcomeStatus.READY
    assert outcome.digest == folder_digest(unverified.parent / "export")
    assert outcome.step > 0
    assert progress_of(unverified)[-1].phase is Phase.DONE


@pytest.mark.parametrize(
    ("state", "wanted"), [("without a checkpoint", [False]), ("late", [True]), ("without its data", [True])]
)
def test_a_resumed_run_loads_its_model_once_and_where_it_is_used(
    state: str, wanted: list[bool], killed_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole in main memory to be submitted as it is, on its device to go on."""
    loads: list[bool] = []

    def load(run: RunContext, plan: Plan, *, whole: bool = False) -> torch.nn.Module:
        loads.append(whole)
        return load_base(run, plan, whole=whole)

    _left(killed_job, 600.0)
    monkeypatch.setattr(pipeline, "load_base", load)
    monkeypatch.setattr(unverified_export, "is_late", lambda *_: state != "without its data")
    if state == "without a checkpoint":
        shutil.rmtree(killed_job.parent / "checkpoints")
        path = killed_job.parent / "plan.json"
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
        smaller = Deviation("capacity", "2", "1", OUT_OF_MEMORY)
        path.write_bytes(msgspec.json.encode(replace(plan, deviations=[smaller])))
        monkeypatch.setattr(pipeline, "train", lambda *_: Outcome(status=OutcomeStatus.STOPPED))
    if state == "without its data":
        (killed_job.parent / "rows.json").unlink()
        (killed_job.parent / token_cache.FILE).unlink()
    outcome = finish(killed_job)
    assert outcome.status is not OutcomeStatus.FAILED, outcome.error
    assert loads == wanted


def test_of_several_processes_rank_0_alone_loads_what_is_submitted_as_it_is(
    killed_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would have a whole model in main memory."""
    folder, job = killed_job.parent, decode_worker_job(killed_job.read_bytes())
    known, found = read_record(folder), checkpoint.newest(folder / "checkpoints", pytest.fail)
    assert known is not None
    assert found is not None
    record, plan = known
    monkeypatch.setattr(unverified_export, "is_late", lambda *_: True)
    for rank in (1, 0):
        reporter = Reporter(folder / "progress.jsonl", "t", "a")
        group = ProcessGroup(rank, 2)  # without others to wait for
        run = RunContext(job, folder, TokenClock(0.0, 100.0), reporter, Stop(), group)
        outcome = pipeline.resume(run, record, plan, found)
        assert outcome.status is OutcomeStatus.READY
        assert (folder / "export" / "README.md").exists() == (rank == 0)


def test_a_run_whose_divergence_is_lost_submits_what_it_has(
    killed_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on without it would be another objective."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    killed_job.write_bytes(encode(replace(decode_worker_job(killed_job.read_bytes()), kl_coefficient=0.5)))
    monkeypatch.setattr(os, "posix_fallocate", full)
    outcome = finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    said = [line.message or "" for line in progress_of(killed_job)]
    assert any("base_states.bin can't be written" in text and "as it is" in text for text in said), said


def test_no_time_and_no_checkpoint_is_too_late(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(clock="wall", start_at=time.time() - 100, ready_by=time.time() - 1))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.TOO_LATE)


def test_a_late_start_without_a_checkpoint_is_too_late(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(clock="wall", start_at=time.time() - 1000, ready_by=time.time() + 0.01))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.TOO_LATE)
