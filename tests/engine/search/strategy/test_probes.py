"""Probes: short runs that compare rates where no second run of full length fits."""

import pytest
from msgspec.structs import replace

from tests.engine.search.strategy.surfaces import START, bowl, plenty, searched
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.probes import PROBE_SHARE
from trainer_node.engine.search.trial import TrialResult


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
