"""The best trial again, on all rows: how often, at which rate, and how long."""

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY
from trainer_node.engine.search.strategy.full_length import WANTED_REFITS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.refits import (
    MOST_ABOVE_RUN,
    MOST_APART,
    MOST_REFITS,
    NOISE,
    first_refit,
    refit_of,
)
from trainer_node.engine.search.trial import Trial, TrialResult

LORA = frozenset({"lora"})


def test_the_best_trial_is_run_again_on_all_rows_in_other_orders() -> None:
    done, _ = searched(bowl(1.0, 2.0, 32), 3000.0)
    best = best_of(done)
    assert best
    refits = [result.trial for result in done if result.trial.refit]
    assert [result.trial for result in done[-MOST_REFITS:]] == refits
    assert [trial.seed for trial in refits] == list(range(MOST_REFITS))
    assert {replace(trial, refit=False, of=None, seed=0, with_best=False) for trial in refits} == {best.trial}


@pytest.mark.parametrize(
    ("factor", "joins"), [(0.9, True), (1.0, True), (None, True), (0.75, False), (1.3, False)]
)
def test_a_trial_that_has_seen_almost_all_rows_joins_runs_at_about_its_rate(
    factor: float | None, joins: bool
) -> None:
    best = TrialResult(trial=Trial(arm="dense", epochs=2.0), loss=2.0, tokens=1, train_s=1.0, factor=factor)
    for all_rows, single, expected in (
        (1.03, frozenset[str](), joins),
        (1.25, frozenset[str](), False),  # it has seen four fifths of them
        (1.03, frozenset({"dense"}), False),  # its weights aren't averaged
    ):
        refit = first_refit(best, [best], plenty(all_rows=all_rows, single=single))
        assert (refit is not None and refit.with_best) == expected


def test_runs_that_cannot_be_averaged_end_with_one_on_all_rows() -> None:
    lora = bowl(1.0, 2.0, 32, lora=-0.3)
    done, _ = searched(lora, 3000.0, single=frozenset({"lora"}), all_rows=1.25)
    assert [result.trial.arm for result in done if result.trial.refit] == ["lora"]
    done, _ = searched(lora, 3000.0, single=frozenset({"lora"}), all_rows=1.02)
    assert not any(result.trial.refit for result in done)  # it would have few more rows
    done, _ = searched(bowl(1.0, 2.0, 32), 3000.0, single=frozenset({"lora"}))
    assert sum(result.trial.refit for result in done) == MOST_REFITS


def test_time_for_runs_that_cannot_be_averaged_goes_to_the_search() -> None:
    def searched_s(single: frozenset[str]) -> float:
        done, _ = searched(bowl(1.0, 2.0, 32), 300.0, single=single)
        return sum(result.train_s for result in done if not result.trial.refit)

    assert searched_s(frozenset({"dense", "lora"})) > 1.1 * searched_s(frozenset())


@pytest.mark.parametrize(
    ("single", "all_rows"), [(frozenset(), 1.0), (frozenset(), 1.25), (frozenset({"dense", "lora"}), 1.25)]
)
def test_every_search_with_time_for_two_runs_ends_with_a_run_on_all_rows(
    single: frozenset[str], all_rows: float
) -> None:
    for seconds in range(30, 600, 7):
        done, left = searched(bowl(1.0, 2.0, 32), float(seconds), single=single, all_rows=all_rows)
        assert left >= 0.0
        main = any(result.trial.main for result in done)
        assert main or done[-1].trial.refit


def test_a_search_past_its_share_of_the_time_leaves_enough_to_average_runs() -> None:
    for seconds in (200.0, 300.0, 500.0):
        done, _ = searched(bowl(1.0, 2.0, 32), seconds)
        assert sum(result.trial.refit for result in done) >= WANTED_REFITS


