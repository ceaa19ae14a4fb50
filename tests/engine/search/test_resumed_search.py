"""Searches that are killed: the same decisions after it, and something to submit if no time is left."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shared.clock import TokenClock
from shared.messages.encoding import encode
from shared.messages.runs import Metrics, OutcomeStatus, decode_worker_job
from shared.planning.plan import Deviation, Plan
from tests.engine.search.search_run import assert_alike, record_of
from tests.engine.worker_run import (
    WAIT_S,
    finish,
    progress_of,
    start_worker,
    wait_for_checkpoint,
)
from trainer_node.engine.context import RunContext
from trainer_node.engine.export import unverified
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.search import take_up
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.trial import SearchRecord, Trial, read_search, without_loss
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import oom_fallback
from trainer_node.engine.train.oom_fallback import OUT_OF_MEMORY
from trainer_node.engine.train.state import TrainState

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def killed_after(job: Path, trials: int) -> Path:
    """The job, its worker killed when so many trials are done."""
    worker = start_worker(job)
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        found = read_search(job.parent)
        if found is not None and len(found.done) >= trials:
            break
        assert worker.poll() is None, (job.parent / "worker.log").read_text()
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    assert len(record_of(job).done) >= trials
    return job


def kill_at_a_checkpoint(job: Path) -> None:
    """Kill the job's worker inside its first trial."""
    worker = start_worker(job)
    wait_for_checkpoint(job, worker)
    worker.kill()
    worker.wait()


def finished_late(job: Path) -> Metrics:
    """Start a job again when its time is over; what it submitted."""
    old = decode_worker_job(job.read_bytes())
    job.write_bytes(encode(replace(old, clock="wall", start_at=time.time() - 100, ready_by=time.time())))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    return outcome.metrics


def said_to_be_submitted(job: Path) -> list[int]:
    """The trials that were reported to be submitted as they are."""
    texts = [line.message or "" for line in progress_of(job)]
    found = [re.search(r"trial (\d+) is submitted as it is", text) for text in texts]
    return [int(one[1]) for one in found if one]


@pytest.mark.parametrize("trials", [0, 1, 2])
def test_a_killed_search_takes_the_same_decisions(
    trials: int, finished_job: Callable[..., Path], make_job: Callable[..., Path]
) -> None:
    kind: dict[str, Any] = {"profile": "auto", "ready_by": 40.0}
    calm, rough = finished_job(**kind), make_job(**kind)
    killed_after(rough, trials) if trials else kill_at_a_checkpoint(rough)
    finish(rough)
    assert_alike(rough, calm, resumes=1)


@pytest.mark.parametrize("trials", [0, 2, 3, 4])
def test_the_winner_killed_in_a_probe_or_after_them_takes_the_same_decisions(
    trials: int, finished_job: Callable[..., Path], make_job: Callable[..., Path]
) -> None:
    kind: dict[str, Any] = {"profile": "winner_2026_06", "ready_by": 120.0}
    calm, rough = finished_job(**kind), make_job(**kind)
    killed_after(rough, trials) if trials else kill_at_a_checkpoint(rough)
    finish(rough)
    assert_alike(rough, calm, resumes=1)


def test_a_search_that_comes_back_too_late_submits_its_best_trial(make_job: Callable[..., Path]) -> None:
    job = killed_after(make_job(profile="auto", ready_by=80.0), 2)
    done = record_of(job).done
    best = best_of(done)
    assert best is not None
    metrics = finished_late(job)
    assert (metrics.steps, metrics.tokens) == (best.step, best.step_tokens)
    assert metrics.final_loss == pytest.approx(best.loss)
    assert metrics.dev_examples == len(best.losses)
    assert said_to_be_submitted(job) == [done.index(best) + 1]
    assert f"lowest held-out loss of {len(done)} trials" in (job.parent / "export" / "README.md").read_text()


