"""What trials of two methods cost where one is 1.7 times as fast as the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from shared.clock import TokenClock, WallClock
from shared.planning.plan import Plan
from tests.engine.search.strategy.surfaces import bowl
from tests.engine.worker_run import bare_job
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search import search
from trainer_node.engine.search.arm_speed import on_devices
from trainer_node.engine.search.strategy.budget import Budget, Speed
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.time_left import budget_of
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult
from trainer_node.engine.signals import Stop

START = LORA, DENSE = Trial(arm="LoRA r4", batch=8), Trial(arm="dense", batch=8)
TRUE = {"LoRA r4": 1700.0, "dense": 1000.0}
ROWS, TOKENS, ALL_S = 500, 10_000, 400.0


@pytest.fixture
def known(make_plan: Callable[..., Plan]) -> SearchRecord:
    """A search that has tried nothing; the planner expects LoRA to be 1.5 times as fast."""
    lora = make_plan("lora", expected_tokens_per_s=3000.0)
    dense = make_plan("dense", expected_tokens_per_s=2000.0)
    return SearchRecord(began_at=0.0, all_s=ALL_S, plans={"LoRA r4": lora, "dense": dense})


@pytest.fixture
def budget(tmp_path: Path) -> Callable[..., Budget]:
    """Makes the budget of a search in 500 rows of 20 tokens, whose trials cost nothing besides."""

    def made(known: SearchRecord, *, simulated: bool = False) -> Budget:
        rows = SimpleNamespace(lengths=np.full(ROWS, TOKENS // ROWS), base=None, label_tokens=TOKENS, group=1)
        data: Any = SimpleNamespace(train=rows, dev=SimpleNamespace(lengths=np.full(10, 20)))
        costs = SimpleNamespace(closing_s=0.0, load_s=0.0, score_s=0.0, save_s=0.0)
        record: Any = SimpleNamespace(
            train_tokens=TOKENS, train_examples=ROWS, costs=costs, base_losses=[3.0] * 10
        )
        found = budget_of(run_of(tmp_path, simulated=simulated), record, known, data)
        return replace(found, trial_s=0.0, least_batch=1.0)

    return made


def run_of(folder: Path, *, simulated: bool = False, **changes: Any) -> RunContext:
    job = bare_job(profile="auto", ready_by=400.0, token_clock_rate=500.0, **changes)
    clock = TokenClock(0.0, 500.0) if simulated else WallClock()
    return RunContext(job, folder, clock, Reporter(folder / "progress.jsonl", "t", "a"), Stop())


def ran(trial: Trial, *, step_s: float = 0.0) -> TrialResult:
    """What such a trial showed on a machine that is as fast as TRUE."""
    steps, tokens = round(trial.epochs * ROWS / trial.batch), round(trial.epochs * TOKENS)
    train_s = tokens / TRUE[trial.arm] + steps * step_s
    return TrialResult(
        trial=trial, loss=bowl(1.0, 2.0, 8)(trial), tokens=tokens, train_s=train_s, steps=steps
    )


def epoch_s(budget: Budget) -> list[float]:
    return [budget.cost_s(replace(trial, epochs=1.0)) for trial in START]


def test_before_anything_is_measured_each_method_costs_what_its_plan_says(
    known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    assert epoch_s(budget(known)) == pytest.approx([TOKENS / 3000, TOKENS / 2000])


def test_a_method_that_was_not_tried_goes_by_the_other_as_their_plans_compare(
    known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    """By LoRA's speed a dense epoch would cost 5.9 s; it takes 10, and 8.8 are expected."""
    lora, dense = (budget(known.finished(ran(trial), ran(trial).steps, 0)) for trial in START)
    assert epoch_s(lora) == pytest.approx([TOKENS / 1700, 1.5 * TOKENS / 1700])
    assert epoch_s(dense) == pytest.approx([TOKENS / 1500, TOKENS / 1000])


