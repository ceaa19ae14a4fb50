"""Whole jobs of the profile auto: several training runs, the best one submitted, nothing lost in between."""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shared.messages import Metrics, OutcomeStatus, Phase, TaskType, decode_worker_job, encode
from shared.planning.plan import Plan
from shared.planning.profiles import PROFILES
from tests.engine.worker_run import (
    WAIT_S,
    data_of,
    finish,
    progress_of,
    start_worker,
    weights_of,
    write_rows,
)
from trainer_node.engine.context import RunContext
from trainer_node.engine.export import unverified, writer
from trainer_node.engine.search.runner import KEPT_BYTES, is_averaged
from trainer_node.engine.search.strategy import best_of
from trainer_node.engine.search.trial import SearchRecord, TrialResult, read_search
from trainer_node.engine.train import async_saver, oom_fallback
from trainer_node.engine.train.disk_plan import CheckpointContent, DiskChoice
from trainer_node.engine.train.health import Health
from trainer_node.engine.train.state import TrainState

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def record_of(job: Path) -> SearchRecord:
    """The search's record in a job's folder."""
    found = read_search(job.parent)
    assert found is not None
    return found


def without_seconds(results: list[TrialResult]) -> list[TrialResult]:
    """What must be equal when a job is repeated: all but the real time that steps took."""
    return [replace(result, step_s=0.0, train_s=0.0) for result in results]


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


