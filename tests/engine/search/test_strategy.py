"""The search for the best training run, on loss surfaces that are known."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from trainer_node.engine.search.strategy import (
    AFTER_LOWEST,
    LEAST_EPOCHS,
    MOST_REFITS,
    PROBE_SHARE,
    SAFETY,
    WANTED_REFITS,
    Budget,
    _whole,
    best_of,
    next_trial,
    with_prior,
)
from trainer_node.engine.search.trial import (
    FILE,
    SearchRecord,
    Trial,
    TrialResult,
    read_search,
    write_search,
)

START = (Trial(arm="dense"), Trial(arm="lora"))
SPEED = 1000.0


def searched(
    loss: Callable[[Trial], float | None],
    seconds: float,
    *,
    epoch_tokens: int = 10_000,
    examples: int = 500,
    single: frozenset[str] = frozenset(),
) -> tuple[list[TrialResult], float]:
    """All trials of one job on a surface, and the time left."""
    done: list[TrialResult] = []
    left = seconds
    while True:
        budget = Budget(
            left_s=left,
            tokens_per_s=SPEED,
            epoch_tokens=epoch_tokens,
            examples=examples,
            trial_s=1.0,
            all_s=seconds,
            single=single,
        )
        trial = next_trial(START, done, budget)
        if trial is None:
            return done, left
        left -= budget.cost_s(trial)
        done.append(
            TrialResult(
                trial=trial,
                loss=loss(trial),
                tokens=int(trial.epochs * epoch_tokens),
                train_s=budget.cost_s(trial),
            )
        )


def bowl(rate: float, epochs: float, batch: int, lora: float = 0.05) -> Callable[[Trial], float]:
    """Quadratic in the logs of everything, lowest at the given place."""

    def loss(trial: Trial) -> float:
        parts = (math.log(trial.rate / rate), math.log(trial.epochs / epochs), math.log(trial.batch / batch))
        return 2.0 + 0.05 * sum(part**2 for part in parts) + (lora if trial.arm == "lora" else 0.0)

    return loss


@pytest.mark.parametrize("rate", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("epochs", [1.0, 4.0])
@pytest.mark.parametrize("batch", [8, 64])
def test_with_time_the_search_comes_close_to_the_lowest_point(rate: float, epochs: float, batch: int) -> None:
    done, left = searched(bowl(rate, epochs, batch), 3000.0)
    best = best_of(done)
    assert best
    assert best.loss is not None
    assert best.loss < 2.02
    assert left > 0


def test_with_more_time_the_search_goes_on_from_the_best_short_trial() -> None:
    for rate, count in ((0.3, 3), (0.9, 3), (2.7, 2)):
        done, _ = searched(bowl(rate, 2.0, 32), 40_000.0, epoch_tokens=1_000_000, examples=3_200)
        trials = [result.trial for result in done]
        assert [trial.short for trial in trials[: count + 1]] == [True] * count + [False]
        assert trials[count].epochs == 4.0
        assert trials[count].rate == pytest.approx(rate, rel=0.3)  # a longer run wants a lower one
        assert sum(trial.short for trial in trials) == count


def test_a_whole_run_is_not_given_up_for_short_trials() -> None:
    for seconds in range(4_000, 20_000, 271):
        done, left = searched(bowl(1.0, 2.0, 32), float(seconds), epoch_tokens=1_000_000, examples=3_200)
        trials = [result.trial for result in done]
        assert left >= 0
        assert trials[-1].refit or trials[-1].main
        assert (
            any(trial.epochs >= 2.0 and not (trial.short or trial.refit) for trial in trials)
            or trials[-1].main
        )


def test_the_length_of_a_whole_run_is_not_that_of_the_trial_before() -> None:
    budget = Budget(
        left_s=1000.0, tokens_per_s=100.0, epoch_tokens=10_000, examples=1_000, trial_s=60.0, all_s=1000.0
    )
    found = {_whole(replace(START[0], epochs=epochs), budget) for epochs in (0.5, 1.0, 4.0)}
    assert found == {replace(START[0], epochs=4.0)}


def test_short_trials_that_diverge_are_followed_by_lower_rates() -> None:
    def loss(trial: Trial) -> float | None:
        return None if trial.rate > 0.2 else bowl(0.1, 2.0, 32)(trial)

    done, _ = searched(loss, 20_000.0, epoch_tokens=1_000_000, examples=3_200)
    *short, whole = [result.trial for result in done[:4]]
    assert all(trial.short for trial in short)
    assert not whole.short
    assert whole.rate < 0.2
    assert done[-1].trial.refit


def test_the_better_arm_is_found() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32, lora=-0.3), 3000.0)
    best = best_of(done)
    assert best
    assert best.trial.arm == "lora"


def test_the_other_arm_is_tried_early() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32, lora=-0.3), 3000.0)
    assert "lora" in [result.trial.arm for result in done[:3]]


def test_no_trial_is_run_twice() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32), 10_000.0)
    trials = [result.trial for result in done]
    assert len(set(trials)) == len(trials)


def test_the_search_ends_by_itself() -> None:
    _, left = searched(bowl(1.0, 2.0, 32), 1e9)
    assert left > 0.99e9


def test_trials_keep_within_the_time() -> None:
    for seconds in range(20, 400, 7):
        _, left = searched(bowl(3.0, 4.0, 16), float(seconds))
        assert left >= -1e-6


def test_a_diverged_trial_is_left_behind() -> None:
    def loss(trial: Trial) -> float | None:
        return None if trial.rate > 0.9 else bowl(0.3, 2.0, 32)(trial)

    done, _ = searched(loss, 3000.0)
    best = best_of(done)
    assert best
    assert best.trial.rate < 0.9


def test_with_little_time_short_trials_choose_the_rate_of_one_long_run() -> None:
    # One epoch takes 10,000 s, the job has 9,000: no second run would fit.
    done, left = searched(bowl(3.0, 2.0, 32), 9000.0, epoch_tokens=10_000_000, examples=50_000)
    *probes, main = done
    assert main.trial.main
    assert not any(result.trial.main for result in probes)
    assert all(result.trial.epochs < LEAST_EPOCHS for result in probes)
    assert sum(result.train_s for result in probes) <= 2 * PROBE_SHARE * 9000
    assert 1.0 < main.trial.rate < 3.5  # towards 3, less what a longer run wants
    assert left < 0.05 * 9000


def test_without_time_for_short_trials_there_is_one_run() -> None:
    done, _ = searched(bowl(3.0, 2.0, 32), 20.0, epoch_tokens=100_000, examples=500)
    (main,) = done
    assert main.trial.main
    assert main.trial.arm == "dense"


def test_a_run_of_few_steps_begins_with_a_higher_rate() -> None:
    def rate(examples: int, *, tiny: bool = False) -> float:
        budget = Budget(
            left_s=1.0,
            tokens_per_s=SPEED,
            epoch_tokens=10_000,
            examples=examples,
            trial_s=0.0,
            all_s=1.0,
            tiny=tiny,
        )
        return with_prior(START[0], budget).rate

    assert rate(20, tiny=True) == 2.7
    assert rate(20) == 1.0  # its batch is 4
    assert rate(400) == pytest.approx(2.7 * 0.25**0.5)  # 8
    assert rate(1600) == 2.7  # 32
    assert rate(10_000) == pytest.approx(2.7 * (150 / 625) ** 0.3)
    assert rate(100_000) == 1.0


def test_few_rows_get_a_small_batch_so_that_there_are_enough_steps() -> None:
    def first(examples: int, least_batch: float = 1.0) -> Trial | None:
        budget = Budget(
            left_s=1e6,
            tokens_per_s=SPEED,
            epoch_tokens=10_000,
            examples=examples,
            trial_s=1.0,
            all_s=1e6,
            least_batch=least_batch,
        )
        return next_trial(START, [], budget)

    for examples, batch in ((10_000, 32), (400, 16), (200, 8), (100, 4), (50, 4)):
        trial = first(examples)
        assert trial
        assert trial.batch == batch
    trial = first(50, least_batch=8.0)
    assert trial
    assert trial.batch == 8


def test_the_first_trial_is_given_whatever_the_time() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32), 0.0)
    assert len(done) == 1


def test_a_slower_machine_gets_fewer_trials() -> None:
    many, _ = searched(bowl(1.0, 2.0, 32), 600.0)
    few, _ = searched(bowl(1.0, 2.0, 32), 200.0)
    assert len(few) < len(many)


def test_a_budget_leaves_room_for_a_late_trial() -> None:
    budget = Budget(left_s=100.0, tokens_per_s=100.0, epoch_tokens=4_000, examples=100, trial_s=0.0, all_s=1)
    assert budget.fits(Trial(arm="dense", epochs=2.0))
    assert not budget.fits(Trial(arm="dense", epochs=2.6))
    assert SAFETY * budget.cost_s(Trial(arm="dense", epochs=2.0)) < 100.0


def test_a_batch_below_the_smallest_pack_is_not_tried() -> None:
    budget = Budget(
        left_s=1e6,
        tokens_per_s=SPEED,
        epoch_tokens=10_000,
        examples=500,
        trial_s=1.0,
        all_s=1e6,
        least_batch=20.0,
    )
    done: list[TrialResult] = []
    surface = bowl(1.0, 2.0, 4)
    while trial := next_trial(START, done, budget):
        done.append(TrialResult(trial=trial, loss=surface(trial), tokens=1, train_s=1.0))
    assert min(result.trial.batch for result in done) == 16


def test_after_a_turn_the_next_run_ends_there_and_none_is_longer() -> None:
    budget = Budget(left_s=1e6, tokens_per_s=SPEED, epoch_tokens=10_000, examples=500, trial_s=1.0, all_s=1e6)
    done = [TrialResult(trial=START[0], loss=2.0, tokens=1, train_s=1.0, lowest_epochs=1.2)]
    first = next_trial(START, done, budget)
    assert first == replace(START[0], epochs=AFTER_LOWEST * 1.2)
    while trial := next_trial(START, done, budget):
        assert trial.epochs <= START[0].epochs
        done.append(TrialResult(trial=trial, loss=3.0, tokens=1, train_s=1.0))


def test_a_turn_within_the_first_epoch_asks_for_a_lower_rate() -> None:
    budget = Budget(left_s=1e6, tokens_per_s=SPEED, epoch_tokens=10_000, examples=500, trial_s=1.0, all_s=1e6)
    early = TrialResult(trial=START[0], loss=2.0, tokens=1, train_s=1.0, lowest_epochs=0.8)
    first = next_trial(START, [early], budget)
    assert first
    assert (first.rate, first.epochs) == (1 / 3, 2.0)
    worse = TrialResult(trial=first, loss=2.1, tokens=1, train_s=1.0)
    assert next_trial(START, [early, worse], budget) == replace(START[0], epochs=AFTER_LOWEST * 0.8)


def test_the_best_trial_is_run_again_on_all_rows_in_other_orders() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32), 3000.0)
    best = best_of(done)
    assert best
    refits = [result.trial for result in done if result.trial.refit]
    assert [result.trial for result in done[-MOST_REFITS:]] == refits
    assert [trial.seed for trial in refits] == list(range(MOST_REFITS))
    assert {replace(trial, refit=False, seed=0) for trial in refits} == {best.trial}


def test_runs_that_cannot_be_averaged_end_with_one_on_all_rows() -> None:
    lora = bowl(1.0, 2.0, 32, lora=-0.3)
    done, _ = searched(lora, 3000.0, single=frozenset({"lora"}))
    assert [result.trial.arm for result in done if result.trial.refit] == ["lora"]
    done, _ = searched(bowl(1.0, 2.0, 32), 3000.0, single=frozenset({"lora"}))
    assert sum(result.trial.refit for result in done) == MOST_REFITS


def test_time_for_runs_that_cannot_be_averaged_goes_to_the_search() -> None:
    def searched_s(single: frozenset[str]) -> float:
        done, _ = searched(bowl(1.0, 2.0, 32), 300.0, single=single)
        return sum(result.train_s for result in done if not result.trial.refit)

    assert searched_s(frozenset({"dense", "lora"})) > 1.1 * searched_s(frozenset())


@pytest.mark.parametrize("single", [frozenset(), frozenset({"dense", "lora"})])
def test_every_search_with_time_for_two_runs_ends_with_a_run_on_all_rows(single: frozenset[str]) -> None:
    for seconds in range(30, 600, 7):
        done, left = searched(bowl(1.0, 2.0, 32), float(seconds), single=single)
        assert left >= 0.0
        main = any(result.trial.main for result in done)
        assert main or done[-1].trial.refit


def test_a_search_past_its_share_of_the_time_leaves_enough_to_average_runs() -> None:
    for seconds in (200.0, 300.0, 500.0):
        done, _ = searched(bowl(1.0, 2.0, 32), seconds)
        assert sum(result.trial.refit for result in done) >= WANTED_REFITS


def test_a_main_run_that_turned_early_leaves_time_for_a_better_one() -> None:
    budget = Budget(
        left_s=20.0, tokens_per_s=SPEED, epoch_tokens=10_000, examples=500, trial_s=1.0, all_s=40.0
    )
    main = replace(START[0], epochs=4.0, main=True)
    done = [TrialResult(trial=main, loss=2.0, tokens=1, train_s=1.0, lowest_epochs=1.0)]
    again = next_trial(START, done, budget)
    assert again
    assert again.refit
    assert again.epochs == AFTER_LOWEST
    done.append(TrialResult(trial=again, loss=1.0, tokens=1, train_s=1.0))
    assert best_of(done) == done[0]


def test_a_search_of_an_older_version_goes_on_as_it_began(tmp_path: Path) -> None:
    whole = TrialResult(trial=replace(START[0], epochs=4.0), loss=2.0, tokens=1, train_s=1.0)
    record = SearchRecord(began_at=0.0, all_s=1e6, plans={}, done=[whole])
    write_search(tmp_path, record)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes().replace(b'"short":false,', b""))
    assert b"short" not in path.read_bytes()
    found = read_search(tmp_path)
    assert found == record
    budget = Budget(left_s=1e6, tokens_per_s=SPEED, epoch_tokens=10_000, examples=500, trial_s=1.0, all_s=1e6)
    trial = next_trial(START, found.done, budget)
    assert trial
    assert not trial.short
    assert trial.epochs == 4.0
