"""Runs of full length that gave no number, or were worse than a probe: again, at lower rates."""

from itertools import takewhile

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.full_length import MOST_TRIES, last_pass
from trainer_node.engine.search.strategy.neighbours import RATE_STEP, is_like
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.trial import Trial, TrialResult


def test_a_last_run_without_a_loss_is_run_again_at_lower_rates() -> None:
    """One epoch takes 10,000 s, the job has 9,000: probes, then one long run, which ends early."""
    probe = Trial(arm="dense", epochs=0.03)
    done = [TrialResult(trial=probe, loss=2.0, tokens=1, train_s=270.0)]
    left, mains = 8_000.0, list[Trial]()
    while trial := next_trial(
        START, done, plenty(left_s=left, all_s=9_000.0, epoch_tokens=10_000_000, examples=50_000)
    ):
        if trial.main:
            mains.append(trial)
            left -= 1_000.0
        done.append(TrialResult(trial=trial, loss=None if trial.main else 2.1, tokens=1, train_s=1.0))
    assert len(mains) == MOST_TRIES
    rates = [trial.rate for trial in mains]
    assert rates[1:] == pytest.approx([rate / RATE_STEP for rate in rates[:-1]])
    assert done[-1].trial.main  # no short run is repeated on all rows


def test_a_first_run_of_full_length_without_a_loss_is_run_again_at_a_lower_rate() -> None:
    """After short trials: what they have is no run to be repeated on all rows."""
    short = Trial(arm="dense", epochs=0.2, short=True)
    done = [TrialResult(trial=short, loss=2.0, tokens=1, train_s=1.0)]
    for rate in (1 / 3, 3.0):
        done.append(TrialResult(trial=replace(short, rate=rate), loss=2.1, tokens=1, train_s=1.0))
    long = list[Trial]()
    budget = plenty(left_s=50_000.0, all_s=60_000.0, epoch_tokens=10_000_000, examples=50_000, all_rows=1.02)
    while trial := next_trial(START, done, budget):
        long.append(trial)
        done.append(TrialResult(trial=trial, loss=None, tokens=1, train_s=1.0))
    assert [trial.epochs >= 2.0 for trial in long] == [True] * MOST_TRIES
    assert long[1].rate == pytest.approx(long[0].rate / RATE_STEP)


@pytest.mark.parametrize(
    ("seconds", "examples", "epoch_tokens"),
    [
        (60.0, 500, 10_000),  # whole trials
        (300.0, 60, 10_000),
        (20.0, 500, 10_000),  # one run
        (9000.0, 50_000, 10_000_000),  # probes
        (60_000.0, 20_000, 10_000_000),  # short trials
    ],
)
def test_runs_without_a_number_are_followed_by_lower_rates_until_one_has_one(
    seconds: float, examples: int, epoch_tokens: int
) -> None:
    done, left = searched(
        lambda trial: bowl(0.05, 2.0, 32)(trial) if trial.rate < 0.1 else None,
        seconds,
        examples=examples,
        epoch_tokens=epoch_tokens,
        all_rows=1.02 if examples > 500 else 1.25,
    )
    failed = [result.trial.rate for result in takewhile(lambda result: result.loss is None, done)]
    assert failed == sorted(failed, reverse=True)
    assert best_of(done) or left < 0.1 * seconds


def test_short_trials_that_were_slow_and_gave_no_number_are_followed_by_one_long_run() -> None:
    """There is no time for a run of full length any more, and another one on all rows."""
    short = Trial(arm="dense", epochs=1.0, short=True, batch=2)
    done = [
        TrialResult(trial=replace(short, rate=rate), loss=None, tokens=1, train_s=30.0)
        for rate in (1.0, 1 / 3, 1 / 9)
    ]
    trial = next_trial(START, done, plenty(left_s=20.0, all_s=110.0, all_rows=1.25))
    assert trial is not None
    assert trial.main
    assert not trial.short
    assert trial.rate == pytest.approx(1 / 27, rel=0.2)


def test_without_time_a_failed_last_run_is_the_end() -> None:
    done = [
        TrialResult(trial=Trial(arm="dense", epochs=0.03), loss=2.0, tokens=1, train_s=1.0),
        TrialResult(trial=Trial(arm="dense", epochs=1.0, main=True), loss=None, tokens=1, train_s=1.0),
    ]
    assert next_trial(START, done, plenty(left_s=90.0, all_s=1_000.0)) is None


@pytest.mark.parametrize(("seconds", "refits"), [(24.0, 0), (48.0, 1)])
def test_a_first_run_of_lora_that_gave_no_number_is_run_again_at_a_lower_rate(
    seconds: float, refits: int
) -> None:
    """There is time for a trial and one run on all rows, or two: a third of it is lost."""
    done, _ = searched(
        lambda trial: bowl(0.5, 2.0, 2)(trial) if trial.rate < 1.0 else None,
        seconds,
        all_rows=1.25,
        trial_s=0.0,
        tiny=True,
        lora=frozenset({"lora"}),
    )
    first, second = (result.trial for result in done[:2])
    assert first.arm == "lora"
    assert second == replace(first, rate=first.rate / RATE_STEP)
    assert done[1].loss is not None
    assert sum(result.trial.refit for result in done) == refits


def test_no_run_is_longer_than_one_like_it_that_has_turned() -> None:
    best = TrialResult(trial=Trial(arm="dense", rate=1.2, epochs=4.0), loss=2.0, tokens=1, train_s=1.0)
    turned = replace(best, trial=Trial(arm="dense", epochs=4.0), loss=2.1, lowest_epochs=3.0)
    done, tried = [best, turned], list[Trial]()
    while trial := next_trial(START, done, plenty()):
        if trial.refit:
            break
        tried.append(trial)
        done.append(TrialResult(trial=trial, loss=3.0, tokens=1, train_s=1.0))
    alike = [trial for trial in tried if is_like(trial, best.trial)]
    assert alike
    assert max(trial.epochs for trial in alike) < 4.0  # without the other one's turn 8 and 6 come


@pytest.mark.parametrize(("share", "kept"), [(1.1, 1.0), (0.6, 0.6), (0.2, None)])
def test_a_last_pass_has_as_many_rows_as_there_is_time_for(share: float, kept: float | None) -> None:
    """The run before it may have been slower than it was thought to be."""
    main = TrialResult(
        trial=Trial(arm="dense", epochs=1.5, main=True), loss=2.0, tokens=15_000, train_s=20.0, factor=1.0
    )
    rows_s = 0.2 * 10_000 / 1000.0
    budget = plenty(all_rows=1.2, trial_s=7.0, refit_s=3.0, left_s=3.0 + share * rows_s)
    last = last_pass(main, main, budget)
    assert (last.epochs if last else None) == (kept and pytest.approx(kept))
