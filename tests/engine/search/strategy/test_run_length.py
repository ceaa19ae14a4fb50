"""How long a run may be, and the last pass over the development rows."""

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.first_trial import first_trial
from trainer_node.engine.search.strategy.run_length import main_run, whole_run
from trainer_node.engine.search.trial import Trial, last_pass_of


def test_the_length_of_a_whole_run_is_not_that_of_the_trial_before() -> None:
    budget = Budget(
        left_s=1000.0, tokens_per_s=100.0, epoch_tokens=10_000, examples=1_000, trial_s=60.0, all_s=1000.0
    )
    found = {whole_run(replace(START[0], epochs=epochs), budget) for epochs in (0.5, 1.0, 4.0)}
    assert found == {replace(START[0], epochs=2.5)}


def test_of_lora_two_runs_on_all_rows_are_worth_it_with_many_rows_too() -> None:
    lora = frozenset({"lora"})
    for epochs, tiny, whole in ((5.6, False, 5.6 / 3.04), (4.4, False, 4.4 / 2.02), (5.6, True, 2.5)):
        seconds = TRIAL_SAFETY * epochs * 10.0
        budget = plenty(left_s=seconds, all_s=seconds, trial_s=0.0, all_rows=1.02, lora=lora, tiny=tiny)
        found = whole_run(START[1], budget)
        assert found
        assert found.epochs == pytest.approx(whole)


@pytest.mark.parametrize(
    ("epochs", "all_rows", "single", "whole", "refits"),
    [
        (4.4, 1.25, False, 4.4 / 2.25, 0),  # below 2: no whole run
        (5.0, 1.25, False, 5.0 / 2.25, 1),
        (5.6, 1.25, False, 5.6 / 3.5, 2),
        (5.6, 1.25, True, 5.6 / 2.25, 1),  # an average isn't to be had
        (5.6, 1.02, False, 2.5, 1),  # a second run would see no more rows
    ],
)
def test_two_runs_on_all_rows_are_worth_a_shorter_first_one(
    epochs: float, all_rows: float, single: bool, whole: float, refits: int
) -> None:
    seconds = TRIAL_SAFETY * epochs * 10.0
    arms = frozenset({"dense"}) if single else frozenset[str]()
    budget = plenty(left_s=seconds, all_s=seconds, trial_s=0.0, all_rows=all_rows, single=arms)
    found = whole_run(START[0], budget)
    assert (found.epochs if found else 0.0) == pytest.approx(whole if refits else 0.0)


@pytest.mark.parametrize("left_s", [20.0, 60.0, 400.0])
def test_one_run_has_the_epochs_that_there_is_time_for(left_s: float) -> None:
    """What scores it, and what a trial takes to begin, is not in the time that is left."""
    budget = plenty(left_s=left_s, all_s=400.0, trial_s=60.0, epoch_tokens=1_000_000, examples=50_000)
    trial = first_trial(START, budget)
    assert trial.main
    assert trial.epochs == pytest.approx(left_s * budget.tokens_per_s / 1_000_000)


def test_a_long_run_is_followed_by_a_pass_over_the_development_rows() -> None:
    done, left = searched(
        bowl(3.0, 2.0, 32), 18_000.0, epoch_tokens=10_000_000, examples=50_000, all_rows=1.1
    )
    *_, main, last = (result.trial for result in done)
    assert main.main
    assert last == last_pass_of(main)
    assert (last.rate, last.epochs, last.refit) == (main.rate / 4, 1.0, True)
    assert 0 <= left < 0.05 * 18_000


def test_no_pass_follows_a_long_run_that_was_worse_than_a_probe_or_has_no_loss() -> None:
    for long_loss in (9.0, None):

        def loss(trial: Trial, long_loss: float | None = long_loss) -> float | None:
            return long_loss if trial.main else bowl(3.0, 2.0, 32)(trial)

        done, _ = searched(loss, 18_000.0, epoch_tokens=10_000_000, examples=50_000, all_rows=1.1)
        assert any(result.trial.main for result in done)
        assert not any(result.trial.last_pass for result in done)


def test_no_pass_follows_a_run_that_has_not_seen_all_training_rows() -> None:
    done, _ = searched(bowl(3.0, 2.0, 32), 9000.0, epoch_tokens=10_000_000, examples=50_000, all_rows=1.1)
    assert done[-1].trial.main
    assert done[-1].trial.leaves_s == 0.0


def test_a_pass_that_would_take_most_of_the_time_is_not_planned() -> None:
    done, _ = searched(bowl(3.0, 2.0, 32), 20.0, epoch_tokens=100_000, examples=500, all_rows=2.0)
    assert done[0].trial.main
    assert done[0].trial.leaves_s == 0.0


def test_the_time_of_a_last_pass_is_not_taken_by_the_scores_before_it() -> None:
    budget = plenty(left_s=100.0, all_s=100.0, all_rows=1.1, trial_s=9.0, refit_s=4.0, epoch_tokens=50_000)
    found = main_run(START[0], budget)
    assert found.leaves_s == pytest.approx(TRIAL_SAFETY * (4.0 + 0.1 * 50.0 + 9.0 - 4.0))
