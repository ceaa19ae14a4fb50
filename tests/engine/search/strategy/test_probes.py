"""Probes: short runs that compare rates where no second run of full length fits."""

from typing import Any

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.first_trial import first_trial
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.prior import rate_factor
from trainer_node.engine.search.strategy.probes import PROBE_SHARE, PROBE_TRIALS
from trainer_node.engine.search.strategy.rates import HORIZON, at_best_rate
from trainer_node.engine.search.strategy.run_length import main_run
from trainer_node.engine.search.trial import Trial, TrialResult

WIDE = (Trial(arm="dense", batch=32), Trial(arm="lora", batch=32))


def _many_rows(epochs: float, **changes: Any) -> Budget:
    """Time for so many epochs of 60,000 rows, 1% more on all; 40 steps of 32 rows are 2% of an epoch."""
    time_s = 6000.0 * epochs
    known = {"all_rows": 1.01, "examples": 60_000, "epoch_tokens": 6_000_000, **changes}
    return plenty(**{"left_s": time_s, "all_s": time_s, **known})


def _main_after(probe: Trial, factor: float | None, budget: Budget) -> Trial:
    """The trial that follows a probe, without time for another one."""
    result = TrialResult(trial=probe, loss=2.0, tokens=1, train_s=1.0, factor=factor)
    left_s = (1.0 - PROBE_SHARE) * budget.left_s
    trial = next_trial(WIDE, [result], replace(budget, left_s=left_s))
    assert trial is not None
    assert trial.main
    return trial


@pytest.mark.parametrize("epochs", [0.9, 2.0, 4.0])
def test_a_probe_has_a_rate_that_leads_to_the_prior_s_in_the_long_run(epochs: float) -> None:
    budget = _many_rows(epochs)
    probe = first_trial(WIDE, budget)
    assert budget.cost_s(probe) == pytest.approx(0.03 * budget.all_s)
    low, right, high, highest = (_main_after(probe, factor, budget) for factor in (1.1, 1.0, 0.8, 0.7))
    assert right.rate == pytest.approx(rate_factor(right, budget), rel=0.03)
    assert low.rate == pytest.approx(right.rate * 1.1**3)
    assert high.rate == right.rate  # nothing has shown yet that a lower one is better
    assert highest.rate == pytest.approx(right.rate * 0.7**3)


def test_a_real_model_s_probe_raises_the_rate_by_half_at_most() -> None:
    for tiny, times in ((False, 1.5), (True, 1.3**3)):
        budget = _many_rows(2.0, tiny=tiny)
        probe = first_trial(WIDE, budget)
        right, low = (_main_after(probe, factor, budget) for factor in (1.0, 1.3))
        assert low.rate == pytest.approx(right.rate * times)


def test_rows_that_are_seen_once_have_a_higher_rate_after_a_probe_as_well() -> None:
    """The run has less than 1.5 epochs only after the probe."""
    budget = _many_rows(1.53, all_rows=1.0)
    probe = first_trial(WIDE, budget)
    whole = main_run(probe, replace(budget, left_s=budget.left_s - budget.cost_s(probe)))
    assert whole.epochs < 1.5
    assert probe.rate * (whole.epochs / probe.epochs) ** -HORIZON == pytest.approx(rate_factor(whole, budget))
    assert rate_factor(whole, budget) > 1.2 * rate_factor(replace(whole, epochs=1.51), budget)


def test_too_few_steps_for_a_probe_are_one_run() -> None:
    assert first_trial(WIDE, _many_rows(0.7)).main


def test_preference_pairs_have_no_rate_above_the_plan_s_and_a_lower_one_next() -> None:
    budget = _many_rows(1.0, pairs=True)
    probe = first_trial(WIDE, budget)
    assert probe.rate == 1.0
    result = TrialResult(trial=probe, loss=2.0, tokens=1, train_s=1.0)
    second = next_trial(WIDE, [result], replace(budget, left_s=budget.left_s - budget.cost_s(probe)))
    assert second is not None
    assert second.rate == pytest.approx(1 / 3)