def test_a_run_on_all_rows_is_shortened_if_the_trial_before_it_was_slow() -> None:
    trial = Trial(arm="dense", epochs=1.1, batch=4)
    done = [TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0)]
    wanted = plenty(trial_s=0.0).cost_s(replace(trial, refit=True))
    for left, share in ((1.06 * wanted, 1.0), (0.9 * wanted, 0.9 / TRIAL_SAFETY), (0.4 * wanted, None)):
        refit = next_trial(START, done, plenty(left_s=left, all_s=4 * wanted, trial_s=0.0))
        if share is None:
            assert refit is None
            continue
        assert refit is not None
        assert refit.refit
        assert refit.epochs == pytest.approx(share * trial.epochs)
        assert plenty(left_s=left, trial_s=0.0).fits(refit)


def test_without_time_for_a_trial_the_run_on_all_rows_has_the_rate_that_is_asked_for() -> None:
    first = Trial(arm="dense", epochs=2.0)
    done = [TrialResult(trial=first, loss=2.0, tokens=1, train_s=1.0, factor=0.7)]
    trial = next_trial(START, done, plenty(left_s=30.0, all_s=60.0, all_rows=1.25))
    assert trial == replace(first, rate=0.7**3, refit=True, of=0)


@pytest.mark.parametrize(("runs", "times"), [(1, 1.0), (2, 2.0), (3, 2.0), (5, 2.0)])
def test_runs_of_lora_that_are_averaged_have_a_higher_rate(runs: int, times: float) -> None:
    trial = Trial(arm="lora", epochs=2.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)
    budget = plenty(left_s=runs * 28.0, all_s=1e3, all_rows=1.25)
    for lora, rate in ((LORA, times * 1.1**3), (frozenset[str](), 1.1**3)):
        first = first_refit(best, [best], replace(budget, lora=lora))
        assert first
        assert first.rate == pytest.approx(rate)
        assert first.averaged is (rate > 1.1**3)
        assert replace(first, rate=1.0, averaged=False) == replace(trial, refit=True, of=0)
        done = [best, TrialResult(trial=first, loss=1.9, tokens=1, train_s=1.0)]
        assert next_trial(START, done, replace(budget, lora=lora)) == replace(first, seed=1)  # not once more


def test_only_runs_that_are_averaged_alone_have_noise() -> None:
    """One run, and an average that a trial without noise joins, end higher with it."""
    trial = Trial(arm="lora", epochs=2.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)
    budget = plenty(left_s=2 * 28.0, all_s=1e3, all_rows=1.25, lora=LORA, plain=True)
    for changes, noise in (
        ({}, NOISE),
        ({"left_s": 28.0}, 0.0),  # one run
        ({"lora": frozenset[str]()}, 0.0),
        ({"plain": False}, 0.0),
        ({"tiny": True}, 0.0),
        ({"all_rows": 1.02}, 0.0),  # the trial joins
    ):
        first = first_refit(best, [best], replace(budget, **changes))
        assert first
        assert first.noise == noise, changes
    first = first_refit(best, [best], budget)
    assert first
    done = [best, TrialResult(trial=first, loss=None, tokens=1, train_s=1.0)]
    again = next_trial(START, done, budget)
    assert again
    assert again.noise == 0.0  # at the rate of one run: no other gave a number


@pytest.mark.parametrize("arm", ["lora", "dense"])
@pytest.mark.parametrize(("turns", "lengths"), [(2.1, [1.0, 1.0]), (1.8, [1.0, 0.8]), (1.6, [1.0])])
def test_one_more_run_may_be_a_little_shorter(turns: float, lengths: list[float], arm: str) -> None:
    """Two were planned, and the trial before them took a little longer than it should."""
    trial = Trial(arm=arm, epochs=2.0)
    done = [TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)]
    budget = plenty(all_rows=1.25, trial_s=8.0, refit_s=1.0, lora=LORA, all_s=1e3)
    run_s = budget.cost_s(replace(trial, refit=True))
    left_s, found = turns * TRIAL_SAFETY * run_s, list[Trial]()
    while (refit := next_trial(START, done, replace(budget, left_s=left_s))) and len(found) < 3:
        left_s -= TRIAL_SAFETY * budget.cost_s(refit)
        found.append(refit)
        done.append(TrialResult(trial=refit, loss=1.9, tokens=1, train_s=1.0))
    assert [run.epochs / trial.epochs for run in found] == pytest.approx(lengths, rel=0.02)
    raised = len(lengths) if arm == "lora" else 1  # by how many are averaged
    assert found[0].rate == pytest.approx(raised * 1.1**3)


