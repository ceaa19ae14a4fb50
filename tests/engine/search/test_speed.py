"""What the first trial is chosen by: how fast steps of two sizes are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace

from shared.clock import WallClock
from shared.messages.runs import OutcomeStatus
from tests.engine.search.search_run import record_of
from tests.engine.search.strategy.surfaces import plenty
from tests.engine.worker_run import finish, progress_of, write_rows
from trainer_node.engine import prepare
from trainer_node.engine.context import RunContext, read_record
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.search import search, speed
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.speed import (
    StepTime,
    is_affordable,
    is_settled,
    mean_of,
    slowest,
    speed_of,
    steady,
    step_times,
    times_alone,
    to_time,
    with_speed,
)
from trainer_node.engine.search.strategy.budget import Budget, Speed
from trainer_node.engine.search.trial import SearchRecord, Trial
from trainer_node.engine.train.state import TrainState

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def batches(budget: Budget, batch: int) -> list[int]:
    """The batches whose steps are timed where the first trial has this one."""
    return [trial.batch for trial in to_time(Trial(arm="dense", batch=batch), budget)]


def test_steps_of_the_first_trial_and_of_another_batch_are_timed() -> None:
    budget = plenty(left_s=50 * 32 * 20 / 1000.0)  # 2% is 32 rows of 20 tokens
    assert batches(budget, 16) == [16, 4]
    assert batches(budget, 64) == [32, 8]
    assert batches(budget, 2) == [2, 8]
    assert batches(replace(budget, devices=8), 16) == [16]  # each device needs a row
    assert batches(replace(budget, devices=32), 64) == [32]
    assert batches(replace(budget, devices=64), 64) == []


def test_steps_that_compute_as_many_tokens_tell_nothing() -> None:
    budget = plenty(left_s=50 * 32 * 20 / 1000.0, least_batch=16.0)
    assert batches(budget, 16) == [16]
    assert batches(budget, 4) == [4]
    assert batches(replace(budget, left_s=1e6), 16) == [16, 64]


def test_steps_that_would_take_much_of_the_time_are_not_timed() -> None:
    budget = plenty(left_s=10.0, least_batch=20.0)  # a step computes 20 rows of 20 tokens: .4 s
    assert batches(budget, 2) == []
    assert batches(replace(budget, left_s=20.0), 2) == [2]
    assert batches(replace(budget, others={"dense": Speed(2000.0)}), 2) == [2]  # such steps take .2 s


def test_a_second_size_is_not_timed_if_steps_turn_out_to_be_slow() -> None:
    budget, larger = plenty(left_s=50.0), Trial(arm="dense", batch=8)  # 160 tokens in a second at most
    assert is_affordable(larger, StepTime(0.25, 40.0), budget)
    assert not is_affordable(larger, StepTime(0.26, 40.0), budget)
    assert not is_affordable(larger, StepTime(75.0, 40.0), budget)


@pytest.mark.parametrize(
    ("times_of_steps", "tokens_per_s", "step_s"),
    [
        ([StepTime(3.0, 200.0)], 200 / 1.5, 1.5),
        ([StepTime(3.0, 200.0), StepTime(1.5, 50.0)], 100.0, 1.0),
        ([StepTime(1.0, 50.0), StepTime(4.0, 200.0)], 50.0, 0.0),
        ([StepTime(1.0, 50.0), StepTime(5.0, 200.0)], 40.0, 0.0),  # memory, say: larger steps are slower
        ([StepTime(1.0, 50.0), StepTime(0.9, 200.0)], 200 / 0.09, 0.81),  # noise
        ([StepTime(1.0, 50.0), StepTime(1.03, 200.0)], 200 / 0.13, 0.9),  # nothing but what comes besides
    ],
)
def test_two_sizes_tell_tokens_from_what_a_step_takes_besides(
    times_of_steps: list[StepTime], tokens_per_s: float, step_s: float
) -> None:
    found = speed_of(times_of_steps)
    assert (found.tokens_per_s, found.step_s) == pytest.approx((tokens_per_s, step_s))


@pytest.mark.parametrize(("device", "timed"), [("cpu", [4, 16, 4]), ("cuda", [16, 4])])
def test_on_a_cpu_smaller_steps_come_first_and_do_not_count(
    device: str, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()

    def step_time_of(runner: TrialRunner, trial: Trial, budget: Budget) -> StepTime:
        seen.append(trial.batch)
        return StepTime(3.0 - len(seen), 20.0 * trial.batch)

    monkeypatch.setattr(speed, "step_time_of", step_time_of)
    group = ProcessGroup(device=torch.device(device))
    runner = SimpleNamespace(run=SimpleNamespace(process_group=group))
    budget = plenty(left_s=50 * 32 * 20 / 1000.0, tokens_per_s=1000.0)
    found = step_times(cast(TrialRunner, runner), Trial(arm="dense", batch=16), budget)
    assert seen == timed
    assert [one.tokens for one in found] == [320.0, 80.0]
    assert found[-1].seconds == 3.0 - len(timed)


def steps(*seconds: float) -> list[StepTime]:
    return [StepTime(one, 100.0) for one in seconds]


def test_steps_are_timed_until_enough_are_steady() -> None:
    assert not is_settled(steps(2.8), 32)
    assert not is_settled(steps(2.8, 2.1, 1.4), 16)  # each is faster than the one before
    assert not is_settled(steps(1.0, 1.0), 8)  # 16 rows: they may be short ones
    assert is_settled(steps(2.8, 2.1, 1.4, 1.38), 16)
    assert is_settled(steps(1.0, 1.2), 16)
    assert is_settled(steps(1.0, 1.0), 0)  # padded: rows make no difference
    assert not is_settled(steps(2.0, 1.0), 0)


def test_the_first_slow_steps_do_not_count() -> None:
    assert steady(steps(2.8, 2.1, 1.5, 1.25, 1.6)) == steps(1.5, 1.25, 1.6)
    assert steady(steps(1.0, 3.0)) == steps(1.0, 3.0)  # of something else than its beginning
    assert steady([StepTime(1.0, 50.0), StepTime(1.5, 100.0)]) == [StepTime(1.5, 100.0)]  # by the token
    assert mean_of(steps(1.0, 2.0)) == StepTime(1.5, 100.0)


def test_a_stop_before_steps_count_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(speed, "step_time_of", lambda runner, trial, budget: asked.append(trial.batch))
    runner = SimpleNamespace(run=SimpleNamespace(process_group=ProcessGroup()))
    budget = plenty(left_s=50 * 32 * 20 / 1000.0)
    assert step_times(cast(TrialRunner, runner), Trial(arm="dense", batch=16), budget) == []
    assert asked == [4]


def test_of_several_devices_the_slowest_one_counts() -> None:
    fast, slow = [StepTime(1.0, 100.0), StepTime(9.0, 300.0)], [StepTime(1.0, 90.0)]
    assert slowest([fast, slow, []]) == slow
    assert slowest([slow, fast]) == slow
    assert slowest([[], []]) == []


def test_what_is_measured_is_no_part_of_the_time_that_is_shared_out() -> None:
    known = SearchRecord(began_at=10.0, all_s=100.0, plans={})
    measured = with_speed(known, "dense", [StepTime(3.0, 200.0), StepTime(1.5, 50.0)], spent_s=6.0)
    assert (measured.began_at, measured.all_s) == (16.0, 94.0)
    assert measured.timed_arm == "dense"
    assert (measured.tokens_per_s, measured.step_s) == pytest.approx((100.0, 1.0))


def test_a_stop_while_steps_are_timed_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "timed_step", lambda *_: False)
    run = SimpleNamespace(process_group=ProcessGroup(), own_clock=WallClock(), stop=None)
    model = SimpleNamespace(model=torch.nn.Identity())
    plan = SimpleNamespace(pack_examples=None)
    state = SimpleNamespace(device=torch.device("cpu"), deltas=model, step=0, tokens=0, plan=plan)
    found = speed._timed(cast(RunContext, run), cast(TrainState, state), 1.0, Trial(arm="dense"), plenty())
    assert found is None


def test_a_process_whose_steps_fail_measures_nothing_and_forgets_its_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step_times(*_: Any) -> list[StepTime]:
        raise RuntimeError("a bad kernel")

    monkeypatch.setattr(speed, "step_times", step_times)
    unused = cast(Any, None)
    runner = TrialRunner(unused, unused, unused, unused, unused, unused, [torch.nn.Identity()])
    assert times_alone(runner, Trial(arm="dense"), plenty()) == []
    assert runner.models == []


@pytest.mark.alone  # it trains at the speed that was measured as long as nothing else begins
@pytest.mark.parametrize("times", [20.0, 2000.0])
def test_the_first_trial_is_chosen_by_a_speed_that_was_measured(
    times: float, make_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, measured = prepare.train_rate, speed.measure_speed

    def measure_speed(run: RunContext, runner: TrialRunner, trial: Trial, budget: Budget) -> None:
        measured(run, runner, trial, budget)
        assert runner.adapted is not None
        assert runner.start is not None
        for name, value in runner.adapted.deltas.state().items():
            assert torch.equal(value, runner.start[name]), name

    monkeypatch.setattr(prepare, "train_rate", lambda *arguments: times * expected(*arguments))
    monkeypatch.setattr(search, "measure_speed", measure_speed)
    start = time.time()
    rows = str(write_rows(tmp_path, 30_000))
    job = make_job(profile="auto", clock="wall", start_at=start, ready_by=start + 40.0, dataset=rows)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    known, written = record_of(job), read_record(job.parent)
    assert written is not None
    assert known.tokens_per_s > 0.0
    first = known.done[0]
    assert first.trial.main
    trained = first.tokens / written[0].train_tokens
    assert 0.6 * first.trial.epochs < trained < 1.6 * first.trial.epochs
    assert any("tokens take" in (line.message or "") for line in progress_of(job))


def test_memory_that_runs_out_while_steps_are_timed_costs_the_measurement(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed_step(state: TrainState, *_: Any) -> bool:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(speed, "timed_step", timed_step)
    start = time.time()
    job = make_job(profile="auto", clock="wall", start_at=start, ready_by=start + 40.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    known = record_of(job)
    assert (known.timed, known.tokens_per_s) == (True, 0.0)
    assert known.done[0].loss is not None
