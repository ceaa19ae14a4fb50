"""The factor on what a run has changed at which its loss is lowest, and the rate that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from tests.engine.search.search_run import record_of
from tests.engine.worker_run import finish, progress_of
from trainer_node.engine.search.strategy import first_trial, next_trial
from trainer_node.engine.search.strategy.delta_factor import (
    LEAST,
    LEAST_CHANGE,
    LEAST_ROWS,
    LESS,
    MORE,
    MOST_CHANGE,
    MOST_ROWS,
    PASSES,
    TIME_SHARE,
    Losses,
    best_factor,
    rate_change,
    rows_to_score,
)
from trainer_node.engine.search.trial import Trial, TrialResult, factor_to_apply

ROWS = 40
NOISE = np.random.default_rng(0).normal(0.0, 0.5, ROWS)


def losses(lowest: float) -> Callable[[float], Losses]:
    """Return what gives rows' losses with a factor; their mean is a parabola with this lowest point."""
    return lambda factor: 3.0 + NOISE + 0.4 * (factor - lowest) ** 2


@pytest.mark.parametrize("lowest", [0.7, 0.8, 0.95, 1.0, 1.1])
def test_between_factors_a_parabola_tells_the_lowest_point(lowest: float) -> None:
    found = losses(lowest)
    assert best_factor(found(1.0), found) == pytest.approx(lowest)


@pytest.mark.parametrize(("lowest", "last"), [(0.2, LEAST), (2.0, MORE)])
def test_beyond_them_the_last_one_counts(lowest: float, last: float) -> None:
    found = losses(lowest)
    assert best_factor(found(1.0), found) == last


def test_one_that_is_better_on_half_of_the_rows_only_is_chance() -> None:
    better = np.where(np.arange(ROWS) % 2, 0.2, -0.3)
    found = {1.0: 3.0 + NOISE, LESS: 3.0 + NOISE + better, LEAST: 4.0 + NOISE}
    assert found[LESS].mean() < found[1.0].mean()
    assert best_factor(found[1.0], found.__getitem__) == 1.0


def test_equal_losses_ask_for_nothing() -> None:
    assert best_factor(np.full(ROWS, 2.0), lambda _: np.full(ROWS, 2.0)) == 1.0


def test_weights_that_give_no_numbers_have_no_factor() -> None:
    assert best_factor(np.full(ROWS, np.nan), losses(0.8)) is None


def test_a_factor_that_gives_no_numbers_is_not_the_best() -> None:
    found = losses(1.1)
    assert best_factor(found(1.0), lambda factor: found(factor) * (np.nan if factor > 1.0 else 1.0)) == 1.0


def test_the_rate_changes_by_a_bounded_factor() -> None:
    assert rate_change(None) == rate_change(1.0) == 1.0
    assert rate_change(0.7) == pytest.approx(0.343)
    assert rate_change(0.5) == LEAST_CHANGE
    assert rate_change(2.0) == MOST_CHANGE


def test_scoring_takes_little_of_a_trials_time() -> None:
    assert rows_to_score(1000, 0.0, 1.0) == MOST_ROWS
    count = rows_to_score(1000, 0.1, 300.0)
    assert PASSES * count * 0.1 <= TIME_SHARE * 300.0 < PASSES * (count + 1) * 0.1
    assert rows_to_score(1000, 0.1, 10.0) == 0
    assert rows_to_score(LEAST_ROWS - 1, 0.0, 1.0) == 0


@pytest.mark.parametrize(
    ("weights", "factors", "applied"),
    [
        ("weights", (0.7, None), 0.7),
        ("average", (0.7, None), 0.7),
        ("best", (0.7, None), None),  # of an earlier point's weights nothing is known
        ("best", (0.7, 0.8), 0.8),
        ("weights", (1.0, None), None),
        ("weights", (None, None), None),
    ],
)
def test_a_factor_holds_for_the_weights_that_it_was_measured_on(
    weights: str, factors: tuple[float | None, float | None], applied: float | None
) -> None:
    factor, lowest = factors
    trial = Trial(arm="dense")
    result = TrialResult(trial=trial, loss=2.0, tokens=1, train_s=1.0, weights=weights)
    assert factor_to_apply(replace(result, factor=factor, lowest_factor=lowest)) == applied


def test_a_run_at_a_tenth_of_the_rate_is_followed_by_one_at_more(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = first_trial.first_trial

    def too_low(*arguments: Any) -> Trial:
        trial = real(*arguments)
        return replace(trial, rate=trial.rate / 10)

    monkeypatch.setattr(next_trial, "first_trial", too_low)
    job = make_job(profile="auto", ready_by=80.0)
    assert finish(job).status.value == "ready"
    first, second, *_ = record_of(job).done
    assert first.factor is not None
    assert first.factor > 1.1
    assert second.trial.rate == pytest.approx(first.trial.rate * rate_change(first.factor))
    assert any("times its delta" in (line.message or "") for line in progress_of(job))
