"""When a step counts as bad, when a run goes back, and when it gives up."""

from __future__ import annotations

import math

import msgspec
import pytest

from trainer_node.engine.train.health import IN_A_ROW, MOST_RETURNS, SETTLED, Health


def settled(losses: list[float]) -> Health:
    """A healthy run's health after these losses, again and again until its mean counts."""
    health = Health()
    for turn in range(2 * SETTLED):
        health = health.after(losses[turn % len(losses)], 1.0)
    return health


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)]
)
def test_a_step_without_numbers_is_skipped_and_counted(loss: float, norm: float) -> None:
    health = settled([2.0]).after(loss, norm)
    assert (health.skipped, health.in_a_row) == (1, 1)
    assert health.mean == pytest.approx(2.0)
    good = health.after(2.0, 1.0)
    assert (good.skipped, good.in_a_row, good.must_return) == (1, 0, False)


@pytest.mark.parametrize(
    ("losses", "far", "usual"),
    [
        ([2.0, 2.2], 3.3, 2.9),  # a nat
        ([3.6, 3.8], 5.7, 5.4),  # half of it
        ([0.01, 0.03], 1.1, 0.9),
        ([1.0, 3.0], 8.5, 7.5),  # rows that vary: six deviations
    ],
)
def test_a_loss_far_above_its_mean_counts_as_bad(losses: list[float], far: float, usual: float) -> None:
    health = settled(losses)
    assert health.after(far, 1.0).in_a_row == 1
    assert health.after(usual, 1.0).in_a_row == 0
    assert health.after(far, 1.0).skipped == 0
    assert health.after(far, 1.0).mean == health.mean


def test_a_mean_of_few_losses_condemns_none() -> None:
    health = Health().after(2.0, 1.0)
    assert health.after(9.0, 1.0).in_a_row == 0


def test_several_bad_steps_in_a_row_send_the_run_back_at_half_the_rate() -> None:
    then = settled([2.0])
    health = then.after(1.5, 1.0)
    for turn in range(IN_A_ROW):
        assert not health.must_return, turn
        health = health.after(math.nan if turn % 2 else 9.0, 1.0)
    assert health.must_return
    back = health.returned(then)
    assert (back.mean, back.skipped, back.in_a_row, back.returns) == (then.mean, 1, 0, 1)
    assert not back.must_return
    assert back.rate_share == 0.5


def test_a_run_that_goes_wrong_after_each_return_ends() -> None:
    health = Health()
    for number in range(MOST_RETURNS + 1):
        assert not health.is_hopeless, number
        for _ in range(IN_A_ROW):
            health = health.after(math.nan, math.nan)
        assert health.must_return
        health = health.returned(Health())
    assert health.is_hopeless
    assert not health.must_return
    assert health.skipped == IN_A_ROW * (MOST_RETURNS + 1)


def test_it_is_the_same_after_a_restart() -> None:
    health = settled([1.9, 2.0 / 3.0, 2.3]).after(math.nan, 1.0)
    assert msgspec.json.decode(msgspec.json.encode(health), type=Health) == health