def test_a_search_killed_in_its_closing_submits_a_run_on_all_rows(
    finished_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = (
        Path(shutil.copytree(finished_job(profile="auto", ready_by=140.0).parent, tmp_path / "run"))
        / "job.json"
    )
    for name in ("outcome.json", unverified.FILE):
        (job.parent / name).unlink(missing_ok=True)
    done = record_of(job).done
    best, refits = best_of(done), [one for one in done if one.trial.refit]
    assert best is not None
    lowest = min(refits, key=lambda one: one.loss or 0.0)
    metrics = finished_late(job)
    assert (metrics.steps, metrics.tokens) == (lowest.step, lowest.step_tokens)
    assert metrics.final_loss == pytest.approx(best.loss)  # a run on all rows was trained on these
    assert said_to_be_submitted(job) == [done.index(lowest) + 1]


def test_a_search_whose_kept_weights_are_damaged_submits_the_newest_checkpoint(
    make_job: Callable[..., Path],
) -> None:
    job = killed_after(make_job(profile="auto", ready_by=80.0), 1)
    for weights in (job.parent / "trials").glob("*/*.safetensors"):
        copy = weights.read_bytes()
        weights.unlink()  # a link: the checkpoint's own file stays as it is
        weights.write_bytes(copy[:-1] + b"x")
    assert finished_late(job).final_loss is None


def test_a_trial_that_keeps_ending_its_worker_is_given_up(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = oom_fallback.descend

    def dies(run: RunContext, state: TrainState) -> None:
        if state.trial == 1:
            raise KeyboardInterrupt  # passes through the pipeline, as a kill would
        real(run, state)

    monkeypatch.setattr(oom_fallback, "descend", dies)
    job = make_job(profile="auto", ready_by=60.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finish(job)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done
    assert done[1].loss is None
    assert len(done) > 2  # the search goes on with others
    assert any("is given up" in (line.message or "") for line in progress_of(job))


def single_run(path: Path) -> RunContext:
    """What a job has when its process begins."""
    reporter = Reporter(path.parent / "progress.jsonl", "t", "a")
    job = decode_worker_job(path.read_bytes())
    return RunContext(job, path.parent, TokenClock(0.0, 100.0), reporter, Stop())


def test_on_fewer_devices_a_search_is_planned_at_their_speed(
    make_job: Callable[..., Path], make_plan: Callable[..., Plan]
) -> None:
    run = single_run(make_job())
    plan = make_plan("dense", parallel="ddp", devices=4, expected_tokens_per_s=3000.0)
    known = SearchRecord(began_at=0.0, all_s=100.0, plans={"dense": plan}, tokens_per_s=2000.0)
    known = known.finished(without_loss(Trial(arm="dense")), 0, 0)
    for _ in range(2):  # a second start is on the same device
        known, _ = take_up(run, known, plan, None)
        one = known.plans["dense"]
        assert (one.parallel, one.devices, one.expected_tokens_per_s) == ("single", 1, 750.0)
        assert (known.tokens_per_s, known.done[0].devices) == (500.0, 4)


def test_only_the_arm_whose_memory_ran_out_needs_less(
    make_job: Callable[..., Path], make_plan: Callable[..., Plan]
) -> None:
    run = single_run(make_job())
    plans = {"dense": make_plan("dense", capacity=128), "lora": make_plan("lora", capacity=64)}
    known = SearchRecord(began_at=0.0, all_s=100.0, plans=plans).started(Trial(arm="dense"), 0)
    why = Deviation("activation checkpointing", "off", "on", OUT_OF_MEMORY)
    smaller = replace(plans["dense"], activation_checkpointing=True, deviations=[why])
    known, _ = take_up(run, known, smaller, None)
    assert known.plans == {**plans, "dense": smaller}
    assert known.starts == 1  # of several processes each rung is a start
    known = replace(known, trial=Trial(arm="lora"))
    known, _ = take_up(run, known, smaller, None)  # the newest plan on disk is still the first arm's
    assert known.plans == {**plans, "dense": smaller}
    again = replace(plans["lora"], capacity=32, deviations=[why])
    known, _ = take_up(run, known, replace(again, deviations=[why, why]), None)
    assert known.plans["lora"].capacity == 32
