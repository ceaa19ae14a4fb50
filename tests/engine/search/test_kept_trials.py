"""The weights of finished trials on disk: which stay, what they take, and what makes room."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shared.messages.runs import OutcomeStatus
from shared.planning.plan import Plan
from tests.engine.search.search_run import record_of
from tests.engine.worker_run import finish, progress_of
from trainer_node.engine.context import RunContext
from trainer_node.engine.export import writer
from trainer_node.engine.search.kept_trials import staying, trial_folder
from trainer_node.engine.search.strategy.budget import KEPT_BYTES, is_averaged
from trainer_node.engine.search.trial import Trial, TrialResult
from trainer_node.engine.train import async_saver, oom_fallback
from trainer_node.engine.train.disk_plan import CheckpointContent, DiskChoice
from trainer_node.engine.train.state import TrainState

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_weights_are_averaged_but_not_very_large_ones(
    make_plan: Callable[..., Plan],
) -> None:
    plan = make_plan()
    (first, *_), most = plan.modules, int(KEPT_BYTES / 4)
    for method, parameters, wanted in (
        ("dense", most, True),
        ("dense", most + 1, False),
        ("lora", most, True),
        ("lora", most + 1, False),
    ):
        modules = [replace(first, method=method, parameters=parameters)]
        assert is_averaged(replace(plan, modules=modules)) is wanted


def test_only_the_best_trials_weights_stay_on_disk(finished_job: Callable[..., Path]) -> None:
    job = finished_job(profile="auto", ready_by=75.0)
    done = record_of(job).done
    refits = [result for result in done if result.trial.refit]
    trials = [result for result in done if not result.trial.refit]
    assert len(trials) > 3
    best = sorted(trials, key=lambda result: result.loss or 0.0)[:3]
    kept = sorted(int(folder.name) for folder in (job.parent / "trials").iterdir())
    assert kept == sorted(done.index(result) for result in [*best, *refits])


@pytest.mark.parametrize(
    ("size", "trials", "refits"), [(4e9, 3, 2), (4.1e9, 1, 2), (8e9, 1, 2), (8.1e9, 1, 1)]
)
def test_of_larger_weights_fewer_trials_stay(size: float, trials: int, refits: int) -> None:
    done = [
        TrialResult(trial=Trial(arm="dense", seed=seed, refit=refit), loss=2.0 - seed, tokens=1, train_s=1.0)
        for refit, count in ((False, 4), (True, 2))
        for seed in range(count)
    ]
    found = staying(done, int(size))
    assert [one.trial.seed for one in found if not one.trial.refit] == [3, 2, 1][:trials]
    assert sum(one.trial.refit for one in found) == refits


def test_the_trial_that_runs_on_all_rows_should_repeat_stays_though_another_is_lower() -> None:
    lora = TrialResult(trial=Trial(arm="lora"), loss=2.0, tokens=1, train_s=1.0)
    dense = TrialResult(trial=Trial(arm="dense"), loss=1.99, tokens=1, train_s=1.0)
    for size in (4.1e9, 8.1e9):
        assert staying([lora, dense], int(size)) == [dense]
        assert staying([lora, dense], int(size), {"lora"}) == [dense, lora]
        lower = replace(dense, loss=1.9)
        assert staying([lora, lower], int(size), {"lora"}) == [lower]
    refit = replace(lora, trial=Trial(arm="lora", refit=True, of=0), loss=1.5)
    assert staying([lora, dense, refit], int(8.1e9)) == [dense, lora, refit]


def test_a_kept_trial_takes_the_room_of_the_weights_that_would_be_submitted(
    finished_job: Callable[..., Path],
) -> None:
    job = finished_job(profile="auto", ready_by=75.0)
    done = record_of(job).done
    folders = list((job.parent / "trials").iterdir())
    assert folders
    for folder in folders:
        found = sorted(path.stem for path in folder.glob("*.safetensors"))
        assert found == [done[int(folder.name)].weights]


@pytest.mark.parametrize(("profile", "ready_by"), [("auto", 60.0), ("winner_2026_06", 120.0)])
def test_a_search_whose_disk_has_room_for_the_last_weights_alone_submits_these(
    profile: str, ready_by: float, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_saver, "choose", lambda *_: DiskChoice(CheckpointContent.WEIGHTS))
    job = make_job(profile=profile, ready_by=ready_by)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    whole = [result for result in record_of(job).done if not result.trial.stage]
    assert all(result.loss is not None for result in whole)
    assert {result.weights for result in whole} == {"weights"}
    assert not any(result.snapshots for result in whole)


def test_kept_trials_make_room_for_the_export(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, write = make_job(profile="auto", ready_by=40.0), writer.write

    def full_at_first(*arguments: Any) -> Any:
        if list((job.parent / "trials").iterdir()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(writer, "write", full_at_first)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert any(re.search(r"trials/\d+ is deleted", line.message or "") for line in progress_of(job))


def test_a_search_that_lost_its_trials_weights_submits_the_run_on_all_rows(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were in main memory, say, as the disk was full, and the worker was started again."""
    job, real = make_job(profile="auto", ready_by=80.0), oom_fallback.descend

    def descend(run: RunContext, state: TrainState) -> None:
        trial = record_of(job).trial
        if trial is not None and trial.refit:
            for number, one in enumerate(record_of(job).done):
                if not one.trial.refit:
                    shutil.rmtree(trial_folder(job.parent, number), ignore_errors=True)
        real(run, state)

    monkeypatch.setattr(oom_fallback, "descend", descend)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done
    refits = [one for one in done if one.trial.refit]
    assert refits
    assert outcome.metrics is not None
    assert outcome.metrics.steps == min(refits, key=lambda one: one.loss or 9.0).step
    assert outcome.metrics.final_loss == pytest.approx(
        min(one.loss or 9.0 for one in done if not one.trial.refit)
    )


def test_a_search_without_room_for_any_weights_submits_those_in_memory(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_saver, "choose", lambda *_: DiskChoice(CheckpointContent.NOTHING))
    job = make_job(profile="auto", ready_by=80.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert not list(job.parent.glob("trials/*"))
    done = record_of(job).done
    assert len([one for one in done if not one.trial.refit]) > 1
    assert any(one.trial.refit for one in done)
    assert outcome.metrics is not None
    lowest = min(one.loss or 9.0 for one in done if not one.trial.refit)
    assert outcome.metrics.final_loss == pytest.approx(lowest)
    assert lowest < 0.9 * outcome.metrics.base_loss
