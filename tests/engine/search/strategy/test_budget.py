"""What trials cost, and whether there is time for them."""

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import plenty
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.trial import Trial, last_pass_of


def test_a_budget_leaves_room_for_a_late_trial() -> None:
    budget = Budget(left_s=100.0, tokens_per_s=100.0, epoch_tokens=4_000, examples=100, trial_s=0.0, all_s=1)
    assert budget.fits(Trial(arm="dense", epochs=2.0))
    assert not budget.fits(Trial(arm="dense", epochs=2.6))
    assert TRIAL_SAFETY * budget.cost_s(Trial(arm="dense", epochs=2.0)) < 100.0


def test_a_batch_that_does_not_fill_the_smallest_packs_costs_as_much_as_one_that_does() -> None:
    budget = plenty(least_batch=20.0, trial_s=0.0)
    costs = [budget.cost_s(Trial(arm="dense", batch=batch)) for batch in (4, 10, 20, 40)]
    assert [cost / costs[-1] for cost in costs] == pytest.approx([0.97 * 5.0, 0.97 * 2.0, 1.0, 1.0])
    assert budget.cost_s(Trial(arm="dense", batch=16)) == costs[-1]  # as good as full
    refit = Trial(arm="dense", batch=10, refit=True)
    assert budget.cost_s(refit) == pytest.approx(budget.all_rows * costs[1])


def test_a_pass_over_the_development_rows_costs_their_tokens() -> None:
    budget = plenty(all_rows=1.25, trial_s=2.0, least_batch=8.0)
    run, small = Trial(arm="dense", batch=32), Trial(arm="dense", batch=4)
    epoch_s = 10_000 / budget.tokens_per_s
    assert budget.cost_s(last_pass_of(run)) == pytest.approx(2.0 + 0.25 * epoch_s)
    assert budget.cost_s(last_pass_of(small)) == pytest.approx(2.0 + 0.25 * 0.97 * 2 * epoch_s)


def test_a_run_on_all_rows_is_not_scored_with_factors() -> None:
    budget = plenty(all_rows=1.25, trial_s=7.0, refit_s=2.0)
    trial = Trial(arm="dense")
    assert budget.cost_s(replace(trial, refit=True)) == pytest.approx(
        2.0 + 1.25 * (budget.cost_s(trial) - 7.0)
    )
    assert plenty(trial_s=7.0).other_s(refit=True) == 7.0


def test_a_run_and_one_on_all_rows_fit_or_not() -> None:
    trial, epoch_s = Trial(arm="dense", epochs=1.0), 10.0
    for seconds, fits in ((1.06 * 2.25 * epoch_s, True), (1.04 * 2.25 * epoch_s, False)):
        assert plenty(all_rows=1.25, trial_s=0.0, left_s=seconds).fits_with(trial, 1) is fits


def test_each_step_takes_time_of_its_own() -> None:
    budget = plenty(trial_s=0.0, step_s=0.08)  # as long as 80 tokens, or 4 rows
    costs = [budget.cost_s(Trial(arm="dense", batch=batch, epochs=1.0)) for batch in (2, 4, 400)]
    assert costs == pytest.approx([30.0, 20.0, 10.1])
