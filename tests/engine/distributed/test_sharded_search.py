"""Searches over weights that no single device holds: two gloo processes, sharded by FSDP2."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.messages.runs import OutcomeStatus
from tests.engine.distributed.sharded_run import run_together, start_together
from tests.engine.search.search_run import assert_alike, record_of
from tests.engine.worker_run import outcome_of, progress_of, write_rows
from trainer_node.engine.distributed.launch import AGAIN
from trainer_node.engine.model.adapters import stable_name
from trainer_node.engine.search.kept_trials import kept_weights, trial_folder
from trainer_node.engine.search.trial import read_search

WAIT_S = 240.0
SIDE = str(Path(__file__).with_name("sharded_side.py"))


@pytest.fixture
def make_sharded(make_job: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a job with time for some trials, and runs on all rows after them."""
    rows = str(write_rows(tmp_path, 100))
    fixed = {"profile": "auto", "processes": 2, "dataset": rows, "checkpoint_interval_s": 3.0}
    return lambda name, **changes: make_job(name, **{"ready_by": 22.0, **fixed, **changes})


def kill_when(job: Path, is_time: Callable[[], bool], *arguments: str) -> None:
    """Start the processes of a job, and kill them when it is time."""
    processes = start_together(2, [SIDE, str(job), *arguments])
    until = time.monotonic() + WAIT_S
    try:
        while not is_time():
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ended_by_the_last(job: Path, argument: str) -> int:
    """The exit status of the last of two processes, which ends first; the other one may wait for it."""
    first, last = start_together(2, [SIDE, str(job), argument])
    status = last.wait(WAIT_S)
    first.kill()  # as the launcher does
    first.wait()
    return status