def test_a_rate_of_lora_that_may_be_too_high_is_not_raised() -> None:
    trial = Trial(arm="lora", epochs=2.0)
    for factor, single in ((1.0, frozenset[str]()), (None, frozenset[str]()), (1.1, frozenset({"lora"}))):
        best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=factor)
        budget = plenty(all_rows=1.25, lora=frozenset({"lora"}), single=single)
        first = first_refit(best, [best], budget)
        assert first
        assert first.rate == (factor or 1.0) ** 3
    alone = plenty(all_rows=1.25, lora=LORA, single=LORA, tiny=True)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)
    first = first_refit(best, [best], alone)
    assert first
    assert not first.with_best


def test_a_raised_rate_is_at_most_four_times_one_that_was_run() -> None:
    trial = Trial(arm="lora", epochs=2.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.3)  # asks for 2.2 times
    first = first_refit(best, [best], plenty(all_rows=1.25, lora=LORA))
    assert first
    assert (first.rate, first.averaged) == (MOST_ABOVE_RUN, True)


@pytest.mark.parametrize(
    ("runs", "epochs", "factor", "rate", "joins"),
    [
        (1, 1.0, 1.1, 1.3 * 1.1**3, True),
        (2, 1.0, 1.1, 1.3 * 1.1**3, True),
        (2, 1.5, 1.1, 1.5 * 1.1**3, True),
        (2, 2.5, 1.1, MOST_APART, True),
        (3, 2.5, 1.0 / 1.1, 2.5 / 1.1**3, True),
        (1, 1.0, 1.2, MOST_APART, True),  # asks for 1.7 times, and 1.3 of that
        (1, 1.0, 1.3, 1.3**3, False),
        (1, 1.0, 0.7, 0.7**3, False),  # the trial's rate is too high by far
        (2, 1.0, 0.7, 2.0 * 0.7**3, False),
        (1, 1.0, None, 1.0, True),
        (1, 1.0, 1.0, 1.0, True),  # the rows didn't agree
    ],
)
def test_a_tiny_model_s_trial_of_lora_joins_runs_at_about_its_rate(
    runs: int, epochs: float, factor: float | None, rate: float, joins: bool
) -> None:
    trial = Trial(arm="lora", epochs=epochs)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=factor)
    left_s = runs * 1.1 * (2.0 + 12.5 * epochs)
    budget = plenty(left_s=left_s, all_s=1e3, all_rows=1.25, lora=LORA, tiny=True)
    first = first_refit(best, [best], budget)
    assert first
    assert (first.rate, first.with_best) == (pytest.approx(rate), joins)
    assert first.averaged is (rate > 1.31 * (factor or 1.0) ** 3)  # too high for one run
    real = first_refit(best, [best], replace(budget, tiny=False))
    assert real
    assert not real.with_best


