"""When the development curve is measured, and when it has turned."""

import math

import msgspec
import pytest

from shared.planning.recipe import CurveRule
from trainer_node.engine.train.dev_curve import DevCurve, Point, cooldown_tokens


def measured(*losses: float, rows: int = 50, spread: float = 0.0) -> DevCurve:
    """A curve with a point every 100 tokens; `spread` moves half of the rows up and half of them down."""
    curve = DevCurve()
    for number, loss in enumerate(losses, 1):
        noise = [spread * (-1) ** (row + number) for row in range(rows)]
        curve = curve.extended(10 * number, 100 * number, [loss + part for part in noise], 1.0)
    return curve


def test_the_lowest_point_is_remembered_with_its_rows() -> None:
    curve = DevCurve()
    assert curve.best is None
    curve = curve.extended(10, 100, [2.0, 4.0], 1.5)
    assert curve.is_at_best
    curve = curve.extended(20, 200, [1.0, 3.0], 1.5)
    assert curve.is_at_best
    curve = curve.extended(30, 300, [1.5, 3.5], 1.5)
    assert not curve.is_at_best
    assert curve.best == Point(20, 200, 2.0)
    assert curve.best_losses == [1.0, 3.0]
    assert curve.spent_s == 4.5


def test_of_equal_points_the_earliest_is_the_best() -> None:
    assert measured(2.0, 2.0).best == Point(10, 100, 2.0)


@pytest.mark.parametrize(
    ("losses", "turned"),
    [
        ((), False),
        ((3.0, 2.0, 1.0), False),
        ((2.0, 2.5), False),  # one rise may be chance
        ((2.0, 2.5, 2.4), True),  # below the one before, but above the lowest
        ((2.0, 2.5, 1.9), False),
        ((2.0, 2.5, math.nan), True),
        ((math.nan, math.nan, math.nan), False),  # nothing to go back to
    ],
)
def test_two_points_above_the_lowest_are_a_turn(losses: tuple[float, ...], turned: bool) -> None:
    assert measured(*losses).turned() is turned


def test_a_rise_within_the_noise_is_no_turn() -> None:
    # Rows differ by 2 x .5 between two points: the mean's standard error is .14 on 50 rows.
    assert not measured(2.0, 2.1, 2.2, 2.1, spread=0.5).turned()
    assert measured(2.0, 2.1, 2.2, 2.9, spread=0.5).turned()


def test_points_are_due_every_quarter_epoch_after_the_first_half() -> None:
    curve = DevCurve()
    assert not curve.due(499, 1000, 4000)
    assert curve.due(500, 1000, 4000)
    curve = curve.extended(5, 510, [1.0], 0.0)
    assert not curve.due(759, 1000, 4000)
    assert curve.due(760, 1000, 4000)


def test_a_long_run_has_a_limited_number_of_points() -> None:
    curve, tokens, points = DevCurve(), 0, 0
    while tokens < 100_000:
        tokens += 100
        if curve.due(tokens, 1000, 100_000):
            curve = curve.extended(points, tokens, [1.0], 0.0)
            points += 1
    assert points <= CurveRule().most_points


def test_measuring_keeps_within_its_share_of_the_time() -> None:
    curve = measured(2.0)  # it took 1 s
    assert curve.affordable(1.0, 40.0)
    assert not curve.affordable(1.1, 40.0)


def test_the_cool_down_takes_half_as_long_as_the_way_to_the_lowest_point() -> None:
    assert cooldown_tokens(Point(10, 1000, 2.0)) == 500
    assert cooldown_tokens(Point(1, 1, 2.0)) == 1


def test_a_point_that_is_no_number_survives_a_checkpoint() -> None:
    curve = measured(2.0, math.nan)
    assert [point.loss for point in curve.points] == [2.0, None]
    assert msgspec.json.decode(msgspec.json.encode(curve), type=DevCurve) == curve


THREE = CurveRule(rises=3, rise=0.05, errors=0.0)


@pytest.mark.parametrize(
    ("losses", "turned"),
    [
        ((2.0, 2.2, 2.2), False),  # only two
        ((2.0, 2.2, 2.2, 2.2), True),
        ((2.0, 2.2, 2.05, 2.2), False),  # one within 5%
        ((2.0, 2.05, 2.2, 2.2, 2.2), True),  # the three newest count
        ((2.0, 2.2, 2.2, 1.9), False),
        ((2.0, math.nan, math.nan, math.nan), True),
    ],
)
def test_a_rule_may_want_three_points_far_above_the_lowest(losses: tuple[float, ...], turned: bool) -> None:
    assert measured(*losses).turned(THREE) is turned


def test_the_lowest_points_come_in_order_of_their_loss() -> None:
    assert [point.loss for point in measured(3.0, 1.0, math.nan, 2.0).lowest(2)] == [1.0, 2.0]


def test_a_rule_decides_when_points_are_due_and_what_they_may_cost() -> None:
    rule = CurveRule(first_epochs=0.75, every_epochs=0.125, most_points=1000, share=0.1)
    curve = DevCurve()
    assert [curve.due(tokens, 1000, 4000, rule) for tokens in (749, 750)] == [False, True]
    curve = curve.extended(5, 750, [1.0], 6.0)
    assert [curve.due(tokens, 1000, 4000, rule) for tokens in (874, 875)] == [False, True]
    assert [curve.affordable(4.0, trained_s, rule) for trained_s in (99.0, 101.0)] == [False, True]
