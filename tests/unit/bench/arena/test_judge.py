"""Upstream's three rules, on losses whose winner is known."""

import numpy as np
import pytest

from bench.arena.judge import duel, wilson

ROWS = 400


def noise(seed: int, size: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, size, ROWS)


def test_a_consistent_gain_on_most_rows_wins_all_three_rules() -> None:
    others = 2.0 + noise(0, 0.5)
    judged = duel(others - 0.05 + noise(1, 0.05), others)
    assert judged.group
    assert judged.knockout
    assert judged.boss
    assert judged.margin == pytest.approx(0.05, abs=0.01)


def test_a_gain_inside_the_dead_zone_wins_only_the_group() -> None:
    others = 2.0 + noise(0, 0.5)
    judged = duel(others - 0.005, others)
    assert (judged.group, judged.knockout, judged.boss) == (True, False, False)
    assert judged.rows_won == 0.5  # none is decided


def test_a_few_large_gains_win_the_mean_and_lose_the_rows() -> None:
    others = np.full(ROWS, 2.0)
    mine = others + 0.02
    mine[:20] -= 3.0
    judged = duel(mine, others)
    assert judged.group
    assert not judged.knockout
    assert not judged.boss


def test_more_rows_but_a_worse_mean_is_no_knockout() -> None:
    others = np.full(ROWS, 2.0)
    mine = others - 0.02
    mine[:20] += 3.0
    assert not duel(mine, others).knockout


def test_the_boss_is_beaten_only_beyond_one_per_cent_of_its_loss() -> None:
    others = np.full(ROWS, 4.0)
    assert not duel(others - 0.03, others).boss  # .04 is needed
    assert duel(others - 0.05, others).boss


def test_a_gain_that_may_be_chance_does_not_beat_the_boss() -> None:
    others = np.full(ROWS, 2.0)
    assert not duel(others - 0.03 + noise(2, 0.5), others).boss


def test_equal_submissions_win_nothing() -> None:
    judged = duel(np.full(ROWS, 2.0), np.full(ROWS, 2.0))
    assert (judged.group, judged.knockout, judged.boss) == (False, False, False)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 0, 0.0, 1.0), (10, 10, 0.722, 1.0), (5, 10, 0.237, 0.763), (95, 100, 0.888, 0.978)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=0.001)