@pytest.mark.parametrize("order", [START, START[::-1]])
def test_a_method_that_was_tried_has_its_own_speed(
    order: tuple[Trial, ...], known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    """The mean of both, 1,260 tokens/s, is wrong for either."""
    for trial in order:
        known = known.finished(ran(trial), ran(trial).steps, 0)
    assert epoch_s(budget(known)) == pytest.approx([TOKENS / 1700, TOKENS / 1000])


def test_steps_that_were_timed_are_of_one_method(known: SearchRecord, budget: Callable[..., Budget]) -> None:
    """LoRA's epoch of 63 steps costs .2 s for each step besides, a dense one 1.5 times all that."""
    timed = replace(known, timed=True, timed_arm="LoRA r4", tokens_per_s=1700.0, step_s=0.2)
    lora_s = TOKENS / 1700 + 0.2 * ROWS / 8
    assert epoch_s(budget(timed)) == pytest.approx([lora_s, 1.5 * lora_s])
    other = replace(timed, timed_arm="dense", tokens_per_s=1000.0)
    dense_s = TOKENS / 1000 + 0.2 * ROWS / 8
    assert epoch_s(budget(other)) == pytest.approx([dense_s / 1.5, dense_s])


def test_what_other_devices_measured_is_scaled_to_these(
    known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    """Four devices planned, timed and trained; two go on, and later four again."""
    four = with_devices(known, 4)
    timed = replace(four, timed=True, timed_arm="LoRA r4", tokens_per_s=1700.0, step_s=0.2)
    older = four.finished(ran(LORA), ran(LORA).steps, 0)
    newer = four.finished(replace(ran(LORA), devices=4), ran(LORA).steps, 0)
    lora_s, steps_s = TOKENS / 1700, 0.2 * ROWS / 8
    for measured, all_s in ((timed, 2 * lora_s + steps_s), (older, 2 * lora_s), (newer, 2 * lora_s)):
        two = with_devices(on_devices(measured, 2), 2)
        assert epoch_s(budget(two)) == pytest.approx([all_s, 1.5 * all_s])
        again = with_devices(on_devices(two, 4), 4)
        assert epoch_s(budget(again)) == pytest.approx(epoch_s(budget(measured)))
    both = two.finished(replace(ran(DENSE), devices=2), ran(DENSE).steps, 0)
    assert epoch_s(budget(both)) == pytest.approx([2 * lora_s, TOKENS / 1000])


def with_devices(known: SearchRecord, devices: int) -> SearchRecord:
    return replace(known, plans={arm: replace(plan, devices=devices) for arm, plan in known.plans.items()})


def test_a_trial_tells_its_tokens_from_its_own_steps(
    known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    known = replace(known, timed=True, timed_arm="dense", tokens_per_s=900.0, step_s=0.3)
    for trial, step_s in ((LORA, 0.2), (DENSE, 0.3)):
        known = known.finished(ran(trial, step_s=step_s), ran(trial).steps, 0)
    found = budget(known)
    speeds = [found.speed(trial) for trial in START]
    assert [speed.tokens_per_s for speed in speeds] == pytest.approx([1700.0, 1000.0])
    assert [speed.step_s for speed in speeds] == pytest.approx([0.2, 0.3])


def test_on_the_token_clock_all_methods_are_as_fast(
    known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    for trial in START:
        known = known.finished(ran(trial), ran(trial).steps, 0)
        found = budget(known, simulated=True)
        assert (found.tokens_per_s, found.others) == (500.0, {})
        assert epoch_s(found) == [TOKENS / 500.0] * 2


@pytest.mark.parametrize("seconds", [100.0, 150.0, 250.0])
def test_no_trial_of_a_search_takes_much_longer_than_it_was_planned_to(
    seconds: float, known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    """The first dense trial takes 1.13 times as long, by the plans' ratio; by LoRA's speed it was 1.7."""
    now, left_s, late = replace(known, all_s=seconds), seconds, dict[str, list[float]]()
    while trial := next_trial(START, now.done, found := replace(budget(now), left_s=left_s)):
        result = ran(trial)
        taken_s = result.train_s * (found.all_rows if trial.refit else 1.0)
        late.setdefault(trial.arm, []).append(taken_s / found.cost_s(trial))
        left_s -= taken_s
        now = now.finished(result, result.steps, 0)
    assert late["dense"][0] == pytest.approx(1.7 / 1.5)
    assert max(late["dense"][1:] + late["LoRA r4"][1:]) == pytest.approx(1.0, rel=1e-3)
    assert left_s >= 0.0


@pytest.mark.parametrize(("simulated", "faster"), [(False, 1.2), (True, 1.0)])
def test_plans_of_other_methods_have_speeds_of_their_own(
    simulated: bool,
    faster: float,
    tiny_model: Path,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
) -> None:
    run = run_of(tmp_path, simulated=simulated, model_path=str(tiny_model))
    rows = make_examples([20] * 100)
    other = search._drawn(run, JobData(rows, rows, {}, 256), make_plan("dense"), 2000.0, "lora_r16")
    ratio = other.expected_tokens_per_s / 2000.0
    assert ratio == 1.0 if simulated else faster < ratio < 1.5


def test_a_search_that_an_older_version_began_is_planned_at_what_it_measured(
    known: SearchRecord, budget: Callable[..., Budget]
) -> None:
    """It recorded no steps of trials, and timed those of the first trial's method."""
    # 10 s for its tokens, and 100 steps of .1 s
    trained: dict[str, Any] = {"loss": 3.0, "tokens": 17_000, "train_s": 20.0}
    old = replace(known, timed=True, tokens_per_s=1700.0, step_s=0.1)
    begun = budget(replace(old, trial=LORA))
    assert begun.speed(LORA) == Speed(1700.0, 0.1)
    assert begun.speed(DENSE).tokens_per_s == pytest.approx(1700.0 / 1.5)
    after = budget(replace(old, done=[TrialResult(trial=LORA, **trained)]))
    assert after.speed(LORA) == Speed(850.0, 0.0)  # what a step takes besides is in it
    new = budget(replace(old, timed_arm="LoRA r4", done=[TrialResult(trial=LORA, steps=100, **trained)]))
    assert new.speed(LORA) == Speed(1700.0, 0.1)
