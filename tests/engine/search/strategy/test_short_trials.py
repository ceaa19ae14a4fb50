"""Short trials: when they come first, what they tell of rates, and the run of full length after them."""

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.first_trial import TWIN_EPOCHS, first_trial
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS, key
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.prior import rate_factor
from trainer_node.engine.search.strategy.probes import PROBE_SHARE
from trainer_node.engine.search.trial import Trial, TrialResult

FEW_HELD_OUT = 1.02


def test_with_more_time_the_search_goes_on_from_the_best_short_trial() -> None:
    count = 3  # the third one is lower still, or higher than the first
    for rate in (0.5, 1.5, 4.5):
        done, _ = searched(bowl(rate, 2.0, 32), 40_000.0, epoch_tokens=1_000_000, examples=3_200)
        trials = [result.trial for result in done]
        assert [trial.short for trial in trials[: count + 1]] == [True] * count + [False]
        assert trials[count].epochs == 2.5
        assert trials[count].rate == pytest.approx(rate, rel=0.3)  # a longer run wants a lower one
        assert sum(trial.short for trial in trials) == count


def test_what_short_trials_have_shown_is_not_tried_again_at_full_length() -> None:
    for rate, known in ((1.5, (3.0, 1 / 3)), (4.5, (1 / 3,)), (0.5, (3.0, 1 / 3))):
        done, _ = searched(bowl(rate, 2.5, 32), 60_000.0, epoch_tokens=1_000_000, examples=3_200)
        trials = [result.trial for result in done]
        whole = trials[3]
        steps = [
            trial.rate / whole.rate
            for trial in trials[4:]
            if not trial.refit and replace(trial, rate=whole.rate) == whole
        ]
        assert steps  # finer ones, or coarse ones that no short trial has tried
        for step in known:
            assert step not in [pytest.approx(one) for one in steps]


def _short_then_whole(shorts: list[tuple[str, float, float]], rate: float) -> list[TrialResult]:
    """Short trials by arm, rate and loss, and the best run of full length that followed."""
    trials = [(Trial(arm=arm, rate=one, epochs=1.0, short=True), loss) for arm, one, loss in shorts]
    trials.append((Trial(arm="dense", rate=rate, epochs=4.0), 1.5))
    return [TrialResult(trial=trial, loss=loss, tokens=1, train_s=1.0) for trial, loss in trials]


@pytest.mark.parametrize("arm", ["dense", "lora"])
def test_a_short_trial_tells_nothing_of_rates_far_from_its_own_or_of_another_arm(arm: str) -> None:
    done = _short_then_whole([("dense", 2.7, 2.0), (arm, 0.9, 2.1)], 2.0)
    tried: list[Trial] = []
    while trial := next_trial(START, done, plenty()):
        tried.append(trial)
        done.append(TrialResult(trial=trial, loss=3.0, tokens=1, train_s=1.0))
    whole = done[2].trial
    assert replace(whole, rate=6.0) in tried  # more than twice what was tried
    lower = [trial for trial in tried if key(trial) == key(replace(whole, rate=2.0 / 3))]
    assert bool(lower) == (arm == "lora")  # next to .9, which was worse


def test_a_short_trial_tells_nothing_of_the_step_to_another_arm() -> None:
    done = _short_then_whole([("dense", 4.0, 2.0), ("lora", 1.0, 2.1)], 4.0)
    whole, tried = done[-1].trial, list[Trial]()
    for _ in range(3):
        trial = next_trial(START, done, plenty())
        assert trial
        tried.append(trial)
        done.append(TrialResult(trial=trial, loss=3.0, tokens=1, train_s=1.0))
    lora = replace(whole, arm="lora", rate=rate_factor(replace(whole, arm="lora"), plenty()))
    assert lora in tried  # at its own first rate


def test_a_whole_run_is_not_given_up_for_short_trials() -> None:
    for seconds in range(4_000, 20_000, 271):
        done, left = searched(bowl(1.0, 2.0, 32), float(seconds), epoch_tokens=1_000_000, examples=3_200)
        trials = [result.trial for result in done]
        assert left >= 0
        assert trials[-1].refit or trials[-1].main
        assert (
            any(trial.epochs >= TWIN_EPOCHS and not (trial.short or trial.refit) for trial in trials)
            or trials[-1].main
        )


