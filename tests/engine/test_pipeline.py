"""Whole runs in processes of their own: to the end, killed, stopped, and what is chosen."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.files import folder_digest
from shared.messages.offers import TaskType
from shared.messages.runs import OutcomeStatus, Phase
from shared.planning.plan import numbers_in
from shared.planning.throughput import FIXED_S
from tests.engine.worker_run import (
    ENVIRONMENT,
    WAIT_S,
    data_of,
    finish,
    outcome_of,
    progress_of,
    start_worker,
    wait_for_checkpoint,
    weights_of,
    write_rows,
)
from trainer_node.engine.context import RunContext, read_record
from trainer_node.engine.train import checkpoint, oom_fallback, saved_state
from trainer_node.engine.train.oom_fallback import descend
from trainer_node.engine.train.state import TrainState

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("profile", ["maximum_accuracy", "lora_r16"])
def test_killed_and_stopped_runs_end_bit_equal_to_an_undisturbed_one(
    profile: str, finished_job: Callable[..., Path], make_job: Callable[..., Path]
) -> None:
    calm, rough = finished_job(profile=profile), make_job(profile=profile)
    worker = start_worker(rough)
    wait_for_checkpoint(rough, worker)
    worker.kill()
    worker.wait()
    worker = start_worker(rough)
    wait_for_checkpoint(rough, worker)
    asked = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(WAIT_S) == 0
    assert time.monotonic() - asked < 30.0
    stopped = outcome_of(rough)
    assert stopped.status is OutcomeStatus.STOPPED
    assert (rough.parent / "checkpoints" / f"step-{stopped.step:08d}" / "manifest.json").exists()

    found, wanted = finish(rough), outcome_of(calm)
    assert found.status is OutcomeStatus.READY, found.error
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.step > stopped.step
    assert found.metrics.resumes == 2
    assert found.metrics.kind == "adapter"  # of the tiny model, also where its deltas are dense
    assert wanted.metrics.final_loss is not None
    assert wanted.metrics.base_loss is not None
    assert found.metrics.final_loss == wanted.metrics.final_loss < 0.9 * wanted.metrics.base_loss
    assert found.metrics.steps == wanted.metrics.steps
    assert weights_of(rough) == weights_of(calm)
    assert wanted.digest == folder_digest(calm.parent / "export")


def test_a_killed_preference_run_ends_bit_equal_and_never_asks_the_base_model_again(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    kind = {**data_of(TaskType.DPO, tmp_path), "profile": "lora_r16", "checkpoint_interval_s": 1.0}
    calm, rough = make_job("calm", **kind), make_job("rough", **kind)
    worker = start_worker(rough)
    wait_for_checkpoint(rough, worker)
    worker.kill()
    worker.wait()
    reference = rough.parent / "reference.safetensors"
    written = reference.stat().st_mtime_ns
    found, wanted = finish(rough), finish(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.metrics.resumes == 1
    assert reference.stat().st_mtime_ns == written
    assert found.metrics.base_loss == pytest.approx(math.log(2))
    assert found.metrics.final_loss == wanted.metrics.final_loss
    assert wanted.metrics.final_loss is not None
    assert wanted.metrics.final_loss < 0.9 * math.log(2)
    assert weights_of(rough) == weights_of(calm)


@pytest.mark.parametrize("profile", ["maximum_accuracy", "lora_r16"])
def test_a_killed_run_with_a_divergence_ends_bit_equal_and_nearer_to_the_base_model(
    profile: str, finished_job: Callable[..., Path], make_job: Callable[..., Path]
) -> None:
    kind = {"profile": profile, "kl_coefficient": 2.0, "checkpoint_interval_s": 1.0}
    calm, rough, free = make_job("calm", **kind), make_job("rough", **kind), finished_job(profile=profile)
    worker = start_worker(rough)
    wait_for_checkpoint(rough, worker)
    worker.kill()
    worker.wait()
    written = (rough.parent / "base_states.json").stat().st_mtime_ns
    found, wanted, other = finish(rough), finish(calm), outcome_of(free)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert other.metrics is not None
    assert found.metrics.resumes == 1
    assert (rough.parent / "base_states.json").stat().st_mtime_ns == written
    assert not any("refused" in (line.message or "") for line in progress_of(calm))
    assert found.metrics.final_loss == wanted.metrics.final_loss
    assert weights_of(rough) == weights_of(calm)
    assert wanted.metrics.base_loss == other.metrics.base_loss
    assert wanted.metrics.final_loss is not None
    assert other.metrics.final_loss is not None
    assert other.metrics.final_loss + 0.1 < wanted.metrics.final_loss < wanted.metrics.base_loss - 0.05


@pytest.mark.parametrize("profile", ["maximum_accuracy", "lora_r16"])
@pytest.mark.parametrize("task_type", [TaskType.CHAT, TaskType.DPO])
def test_chat_and_preference_jobs_end_better_than_they_began(
    task_type: TaskType, profile: str, make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile=profile, **data_of(task_type, tmp_path))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss - 0.02
    assert any(line.phase is Phase.VERIFY for line in progress_of(job))
    assert not any("refused" in (line.message or "") for line in progress_of(job))


@pytest.mark.parametrize("after_s", [0.0, 0.3])  # while torch and the model are read, while rows are
def test_sigterm_before_training_stops_at_once(after_s: float, make_job: Callable[..., Path]) -> None:
    job = make_job()
    worker = start_worker(job)
    until = time.monotonic() + WAIT_S
    while not (job.parent / "progress.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(after_s)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(WAIT_S) == 0
    assert outcome_of(job).status is OutcomeStatus.STOPPED


def test_a_run_outlives_its_node(make_job: Callable[..., Path]) -> None:
    job = make_job()
    with subprocess.Popen(
        [sys.executable, "-m", "trainer_node.engine", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.close()
        wait_for_checkpoint(job, worker)
        worker.send_signal(signal.SIGHUP)
        worker.send_signal(signal.SIGPIPE)
        assert worker.wait(WAIT_S) == 0
    assert outcome_of(job).status is OutcomeStatus.READY


@pytest.mark.alone
def test_real_time_ends_before_the_deadline(make_job: Callable[..., Path], tmp_path: Path) -> None:
    data, start = write_rows(tmp_path, 20_000), time.time()  # more than there is time for
    job = make_job(clock="wall", start_at=start, ready_by=start + 25.0, dataset=str(data))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.at < start + 25.0
    lines = progress_of(job)
    assert [phase for phase in Phase if any(line.phase is phase for line in lines)] == list(Phase)
    training = [line.progress for line in lines if line.phase is Phase.TRAIN]
    assert training == sorted(training)
    assert any("plan:" in (line.message or "") for line in lines)
    (numbers,) = filter(None, (numbers_in(line.message or "") for line in lines))
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None  # there is time to score what is submitted
    known = read_record(job.parent)
    assert known is not None
    record, plan = known
    assert (numbers["profile"], numbers["capacity"]) == (plan.profile, plan.capacity)
    # An export of dense changes loads the base model, to subtract it.
    assert any(module.method == "dense" for module in plan.modules)
    assert record.costs.export_s > record.costs.load_s + FIXED_S


def test_a_run_that_fails_keeps_the_checkpoint_that_is_being_written(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: RunContext, state: TrainState) -> None:
        state.step = 1
        save(state, run.reporter)
        raise RuntimeError("the device is gone")

    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        write(*args)

    save, write = saved_state.save, checkpoint.save
    monkeypatch.setattr(oom_fallback, "descend", fails)
    monkeypatch.setattr(checkpoint, "save", slowly)
    job = make_job()
    assert finish(job).status is OutcomeStatus.FAILED
    assert (job.parent / "checkpoints" / "step-00000001" / "manifest.json").exists()


@pytest.mark.parametrize("spoilt", [-3.0, math.nan])
@pytest.mark.parametrize("earlier", [True, False])
def test_weights_worse_than_the_base_model_are_not_submitted(
    spoilt: float, earlier: bool, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(run: RunContext, state: TrainState) -> None:
        descend(run, state)
        state.saver.wait()
        state.average, state.best = None, {}
        for name, weight in state.deltas.parameters.items():
            if ".lora_B." in name:  # the opposite of what was learned, or no number
                weight.data.mul_(spoilt)
        if not earlier:
            for old in (run.folder / "checkpoints").glob("step-*"):
                shutil.rmtree(old)

    monkeypatch.setattr(oom_fallback, "descend", spoil)
    job = make_job(profile="lora_r16", ready_by=15.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    metrics, whole = outcome.metrics, max(line.step for line in progress_of(job))
    assert metrics is not None
    assert metrics.final_loss is not None
    why = "not finite" if math.isnan(spoilt) else "worse than the base model's"
    assert any(line.message == f"the trained weights are {why}" for line in progress_of(job))
    if earlier:
        assert 0 < metrics.steps < whole
        assert metrics.final_loss < metrics.base_loss
    else:
        assert (metrics.steps, metrics.final_loss) == (0, metrics.base_loss)


def test_a_resume_goes_on_from_its_tokens(killed_job: Path) -> None:
    (killed_job.parent / "rows.json").unlink()
    outcome = finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
def test_a_run_whose_record_is_damaged_begins_again(name: str, killed_job: Path) -> None:
    folder = killed_job.parent
    (folder / name).write_bytes(b'{"fingerprint": "\xff", "profile": "\xff"}')
    (folder / "search.json").write_bytes(b"\0" * 50)
    later = folder / "checkpoints" / "step-00999999"
    (folder / "checkpoints").rename(folder / "old")
    later.parent.mkdir()
    (folder / "old" / max(path.name for path in (folder / "old").glob("step-*"))).rename(later)
    outcome = finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.resumes == 0
    assert not later.exists()
    assert any("it begins again" in (line.message or "") for line in progress_of(killed_job))


def test_a_damaged_checkpoint_is_skipped_aloud(killed_job: Path) -> None:
    for weights in killed_job.parent.glob("checkpoints/*/weights.safetensors"):
        weights.write_bytes(b"damaged")
    outcome = finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.resumes == 0
    assert any("damaged" in (line.message or "") for line in progress_of(killed_job))
