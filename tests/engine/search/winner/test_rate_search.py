"""The winner's search for a rate, on training losses that are known."""

import math
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.trial import Trial, TrialResult
from trainer_node.engine.search.winner.rate_search import (
    COARSE,
    LEAST_EPOCHS,
    MOST_EPOCHS,
    MOST_EPOCHS_FEW,
    OF_PAIRS,
    OF_TEXT,
    SHARE,
    Judge,
    chosen,
    next_trial,
)

START = Trial(arm="dense", batch=50)
SPEED = 1000.0
Loss = Callable[[Trial], float | None]


def searched(
    loss: Loss,
    seconds: float,
    *,
    epoch_tokens: int = 1_000_000,
    examples: int = 10_000,
    judge: Judge = OF_TEXT,
    all_rows: float = 1.0,
    held_out: float | None = None,
) -> list[TrialResult]:
    """All trials of one job whose step has 5,000 tokens."""
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
            all_rows=all_rows,
        )
        trial = next_trial(START, done, budget, judge)
        if trial is None:
            return done
        left -= budget.cost_s(trial)
        probe_loss = loss(trial) if trial.stage else None
        result = TrialResult(trial=trial, loss=held_out, probe_loss=probe_loss, tokens=1, train_s=1.0)
        done.append(result)


def lowest_at(rate: float, bend: float = 0.2) -> Loss:
    """A parabola in the rate's decades."""
    return lambda trial: 2.0 + bend * math.log10(trial.rate / rate) ** 2


def stages(done: list[TrialResult]) -> list[str]:
    return [result.trial.stage for result in done]


def test_with_time_three_stages_come_close_to_a_sharp_lowest_point() -> None:
    *probes, main = searched(lowest_at(1.6, bend=20.0), 20_000.0)
    assert stages(probes) == ["coarse"] * 4 + ["fine"] * 4 + ["gaps"] * 2
    assert [probe.trial.rate for probe in probes[:4]] == pytest.approx([10**rate for rate in COARSE])
    assert main.trial.main
    assert main.trial.stage == ""
    assert main.trial.rate == pytest.approx(1.6, rel=0.15)


def test_the_highest_rate_within_the_tolerance_is_taken() -> None:
    *_, main = searched(lowest_at(1.0, bend=0.02), 20_000.0)
    assert main.trial.rate > 3.0  # 2.5% of 2 nats are .05


def test_probes_together_keep_within_their_share() -> None:
    for seconds in range(50, 20_000, 137):
        done = searched(lowest_at(1.0), float(seconds))
        probed = sum(1.0 + one.trial.epochs * 1000 for one in done if one.trial.stage)
        assert probed <= SHARE * seconds
        assert done[-1].trial.main


def test_fewer_epochs_mean_fewer_stages() -> None:
    ten = dict.fromkeys(stages(searched(lowest_at(1.0), 20_000.0)))
    assert list(ten) == ["coarse", "fine", "gaps", ""]
    assert "gaps" not in stages(searched(lowest_at(1.0), 20_000.0, epoch_tokens=12_000_000, examples=70_000))
    check = searched(lowest_at(1.0), 10_000.0, epoch_tokens=12_000_000, examples=70_000)
    assert stages(check) == ["check"] * 3 + [""]


def test_without_time_for_fifteen_steps_each_nothing_is_probed() -> None:
    (main,) = searched(lowest_at(3.0), 1_000.0)
    assert main.trial.rate == 1.0


@pytest.mark.parametrize(
    ("seconds", "examples", "epochs"),
    [
        (100_000.0, 5_000, MOST_EPOCHS_FEW),
        (100_000.0, 10_000, MOST_EPOCHS),
        (100.0, 10_000, LEAST_EPOCHS),
    ],
)
def test_the_number_of_epochs_has_bounds(seconds: float, examples: int, epochs: float) -> None:
    assert searched(lowest_at(1.0), seconds, examples=examples)[-1].trial.epochs == epochs


def test_the_run_that_counts_is_planned_a_little_longer_than_there_is_time() -> None:
    main = searched(lowest_at(1.0), 2_000.0)[-1].trial
    left = 0.8 * 2.0
    assert main.epochs == pytest.approx(1.25 * 0.85 * left, rel=0.02)


def test_a_diverged_probe_is_left_out_and_only_diverged_ones_lower_the_rate() -> None:
    done = searched(lambda trial: None if trial.rate > 1.5 else lowest_at(4.0)(trial), 20_000.0)
    assert done[-1].trial.rate < 1.5
    done = searched(lambda trial: None, 20_000.0)
    assert done[-1].trial.rate < 0.1


def test_pairs_never_get_a_higher_rate_than_the_plan_and_the_lowest_loss_wins() -> None:
    done = searched(lowest_at(4.0), 20_000.0, judge=OF_PAIRS)
    assert max(result.trial.rate for result in done) <= 1.001
    sharp = searched(lowest_at(0.6), 20_000.0, judge=OF_PAIRS)
    assert sharp[-1].trial.rate == pytest.approx(0.6, rel=0.2)
    trials = [result.trial for result in sharp]
    assert len(set(trials)) == len(trials)


def test_longer_probes_count_more() -> None:
    short = TrialResult(
        trial=Trial(arm="dense", stage="coarse", rate=9.0, epochs=0.1),
        loss=None,
        probe_loss=1.0,
        tokens=1,
        train_s=1.0,
    )
    long = TrialResult(
        trial=Trial(arm="dense", stage="fine", rate=2.0, epochs=0.2),
        loss=None,
        probe_loss=1.5,
        tokens=1,
        train_s=1.0,
    )
    assert chosen([short, long]) == 2.0


def test_a_pass_over_the_development_rows_follows_at_a_quarter_of_the_rate_in_the_time_left_for_it() -> None:
    *_, main, last = searched(lowest_at(1.0), 20_000.0, all_rows=1.1, held_out=2.0)
    assert main.trial.main
    assert main.trial.leaves_s >= 1.0 + 0.1 * 1_000_000 / SPEED
    assert last.trial == replace(
        main.trial, main=False, refit=True, last_pass=True, leaves_s=0.0, epochs=1.0, rate=main.trial.rate / 4
    )


def test_no_such_pass_follows_a_run_without_a_loss_nor_for_pairs() -> None:
    assert searched(lowest_at(1.0), 20_000.0, all_rows=1.1)[-1].trial.main
    pairs = searched(lowest_at(1.0), 20_000.0, all_rows=1.1, held_out=2.0, judge=OF_PAIRS)
    assert pairs[-1].trial.main
    assert pairs[-1].trial.leaves_s == 0.0


def test_time_to_score_averages_is_left_up_to_a_share() -> None:
    def left(score_s: float) -> float:
        budget = Budget(
            left_s=1000.0,
            tokens_per_s=SPEED,
            epoch_tokens=10**6,
            examples=10_000,
            trial_s=0.0,
            all_s=1000.0,
            score_s=score_s,
        )
        trial = next_trial(START, [], budget)
        assert trial is not None
        assert trial.main
        return trial.leaves_s

    assert left(1.0) == 8.0
    assert left(100.0) == pytest.approx(40.0)
