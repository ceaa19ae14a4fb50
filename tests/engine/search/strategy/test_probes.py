"""Probes: short runs that compare rates where no second run of full length fits."""

from typing import Any

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.first_trial import first_trial
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.prior import ONCE_FACTOR, rate_factor
from trainer_node.engine.search.strategy.probes import PROBE_SHARE, PROBE_STEPS, PROBE_TRIALS
from trainer_node.engine.search.strategy.rates import at_best_rate
from trainer_node.engine.search.trial import Trial, TrialResult

WIDE = (Trial(arm="dense", batch=32), Trial(arm="lora", batch=32))


def _few_steps(epochs: float, **changes: Any) -> Budget:
    """Time for so many epochs of 8,000 rows, 5% more on all; 40 steps of 32 rows are a sixth of an epoch."""
    time_s = 800.0 * epochs
    known = {"all_rows": 1.05, "examples": 8000, "epoch_tokens": 800_000, **changes}
    return plenty(**{"left_s": time_s, "all_s": time_s, **known})


def _main_after(probe: Trial, factor: float | None, budget: Budget) -> Trial:
    """The trial that follows a probe."""
    result = TrialResult(trial=probe, loss=2.0, tokens=1, train_s=1.0, factor=factor)
    left_s = budget.left_s - budget.cost_s(probe)
    trial = next_trial(WIDE, [result], replace(budget, left_s=left_s))
    assert trial is not None
    return trial


@pytest.mark.parametrize("epochs", [1.5, 2.0, 2.5])
def test_one_probe_of_forty_steps_tells_the_rate_of_the_long_run(epochs: float) -> None:
    budget = _few_steps(epochs)
    probe = first_trial(WIDE, budget)
    assert budget.steps(probe) == pytest.approx(PROBE_STEPS)
    assert 0.03 * budget.all_s < budget.cost_s(probe) <= PROBE_SHARE * budget.all_s
    low, right, high, highest = (_main_after(probe, factor, budget) for factor in (1.2, 1.0, 0.8, 0.7))
    assert right.main
    assert right.rate == pytest.approx(rate_factor(right, budget))  # the prior's
    assert low.rate == pytest.approx(right.rate * 1.2**3)
    assert high.rate == right.rate  # nothing has shown yet that a lower one is better
    assert highest.rate == pytest.approx(right.rate * 0.7**3)


def test_rows_that_are_seen_once_have_a_higher_rate_after_a_probe_as_well() -> None:
    """The run has less than 1.5 epochs only after the probe."""
    budget = _few_steps(1.6)
    main = _main_after(first_trial(WIDE, budget), 1.0, budget)
    assert main.epochs < 1.5
    assert main.rate == pytest.approx(rate_factor(main, budget))
    assert main.rate > 0.8 * ONCE_FACTOR * rate_factor(replace(main, epochs=1.51), budget)


@pytest.mark.parametrize(
    ("epochs", "changes"),
    [
        (1.3, {}),  # 40 steps are more than 12%
        (3.0, {"factors": False}),  # sharded weights: one probe tells nothing
        (3.0, {"width": 4}),  # each of four devices would have one, and all the long run next
        (3.0, {"trial_s": 150.0}),  # more than the probe's steps take
    ],
)
def test_otherwise_one_run_takes_all_the_time(epochs: float, changes: dict[str, Any]) -> None:
    assert first_trial(WIDE, _few_steps(epochs, **changes)).main


def test_a_second_run_on_all_rows_is_worth_more_than_a_probe() -> None:
    """A fifth of 2,500 rows is held out."""
    budget = _few_steps(4.0, examples=2000, epoch_tokens=200_000, all_rows=1.25, left_s=800.0, all_s=800.0)
    start = [replace(WIDE[0], batch=8)]
    assert 1.0 <= first_trial(start, budget).epochs < 2.0
    assert first_trial(start, replace(budget, tiny=True)).epochs < LEAST_EPOCHS


def test_preference_pairs_have_no_rate_above_the_plan_s_and_a_lower_one_next() -> None:
    budget = _few_steps(1.0, examples=60_000, epoch_tokens=6_000_000, pairs=True, factors=False)
    budget = replace(budget, left_s=6000.0, all_s=6000.0)
    probe = first_trial(WIDE, budget)
    assert probe.rate == 1.0
    assert probe.epochs == pytest.approx(0.03, rel=0.02)
    assert _main_after(probe, None, budget).rate == pytest.approx(1 / 3)


def test_a_long_run_that_was_worse_than_a_probe_is_run_again_lower() -> None:
    """It ended early, and left time; nothing goes on from the probe."""
    budget = _few_steps(4.0, all_rows=1.2)
    probe, main = Trial(arm="dense", epochs=0.1), Trial(arm="dense", epochs=3.0, main=True)
    done = [TrialResult(trial=probe, loss=2.0, tokens=1, train_s=80.0)]
    done.append(TrialResult(trial=main, loss=3.0, tokens=1, train_s=800.0))
    again = next_trial(WIDE, done, replace(budget, left_s=1000.0))
    assert again is not None
    assert again.main
    assert again.rate == pytest.approx(1 / 3)
    assert next_trial(WIDE, done, replace(budget, left_s=100.0)) is None
    done.append(TrialResult(trial=again, loss=2.5, tokens=1, train_s=100.0))
    assert next_trial(WIDE, done, replace(budget, left_s=900.0)) is None


def test_a_probe_is_no_run_of_full_length_at_its_rate() -> None:
    """The long run asks for the probe's rate: that was never run for so long."""
    probe, main = Trial(arm="dense", rate=1.6, epochs=0.1), Trial(arm="dense", epochs=2.0, main=True)
    done = [TrialResult(trial=probe, loss=3.0, tokens=1, train_s=80.0)]
    done.append(TrialResult(trial=main, loss=2.0, tokens=1, train_s=800.0, factor=1.2))
    assert at_best_rate(done[1], done).rate == pytest.approx(1.2**3)


def test_four_probes_fit_into_their_share_however_it_is_rounded() -> None:
    budget = _few_steps(1.0, examples=60_000, epoch_tokens=6_000_000, factors=False, trial_s=7.0)
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