def is_in_trial(job: Path, number: int) -> bool:
    """Return whether the trial of this number is under way, those before it done, and has a checkpoint."""
    known = read_search(job.parent)
    saved = max((int(one.name[5:]) for one in (job.parent / "checkpoints").glob("step-*")), default=0)
    return known is not None and len(known.done) == number and saved > known.steps_before


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_sharded_weights_are_searched_and_a_killed_search_decides_alike(
    make_sharded: Callable[..., Path],
) -> None:
    """In the calm run each trial begins with weights that are set back, in the killed one with new ones."""
    calm, rough = make_sharded("calm"), make_sharded("rough")
    for trials in (0, 2):
        kill_when(rough, partial(is_in_trial, rough, trials))
    for job in (rough, calm):
        run_together(2, [SIDE, str(job)])
    assert_alike(rough, calm, resumes=2)
    known, metrics = record_of(calm), outcome_of(calm).metrics
    assert all(plan.parallel == "fsdp2" for plan in known.plans.values())
    assert known.width == 1
    whole = [one for one in known.done if not one.trial.refit]
    assert len(whole) >= 2
    assert all(one.factor is not None for one in whole)
    assert len(known.done) > len(whole)  # and run again on all rows
    assert metrics is not None
    assert metrics.final_loss is not None
    assert metrics.final_loss < 0.9 * metrics.base_loss
    assert any("by fsdp2" in (line.message or "") for line in progress_of(calm))


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_sharded_factors_of_lora_are_averaged(make_sharded: Callable[..., Path]) -> None:
    job = make_sharded("run", ready_by=40.0)
    run_together(2, [SIDE, str(job), "lora"])
    assert outcome_of(job).status is OutcomeStatus.READY
    known, said = record_of(job), [line.message or "" for line in progress_of(job)]
    assert set(known.plans) == {"LoRA r16"}
    assert all(plan.parallel == "fsdp2" for plan in known.plans.values())
    again = sum(result.trial.refit for result in known.done)
    assert again > 1
    assert any(f"average of {again} runs on all rows" in message for message in said)
    assert not any("refused" in message for message in said)
    assert (job.parent / "export" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_a_single_sharded_run_is_submitted_at_its_best_factor(make_sharded: Callable[..., Path]) -> None:
    job = make_sharded("run", ready_by=10.0)
    run_together(2, [SIDE, str(job), "factor"])
    (result,) = record_of(job).done
    assert result.factor == 0.75
    assert any("0.75 times its delta: held-out loss" in (line.message or "") for line in progress_of(job))
    trained = kept_weights(trial_folder(job.parent, 0), result)()
    submitted = load_file(job.parent / "export" / "adapter_model.safetensors")
    assert {stable_name(name) for name in submitted} == trained.keys()
    for name, value in submitted.items():
        share = 0.75 if ".lora_B." in name else 1.0  # the second factor starts at zero
        torch.testing.assert_close(value, share * trained[stable_name(name)])


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_on_a_full_disk_each_process_holds_its_rows_of_the_best_weights(
    make_sharded: Callable[..., Path],
) -> None:
    # With more time two runs on all rows are averaged, of which memory holds one.
    held, written = (make_sharded(name, ready_by=8.5) for name in ("held", "written"))
    run_together(2, [SIDE, str(held), "nothing"])
    run_together(2, [SIDE, str(written), "weights"])
    assert not list(held.parent.glob("trials/*"))
    assert list(written.parent.glob("trials/*"))
    assert_alike(held, written, resumes=0)
    assert [one.trial.refit for one in record_of(held).done].count(True) == 1  # of several, one would be held


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_processes_measure_their_speed_together(make_sharded: Callable[..., Path]) -> None:
    start = time.time()
    job = make_sharded("run", clock="wall", start_at=start, ready_by=start + WAIT_S)
    kill_when(job, partial(is_in_trial, job, 0))
    known = record_of(job)
    assert known.timed
    assert known.tokens_per_s > 0.0


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_memory_that_runs_out_in_one_process_while_steps_are_timed_starts_all_again(
    make_sharded: Callable[..., Path],
) -> None:
    start = time.time()
    job = make_sharded("run", clock="wall", start_at=start, ready_by=start + 2 * WAIT_S)
    assert ended_by_the_last(job, "memory") == AGAIN
    known = record_of(job)
    assert (known.timed, known.tokens_per_s, known.done, known.trial) == (True, 0.0, [], None)
    kill_when(job, partial(is_in_trial, job, 0), "memory")
    assert record_of(job).tokens_per_s == 0.0  # nothing is timed again


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_after_a_failed_trial_the_next_start_goes_on_without_it(
    make_sharded: Callable[..., Path],
) -> None:
    job = make_sharded("run")
    ranks = start_together(2, [SIDE, str(job), "fails"])
    assert [rank.wait(WAIT_S) for rank in ranks] == [AGAIN, AGAIN]
    assert not (job.parent / "outcome.json").exists()
    assert any("trial 2 failed: a bad kernel" in (line.message or "") for line in progress_of(job))
    assert [one.loss is None for one in record_of(job).done] == [False, True]
    saved = next((job.parent / "checkpoints").glob("step-*"))
    for step in (10**6, 10**6 + 1):  # that trial had come further than later ones do
        shutil.copytree(saved, saved.with_name(f"step-{step:08d}"))
    run_together(2, [SIDE, str(job), "fails"])
    assert outcome_of(job).status is OutcomeStatus.READY
    known = record_of(job).done
    assert known[1].loss is None
    refits = [number for number, one in enumerate(known) if one.trial.refit]
    assert refits
    assert all(trial_folder(job.parent, number).is_dir() for number in refits)


@pytest.mark.slow
@pytest.mark.timeout(4 * WAIT_S)
def test_a_trial_that_failed_in_one_process_alone_is_not_begun_again(
    make_sharded: Callable[..., Path],
) -> None:
    job = make_sharded("run")
    assert ended_by_the_last(job, "fails-last") == AGAIN
    assert [one.loss is None for one in record_of(job).done] == [False, True]
    run_together(2, [SIDE, str(job), "fails-last"])
    assert outcome_of(job).status is OutcomeStatus.READY
    assert record_of(job).done[1].loss is None