def test_a_search_ends_lower_than_its_first_trial_and_says_what_it_tried(
    make_job: Callable[..., Path],
) -> None:
    job = make_job(profile="auto", ready_by=140.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    found = record_of(job)
    best, first = best_of(found.done), found.done[0].loss
    assert len(found.done) > 2
    assert best is not None
    assert best.loss is not None
    assert first is not None
    assert best.loss < first
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss == pytest.approx(best.loss)
    refits = [result for result in found.done if result.trial.refit]
    assert refits
    card = (job.parent / "export" / "README.md").read_text()
    assert f"lowest held-out loss of {len(found.done) - len(refits)} trials" in card
    assert f"run again on all rows, {len(refits)} times" in card
    lines = progress_of(job)
    assert [phase for phase in Phase if any(line.phase is phase for line in lines)] == list(Phase)
    training = [line for line in lines if line.phase is Phase.TRAIN]
    for values in ([line.progress for line in training], [line.step for line in training]):
        assert values == sorted(values)  # several runs look like one to people
    assert not any("refused" in (line.message or "") for line in lines)


def test_all_arms_have_the_momentum_of_the_profile(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 128 would be no less than the whole matrix on so small a model.
    monkeypatch.setitem(PROFILES, "auto", replace(PROFILES["auto"], arms=("lora_r16",)))
    job = make_job(profile="auto", ready_by=40.0)
    finish(job)
    assert {arm: plan.betas for arm, plan in record_of(job).plans.items()} == {
        "dense": (0.6, 0.99),
        "LoRA r16": (0.6, 0.99),
    }


def test_the_submitted_trials_skipped_steps_are_reported(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = Health.after

    def without_a_first_gradient(health: Health, loss: float, norm: float) -> Health:
        return after(health, loss, norm if health.seen or health.skipped else math.inf)

    monkeypatch.setattr(Health, "after", without_a_first_gradient)
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert {result.step_skipped for result in record_of(job).done} == {1}
    assert outcome.metrics is not None
    assert outcome.metrics.skipped_steps == 1


def test_dense_weights_are_averaged_but_not_those_of_lora_nor_very_large_ones(
    make_plan: Callable[..., Plan],
) -> None:
    plan = make_plan()
    (first, *_), most = plan.modules, int(KEPT_BYTES / 4)
    for method, parameters, wanted in (("dense", most, True), ("dense", most + 1, False), ("lora", 1, False)):
        modules = [replace(first, method=method, parameters=parameters)]
        assert is_averaged(replace(plan, modules=modules)) is wanted


def test_only_the_best_trials_weights_stay_on_disk(make_job: Callable[..., Path]) -> None:
    job = make_job(profile="auto", ready_by=160.0)
    finish(job)
    done = record_of(job).done
    refits = [result for result in done if result.trial.refit]
    trials = [result for result in done if not result.trial.refit]
    assert len(trials) > 3
    best = sorted(trials, key=lambda result: result.loss or 0.0)[:3]
    kept = sorted(int(folder.name) for folder in (job.parent / "trials").iterdir())
    assert kept == sorted(done.index(result) for result in [*best, *refits])


def test_a_kept_trial_takes_the_room_of_the_weights_that_would_be_submitted(
    make_job: Callable[..., Path],
) -> None:
    job = make_job(profile="auto", ready_by=60.0)
    finish(job)
    done = record_of(job).done
    folders = list((job.parent / "trials").iterdir())
    assert folders
    for folder in folders:
        found = sorted(path.stem for path in folder.glob("*.safetensors"))
        assert found == [done[int(folder.name)].weights]


@pytest.mark.parametrize("profile", ["auto", "winner_2026_06"])
def test_a_search_whose_disk_has_room_for_the_last_weights_alone_submits_these(
    profile: str, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_saver, "choose", lambda *_: DiskChoice(CheckpointContent.WEIGHTS))
    job = make_job(profile=profile, ready_by=120.0)
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
    assert any("trials/000 is deleted" in (line.message or "") for line in progress_of(job))


@pytest.mark.parametrize("trials", [0, 1, 2])
def test_a_killed_search_takes_the_same_decisions(trials: int, make_job: Callable[..., Path]) -> None:
    calm, rough = (make_job(name, profile="auto", ready_by=40.0) for name in ("calm", "rough"))
    killed_after(rough, trials) if trials else kill_at_a_checkpoint(rough)
    found, wanted = finish(rough), finish(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert without_seconds(record_of(rough).done) == without_seconds(record_of(calm).done)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.metrics.resumes == 1
    assert found.metrics.final_loss == wanted.metrics.final_loss
    assert weights_of(rough) == weights_of(calm)


def kill_at_a_checkpoint(job: Path) -> None:
    """Kill the job's worker inside its first trial."""
    worker = start_worker(job)
    until = time.monotonic() + WAIT_S
    while not list((job.parent / "checkpoints").glob("step-*")) and time.monotonic() < until:
        time.sleep(0.005)
    worker.kill()
    worker.wait()


def test_the_winners_search_compares_rates_by_probes_and_trains_once(make_job: Callable[..., Path]) -> None:
    job = make_job(profile="winner_2026_06", ready_by=120.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    *probes, main, last = record_of(job).done
    assert [probe.trial.stage for probe in probes] == ["check"] * 3
    assert all(probe.probe_loss is not None and probe.loss is None for probe in probes)
    assert main.trial.main
    assert main.loss is not None
    assert last.trial.last_pass
    assert last.trial.rate == pytest.approx(main.trial.rate / 4)
    assert last.loss is not None
    assert last.loss < main.loss  # on the rows that it was trained on
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss == pytest.approx(main.loss)  # the run's own, on held-out rows
    assert main.loss < outcome.metrics.base_loss
    card = (job.parent / "export" / "README.md").read_text()
    assert "the highest rate whose probe was hardly worse than the best of 3" in card
    assert "then one pass over the development rows" in card
    assert sorted(folder.name for folder in (job.parent / "trials").iterdir()) == ["003", "004"]


def test_the_winners_probes_of_pairs_are_judged_on_pairs_held_out(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="winner_2026_06", ready_by=250.0, **data_of(TaskType.DPO, tmp_path))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    *probes, main = record_of(job).done
    assert main.trial.main
    assert main.loss is not None
    assert probes
    assert all(probe.trial.stage and probe.trial.rate <= 1.001 for probe in probes)
    lowest = min(probe.probe_loss for probe in probes if probe.probe_loss is not None)
    assert lowest < math.log(2)  # which is what the untrained model scores
    assert [probe.trial.rate for probe in probes if probe.probe_loss == lowest] == [main.trial.rate]


@pytest.mark.parametrize("trials", [0, 2, 3, 4])
def test_the_winner_killed_in_a_probe_or_after_them_takes_the_same_decisions(
    trials: int, make_job: Callable[..., Path]
) -> None:
    calm, rough = (make_job(name, profile="winner_2026_06", ready_by=120.0) for name in ("calm", "rough"))
    killed_after(rough, trials) if trials else kill_at_a_checkpoint(rough)
    found, wanted = finish(rough), finish(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert without_seconds(record_of(rough).done) == without_seconds(record_of(calm).done)
    assert weights_of(rough) == weights_of(calm)


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


def test_a_search_killed_in_its_closing_submits_a_run_on_all_rows(make_job: Callable[..., Path]) -> None:
    job = make_job(profile="auto", ready_by=140.0)
    finish(job)
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


def test_a_search_whose_kept_weights_are_damaged_submits_the_newest_checkpoint(
    make_job: Callable[..., Path],
) -> None:
    job = killed_after(make_job(profile="auto", ready_by=80.0), 1)
    for weights in (job.parent / "trials").glob("*/*.safetensors"):
        copy = weights.read_bytes()
        weights.unlink()  # a link: the checkpoint's own file stays as it is
        weights.write_bytes(copy[:-1] + b"x")
    assert finished_late(job).final_loss is None


@pytest.mark.parametrize("task_type", [TaskType.CHAT, TaskType.DPO])
def test_chat_and_preference_jobs_are_searched(
    task_type: TaskType, make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="auto", ready_by=250.0, **data_of(task_type, tmp_path))
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss - 0.02
    assert len(record_of(job).done) > 1


def test_a_search_in_real_time_ends_before_the_deadline(make_job: Callable[..., Path]) -> None:
    start = time.time()
    job = make_job(profile="auto", clock="wall", start_at=start, ready_by=start + 30.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.at < start + 30.0
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert len(record_of(job).done) > 1


def test_more_rows_than_there_is_time_for_get_one_long_run(
    make_job: Callable[..., Path], tmp_path: Path
) -> None:
    job = make_job(profile="auto", ready_by=40.0, dataset=str(write_rows(tmp_path, 20_000)))
    assert finish(job).status is OutcomeStatus.READY
    done = record_of(job).done
    assert done[-1].trial.main
    assert sum(result.tokens for result in done[:-1]) < 0.3 * done[-1].tokens


def test_a_trial_that_fails_does_not_fail_a_job_that_has_a_better_one(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = oom_fallback.descend, list[int]()

    def fails_later(run: RunContext, state: TrainState) -> None:
        calls.append(state.trial)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        real(run, state)

    monkeypatch.setattr(oom_fallback, "descend", fails_later)
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done
    assert [result.loss is None for result in done] == [False, True]
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == pytest.approx(done[0].loss)


def spoil(monkeypatch: pytest.MonkeyPatch, is_spoilt: Callable[[int], bool]) -> None:
    """Give trials of these numbers weights that are no numbers, too late for training to go back."""
    real = oom_fallback.descend

    def descend(run: RunContext, state: TrainState) -> None:
        real(run, state)
        if is_spoilt(state.trial):
            for weight in state.deltas.parameters.values():
                weight.data.fill_(math.nan)
            state.average, state.best = None, {}

    monkeypatch.setattr(oom_fallback, "descend", descend)


def test_a_trial_whose_weights_are_no_numbers_is_left_behind(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda trial: trial == 1)
    job = make_job(profile="auto", ready_by=60.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    done = record_of(job).done  # it can be read
    assert done[1].loss is None
    assert len(done) > 2
    assert not (job.parent / "trials" / "001").exists()


def test_without_a_number_from_any_trial_the_base_model_is_submitted(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda trial: True)
    job = make_job(profile="auto", ready_by=20.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == outcome.metrics.base_loss
    assert any("the base model is submitted" in (line.message or "") for line in progress_of(job))


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