@pytest.mark.parametrize(
    ("factor", "tiny", "rate", "averaged", "joins"),
    [
        (1.1, False, 2.0, True, True),  # twice what it asks for, but at most twice what was run
        (0.9, False, 2.0 * 0.9**3, True, True),
        (0.8, False, 2.0 * 0.8**3, True, True),
        (0.7, False, 2.0 * 0.7**3, True, False),  # it asks for less than half
        (1.0, False, 1.0, False, True),  # the rows don't agree on it
        (1.1, True, 1.1**3, False, True),
    ],
)
def test_with_many_rows_the_trial_of_lora_joins_runs_at_up_to_twice_its_rate(
    factor: float, tiny: bool, rate: float, averaged: bool, joins: bool
) -> None:
    """It has seen almost all rows."""
    trial = Trial(arm="lora", epochs=2.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=factor)
    first = first_refit(best, [best], plenty(all_rows=1.02, lora=LORA, tiny=tiny))
    assert first
    assert (first.rate, first.averaged, first.with_best) == (pytest.approx(rate), averaged, joins)


def test_with_many_rows_one_run_of_lora_or_a_short_one_has_the_rate_of_one() -> None:
    """An epoch takes 10 s."""
    for left_s, epochs, rate in ((25.0, 2.0, 1.1**3), (50.0, 2.0, 2.0), (50.0, 1.4, 1.1**3)):
        trial = Trial(arm="lora", epochs=epochs)
        best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)
        budget = plenty(all_rows=1.02, lora=LORA, left_s=left_s, all_s=1e3, trial_s=0.0)
        first = first_refit(best, [best], budget)
        assert first
        assert (first.rate, first.averaged) == (pytest.approx(rate), rate == 2.0)
        assert first.with_best


def test_after_a_run_at_a_raised_rate_that_gave_no_number_the_next_has_the_rate_of_one() -> None:
    trial = Trial(arm="lora", epochs=2.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)
    budget = plenty(all_rows=1.25, lora=LORA)
    first = first_refit(best, [best], budget)
    assert first
    for loss, times, averaged in ((None, 1.0, False), (1.9, 2.0, True)):
        done = [best, TrialResult(trial=first, loss=loss, tokens=1, train_s=1.0)]
        second = next_trial(START, done, budget)
        assert second
        assert (second.rate, second.averaged) == (pytest.approx(times * 1.1**3), averaged)


def test_a_run_that_joins_the_trial_is_repeated_at_the_rate_of_one_if_it_gave_no_number() -> None:
    trial = Trial(arm="lora", epochs=1.0)
    best = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, factor=1.1)
    budget = plenty(left_s=20.0, all_s=1e3, all_rows=1.25, lora=LORA, tiny=True)
    first = first_refit(best, [best], budget)
    assert first
    assert (first.rate, first.averaged) == (pytest.approx(1.3 * 1.1**3), False)
    done = [best, TrialResult(trial=first, loss=None, tokens=1, train_s=1.0)]
    assert next_trial(START, done, budget) == replace(first, rate=pytest.approx(1.1**3), seed=1)


def test_runs_on_all_rows_stay_at_the_rate_that_gave_a_number() -> None:
    trial = Trial(arm="dense", epochs=2.0)
    done = [TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0)]
    rates = (3.0, 1.0)
    for seed, (rate, loss) in enumerate(zip(rates, (None, 1.9), strict=True)):
        refit = replace(trial, rate=rate, refit=True, seed=seed)
        done.append(TrialResult(trial=refit, loss=loss, tokens=1, train_s=1.0))
    third = next_trial(START, done, plenty(left_s=100.0, all_s=200.0, all_rows=1.25))
    assert third is not None
    assert (third.rate, third.seed) == (1.0, 2)


def test_the_second_run_at_a_raised_rate_is_shortened_if_the_first_was_slow() -> None:
    trial = Trial(arm="lora", epochs=2.0, refit=True)
    budget = plenty(left_s=20.0, all_rows=1.25, lora=LORA)
    assert refit_of(trial, 1, budget) is None
    second = refit_of(replace(trial, averaged=True), 1, budget)
    assert second
    assert 1.0 < second.epochs < 2.0
    assert refit_of(replace(trial, averaged=True), 2, budget) is None
    assert (
        refit_of(replace(trial, averaged=True, with_best=True), 1, budget) is None
    )  # the trial is the other
