"""A search that runs a trial in each of two processes: whole jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.messages.runs import OutcomeStatus
from shared.net import free_port
from tests.engine.search.search_run import assert_alike, record_of
from tests.engine.worker_run import (
    ENVIRONMENT,
    outcome_of,
    progress_of,
    start_worker,
    write_rows,
)
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.trial import read_search

WAIT_S = 300.0  # a worker is three Python processes here, on two busy cores


def slow(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts whole workers."""
    return pytest.mark.slow(pytest.mark.timeout(4 * WAIT_S)(test))


@pytest.fixture
def make_pair(make_job: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a job for two processes with time for three rounds."""
    rows = str(write_rows(tmp_path, 100))
    fixed = {
        "profile": "auto",
        "processes": 2,
        "dataset": rows,
        "ready_by": 36.0,
        "checkpoint_interval_s": 3.0,
    }
    return lambda name, **changes: make_job(name, **{**fixed, **changes})


def wait_for(condition: Callable[[], bool], job: Path, worker: subprocess.Popen[bytes]) -> None:
    """Wait for something that a worker does."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert worker.poll() is None, (job.parent / "worker.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)


def checkpoints(job: Path, rank: int) -> set[Path]:
    """A process's checkpoints."""
    folder = job.parent / "checkpoints"
    return set((folder if rank == 0 else folder / f"rank-{rank}").glob("step-*"))


def rank_of(worker: subprocess.Popen[bytes], rank: int) -> int:
    """The process id of one of a worker's children."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return int(children[rank])


@slow
def test_a_killed_and_a_stopped_search_take_the_same_decisions(make_pair: Callable[..., Path]) -> None:
    calm, rough = make_pair("calm"), make_pair("rough")
    worker = start_worker(rough)
    wait_for(lambda: bool(checkpoints(rough, 0) and checkpoints(rough, 1)), rough, worker)
    os.kill(rank_of(worker, 1), signal.SIGKILL)  # ends all
    assert worker.wait(WAIT_S) != 0
    assert not (rough.parent / "outcome.json").exists()

    worker = start_worker(rough)
    wait_for(lambda: len(record_of(rough).done) == 2 and bool(record_of(rough).running), rough, worker)
    seen = checkpoints(rough, 1)
    wait_for(lambda: bool(checkpoints(rough, 1) - seen), rough, worker)
    worker.terminate()
    assert worker.wait(WAIT_S) == 0
    assert outcome_of(rough).status is OutcomeStatus.STOPPED

    for job in (rough, calm):
        assert start_worker(job).wait(WAIT_S) == 0, (job.parent / "worker.log").read_text()
    assert_alike(rough, calm, resumes=2)
    the_record_is_that_of_two_devices(calm)


def the_record_is_that_of_two_devices(job: Path) -> None:
    """Check what a search in rounds of two shows: its trials, one run to people, all trials in the card."""
    known, lines = record_of(job), progress_of(job)
    assert known.width == 2
    refits = [one for one in known.done if one.trial.refit]
    trials = len(known.done) - len(refits)
    assert trials >= 3
    assert len({one.trial.seed for one in refits}) == len(refits) >= 2
    training = [line for line in lines if line.message is None]
    for values in ([line.progress for line in training], [line.step for line in training]):
        assert values == sorted(values)
    card = (job.parent / "export" / "README.md").read_text()
    assert f"lowest held-out loss of {trials} trials" in card
    assert not list((job.parent / "checkpoints").glob("rank-*"))


@slow
def test_the_first_round_is_chosen_by_a_speed_that_was_measured(make_pair: Callable[..., Path]) -> None:
    start = time.time()
    job = make_pair("run", clock="wall", start_at=start, ready_by=start + WAIT_S)
    worker = start_worker(job)
    wait_for(lambda: len(getattr(read_search(job.parent), "done", [])) >= 2, job, worker)
    worker.terminate()
    assert worker.wait(WAIT_S) == 0
    known = record_of(job)
    assert known.width == 2
    assert known.timed
    assert known.tokens_per_s > 0.0
    assert known.done[0].loss is not None
    told = [line.message for line in progress_of(job) if "tokens take" in (line.message or "")]
    assert len(told) == 1


@slow
@pytest.mark.parametrize("fails", [[], ["always"]], ids=["once", "always"])
def test_a_process_whose_trial_fails_does_not_fail_the_job(
    fails: list[str], make_pair: Callable[..., Path]
) -> None:
    """One that fails forgets its model: when the best trial is submitted only some processes have theirs."""
    job = make_pair("run")
    side = str(Path(__file__).with_name("failing_side.py"))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, side, str(job), *fails], env={**ENVIRONMENT, **shared, "RANK": f"{rank}"}
        )
        for rank in range(2)
    ]
    assert [rank.wait(WAIT_S) for rank in ranks] == [0, 0]
    outcome, known = outcome_of(job), record_of(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert [one.loss is None for one in known.done[:2]] == [False, True]
    assert len(known.done) > 2
    best = best_of(known.done)
    assert best is not None
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == pytest.approx(best.loss)
    assert any("trial 2 failed: RuntimeError: a bad kernel" in (x.message or "") for x in progress_of(job))
