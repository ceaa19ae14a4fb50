"""Which trials run at once, each on a device of its own; on loss surfaces that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import START_EPOCHS
from trainer_node.engine.search.strategy.population import give_up, is_population, next_round, on_one_device
from trainer_node.engine.search.strategy.refits import MOST_REFITS
from trainer_node.engine.search.trial import Trial, TrialResult, without_loss

START = (Trial(arm="dense"), Trial(arm="lora"))
WIDTH = 4
Loss = Callable[[Trial], float | None]


def budget(left_s: float, all_s: float | None = None, **changes: Any) -> Budget:
    """What is left for trials whose epoch takes one device 10 seconds."""
    fixed = Budget(
        left_s=left_s,
        tokens_per_s=1000.0,
        epoch_tokens=10_000,
        examples=2000,
        trial_s=1.0,
        all_s=all_s or left_s,
        width=WIDTH,
    )
    return replace(fixed, **changes)


def searched(loss: Loss, seconds: float, **changes: Any) -> tuple[list[list[Trial]], float]:
    """All rounds of one job, and the time left; a round takes as long as its longest trial."""
    done: list[TrialResult] = []
    rounds: list[list[Trial]] = []
    left = seconds
    while trials := next_round(START, done, budget(left, seconds, **changes)):
        left -= max(budget(left, **changes).cost_s(trial) for trial in trials)
        done += [replace(without_loss(trial), loss=loss(trial)) for trial in trials]
        rounds.append(trials)
    return rounds, left


def bowl(trial: Trial) -> float:
    """Lowest at seven times the rate, with half the batch."""
    rate, batch = math.log(trial.rate / 7.0), math.log(trial.batch / 16)
    return 2.0 + 0.05 * (rate**2 + batch**2) + (0.05 if trial.arm == "lora" else 0.0)


def test_a_round_has_a_trial_for_every_device_all_different() -> None:
    rounds, _ = searched(bowl, 1000.0)
    trials = [trial for trials in rounds for trial in trials]
    assert len(set(trials)) == len(trials)
    assert len(rounds[0]) == len(rounds[1]) == WIDTH
    assert {trial.arm for trial in rounds[0]} == {"dense", "lora"}  # from the start: nothing moves as much


def test_the_second_round_starts_from_the_best_of_the_first() -> None:
    (first, second, *_), _ = searched(bowl, 1000.0)
    best = min(first, key=bowl)
    assert best != first[0]
    for trial in second:
        changed = {
            name for name in ("arm", "rate", "epochs", "batch") if getattr(trial, name) != getattr(best, name)
        }
        # Another arm begins at its own rate, and another batch has another rate.
        assert len(changed - {"rate"} if changed & {"arm", "batch"} else changed) == 1


def test_the_search_comes_close_to_the_lowest_point() -> None:
    rounds, _ = searched(bowl, 1000.0)
    assert min(bowl(trial) for trials in rounds for trial in trials) < 2.02
    assert bowl(rounds[0][0]) > 2.05


def test_the_last_rounds_are_the_best_trial_on_all_rows_each_in_another_order() -> None:
    rounds, _ = searched(bowl, 200.0)
    mixed = [{trial.refit for trial in trials} for trials in rounds]
    assert all(len(kinds) == 1 for kinds in mixed)
    refits = [trial for trials in rounds for trial in trials if trial.refit]
    assert len(rounds[-1]) == WIDTH
    assert len({trial.seed for trial in refits}) == len(refits) <= MOST_REFITS
    assert len({replace(trial, seed=0) for trial in refits}) == 1


def test_several_refits_are_kept_time_for_as_one_round() -> None:
    trial = Trial(arm="dense", epochs=2.0)
    one = budget(1000.0).cost_s(replace(trial, refit=True))
    turns = [budget(1000.0).refits_s(trial, count) / one for count in (1, 3, WIDTH, WIDTH + 1)]
    assert turns == [1, 1, 1, 2]
    assert budget(1000.0, width=1).refits_s(trial, 3) == 3 * one


def test_what_is_never_averaged_is_run_again_once() -> None:
    rounds, _ = searched(bowl, 1000.0, single=frozenset(["dense", "lora"]), all_rows=1.25)
    assert len(rounds[-1]) == 1
    assert rounds[-1][0].refit


def test_rounds_keep_within_the_time() -> None:
    for seconds in range(70, 500, 7):
        _, left = searched(bowl, float(seconds))
        assert left >= 0


def test_a_round_without_a_loss_is_followed_by_others() -> None:
    rounds, _ = searched(lambda trial: None if trial.batch == 32 else bowl(trial), 1000.0)
    done = [replace(without_loss(t), loss=None if t.batch == 32 else bowl(t)) for r in rounds for t in r]
    best = best_of(done)
    assert best is not None
    assert best.trial.batch != 32


@pytest.mark.parametrize(("spare", "wanted"), [(1.01, True), (0.99, False)])
def test_one_device_must_have_time_for_three_runs_of_full_length(spare: float, wanted: bool) -> None:
    run_s = 1.0 + START_EPOCHS[0] * 10
    seconds = spare * TRIAL_SAFETY * 3 * run_s
    assert is_population(START, budget(seconds)) is wanted
    assert not is_population(START, budget(seconds, width=1))


def test_the_run_on_all_rows_is_counted_with_its_rows() -> None:
    seconds = TRIAL_SAFETY * 3.05 * (1.0 + START_EPOCHS[0] * 10)
    assert is_population(START, budget(seconds))
    assert not is_population(START, budget(seconds, all_rows=1.2))


def test_one_device_carries_a_plan_out_at_its_own_speed(make_plan: Callable[..., Plan]) -> None:
    plan = replace(make_plan(), parallel="ddp", devices=4, expected_tokens_per_s=8000.0)
    alone = on_one_device(plan)
    assert (alone.parallel, alone.devices, alone.expected_tokens_per_s) == ("single", 1, 2000.0)


@pytest.mark.parametrize(
    ("checkpoints", "starts", "has_loss", "wanted"),
    [
        ([True, False], 2, True, [False, False]),  # may start once more
        ([True, False], 3, False, [False, True]),
        ([False, False], 3, True, [True, True]),
        ([False, False], 3, False, [False, False]),  # nothing to go on with
        ([True, True], 9, True, [False, False]),
    ],
)
def test_trials_that_keep_ending_the_worker_are_given_up(
    checkpoints: list[bool], starts: int, has_loss: bool, wanted: list[bool]
) -> None:
    assert give_up(checkpoints, starts, 2, has_loss=has_loss) == wanted


def test_runs_of_lora_of_one_round_have_the_same_raised_rate() -> None:
    trial = Trial(arm="lora", epochs=2.0)
    done = [TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)]
    left = budget(30.0, 100.0, all_rows=1.25, lora=frozenset({"lora"}))
    chosen = next_round(START, done, left)
    assert len(chosen) == WIDTH
    assert {(trial.refit, trial.averaged, round(trial.rate, 3)) for trial in chosen} == {(True, True, 2.662)}
    failed = [replace(without_loss(trial), tokens=1) for trial in chosen]
    again = next_round(START, [*done, *failed], left)
    assert {(trial.averaged, round(trial.rate, 3)) for trial in again} == {(False, 1.331)}
    assert {trial.with_best for trial in chosen} == {False}
    tiny = next_round(START, done, replace(left, tiny=True))
    assert {(trial.with_best, round(trial.rate, 3)) for trial in tiny} == {(True, 2.0)}