def test_short_trials_that_diverge_are_followed_by_lower_rates() -> None:
    def loss(trial: Trial) -> float | None:
        return None if trial.rate > 0.2 else bowl(0.1, 2.0, 32)(trial)

    done, _ = searched(loss, 20_000.0, epoch_tokens=1_000_000, examples=3_200)
    *short, whole = [result.trial for result in done[:4]]
    assert all(trial.short for trial in short)
    assert not whole.short
    assert whole.rate < 0.2
    assert done[-1].trial.refit


@pytest.mark.parametrize("epochs", [2.5, 3.0, 3.9, 4.2, 4.5, 5.0, 6.0, 8.0, 12.0])
@pytest.mark.parametrize("single", [frozenset[str](), frozenset({"dense", "lora"})])
def test_where_few_rows_are_held_out_rates_are_compared_at_any_budget(
    epochs: float, single: frozenset[str]
) -> None:
    """50,000 rows: a second run on all of them, at the first guess of the rate, wins nothing."""
    seconds = 10_000.0 * epochs
    done, left = searched(
        bowl(0.3, 3.0, 32),
        seconds,
        epoch_tokens=10_000_000,
        examples=50_000,
        all_rows=FEW_HELD_OUT,
        single=single,
    )
    whole = next(n for n, one in enumerate(done) if one.trial.main or one.trial.epochs >= LEAST_EPOCHS)
    assert whole >= 2
    assert sum(one.train_s for one in done[:whole]) < 2 * PROBE_SHARE * seconds
    assert done[whole].trial.rate < 0.7
    assert left < 0.3 * seconds
    again = [one.trial for one in done if one.trial.refit and not one.trial.last_pass]
    assert bool(again) == (not single and not done[whole].trial.main)
    assert not any(one.trial.main for one in done[whole + 1 :])


def test_a_last_run_that_nothing_follows_takes_the_time() -> None:
    done, left = searched(
        bowl(1.0, 3.0, 32),
        50_000.0,
        epoch_tokens=10_000_000,
        examples=50_000,
        all_rows=FEW_HELD_OUT,
        single=frozenset({"dense"}),
    )
    main = next(one.trial for one in done if one.trial.main)
    assert 4.0 < main.epochs < 5.0
    assert not main.short
    assert left < 0.05 * 50_000


def test_no_short_trial_comes_before_a_run_that_is_hardly_longer() -> None:
    lora = frozenset({"lora"})
    # Three short trials take 31.5 s; a trial and two runs on all rows 35 s an epoch, and 5% more.
    for seconds, is_short in ((80.0, False), (92.0, True)):
        left = plenty(left_s=seconds, all_s=seconds, all_rows=1.25, trial_s=0.0, lora=lora, tiny=True)
        first = first_trial(START, replace(left, examples=120))
        assert (first.arm, first.short) == ("lora", is_short)


def test_after_short_trials_of_lora_a_run_that_is_hardly_longer_comes_only_if_they_gave_no_number() -> None:
    trial = Trial(arm="lora", epochs=1.0, short=True, batch=2)
    left = plenty(left_s=45.0, all_s=90.0, all_rows=1.25, trial_s=0.0, tiny=True, lora=frozenset({"lora"}))
    for loss, is_run in ((None, True), (2.0, False)):  # time for 1.2 epochs, and two runs on all rows
        done = [
            TrialResult(trial=replace(trial, rate=rate), loss=loss, tokens=1, train_s=1.0, factor=1.0)
            for rate in (3.0, 1.0, 1 / 3)
        ]
        following = next_trial(START, done, replace(left, examples=120))
        assert following
        assert (not following.refit) is is_run


def test_a_short_trial_of_pairs_has_no_rate_above_the_plan_s() -> None:
    """None above it was measured; others' is raised for the shorter run."""
    for pairs, raised in ((True, False), (False, True)):
        budget = plenty(all_s=40_000.0, left_s=40_000.0, epoch_tokens=1_000_000, examples=3_200, pairs=pairs)
        first = first_trial(START, budget)
        assert first.short
        assert (first.rate > rate_factor(replace(first, epochs=2.5), budget)) is raised