def test_a_long_run_that_was_worse_than_a_probe_is_run_again_lower() -> None:
    """It ended early, and left time; nothing goes on from the probe."""
    budget = _many_rows(4.0, all_rows=1.2)
    probe, main = Trial(arm="dense", epochs=0.1), Trial(arm="dense", epochs=3.0, main=True)
    done = [TrialResult(trial=probe, loss=2.0, tokens=1, train_s=80.0)]
    done.append(TrialResult(trial=main, loss=3.0, tokens=1, train_s=800.0))
    again = next_trial(WIDE, done, replace(budget, left_s=8000.0))
    assert again is not None
    assert again.main
    assert again.rate == pytest.approx(1 / 3)
    assert next_trial(WIDE, done, replace(budget, left_s=100.0)) is None
    done.append(TrialResult(trial=again, loss=2.5, tokens=1, train_s=100.0))
    assert next_trial(WIDE, done, replace(budget, left_s=7000.0)) is None


def test_a_probe_is_no_run_of_full_length_at_its_rate() -> None:
    """The long run asks for the probe's rate: that was never run for so long."""
    probe, main = Trial(arm="dense", rate=1.6, epochs=0.1), Trial(arm="dense", epochs=2.0, main=True)
    done = [TrialResult(trial=probe, loss=3.0, tokens=1, train_s=80.0)]
    done.append(TrialResult(trial=main, loss=2.0, tokens=1, train_s=800.0, factor=1.2))
    assert at_best_rate(done[1], done).rate == pytest.approx(1.2**3)


def test_four_probes_fit_into_their_share_however_it_is_rounded() -> None:
    budget = _many_rows(1.0, trial_s=7.0)
    budget = replace(budget, left_s=6000.1, all_s=6000.1)
    done: list[TrialResult] = []
    while not (trial := next_trial(WIDE, done, budget)).main:  # type: ignore[union-attr]
        done.append(TrialResult(trial=trial, loss=trial.rate, tokens=1, train_s=1.0))  # type: ignore[union-attr, arg-type]
        budget = replace(budget, left_s=budget.left_s - budget.cost_s(done[-1].trial))
    assert len(done) == PROBE_TRIALS


def test_with_little_time_probes_choose_the_rate_of_one_long_run() -> None:
    # One epoch takes 10,000 s, the job has 9,000: no second run would fit.
    done, left = searched(bowl(3.0, 2.0, 32), 9000.0, epoch_tokens=10_000_000, examples=50_000)
    *probes, main = done
    assert main.trial.main
    assert not any(result.trial.main for result in probes)
    assert all(result.trial.epochs < LEAST_EPOCHS for result in probes)
    assert sum(result.train_s for result in probes) <= 1.001 * PROBE_SHARE * 9000
    assert 1.0 < main.trial.rate < 3.5  # towards 3, less what a longer run wants
    assert left < 0.05 * 9000


def test_after_a_probe_that_diverged_the_next_one_has_a_third_of_its_rate() -> None:
    done, _ = searched(
        lambda trial: bowl(0.3, 2.0, 32)(trial) if trial.rate < 0.5 else None,
        9000.0,
        epoch_tokens=10_000_000,
        examples=50_000,
    )
    rates = [result.trial.rate / done[0].trial.rate for result in done if not result.trial.main]
    assert rates[:2] == pytest.approx([1.0, 1 / 3])


def test_a_run_shorter_than_its_probes_has_no_higher_rate() -> None:
    probe = replace(START[0], epochs=0.4)
    done = [TrialResult(trial=probe, loss=3.0, tokens=1, train_s=1.0)]
    main = next_trial(START, done, plenty(left_s=1.0, all_s=1_000.0, epoch_tokens=1_000_000, examples=50_000))
    assert main is not None
    assert main.main
    assert main.rate <= probe.rate
