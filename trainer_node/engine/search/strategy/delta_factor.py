"""How far a run should have gone: the factor on all that it changed at which its held-out loss is lowest.

The noise of many steps adds up, and the more so the higher the rate: such a run ends too far from the base
model, and a part of its way back has a lower loss. One at too low a rate should have gone further. So a run
tells whether its rate was right, at the cost of scoring some rows twice more. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LESS, LEAST, MORE = (
    0.75,
    0.5,
    1.3,
)  # what is tried besides 1: LESS, then LEAST if that is better, or else MORE
PASSES = 2  # over the rows
MOST_ROWS, LEAST_ROWS = 200, 12  # that are scored with each
TIME_SHARE = 0.1  # of a trial's training: scoring may take it
# A factor of f says that the rate was f ** -3 times the best one. Found on three data sets and two models of
# the arena: .47 to .5 at ten times the best rate, .65 to .75 at three times, 1.2 to 1.3 at a half to a third.
# SmolLM2-135M on one of them: about .8 at three times, 1.25 at a third (docs/experiments.md).
RATE_POWER = 3.0
LEAST_CHANGE, MOST_CHANGE = 1 / 5, 3.0  # of a rate, by one factor

Losses = NDArray[np.floating]


def rows_to_score(count: int, row_s: float, trained_s: float) -> int:
    """Return how many of `count` rows to score with each factor; 0 if there is time for too few.

    `row_s` is what scoring a row takes, and `trained_s` what the training took.
    """
    most = min(count, MOST_ROWS)
    if row_s > 0.0:
        most = min(most, int(TIME_SHARE * trained_s / (PASSES * row_s)))
    return most if most >= LEAST_ROWS else 0


def best_factor(at_one: Losses, score_at: Callable[[float], Losses | None]) -> float | None:
    """Return the factor at which the mean loss is lowest, by the losses of the same rows with each.

    `at_one` are those of the weights as they are; `score_at` gives them with another factor, or None without
    time for it. Between those that are tried a parabola gives the best one. It is 1 if another one was
    lowest, but not on the even rows and the odd ones alike: that may be chance. None if that is unknown.
    """
    if not math.isfinite(_mean(at_one)) or (less := score_at(LESS)) is None:
        return None
    further = LEAST if _mean(less) < _mean(at_one) else MORE
    if (at_further := score_at(further)) is None:
        return None
    losses = {1.0: at_one, LESS: less, further: at_further}
    tried = sorted(losses)
    means = [_mean(losses[factor]) for factor in tried]
    place = means.index(min(means))
    difference = losses[tried[place]] - at_one
    if tried[place] != 1.0 and not (difference[::2].mean() < 0.0 and difference[1::2].mean() < 0.0):
        return 1.0
    if place != 1:
        return tried[place]
    return _vertex(tried, means)


def rate_change(factor: float | None) -> float:
    """Return the factor on a run's rate that the factor on its delta asks for; 1 if that isn't known."""
    return min(MOST_CHANGE, max(LEAST_CHANGE, (factor or 1.0) ** RATE_POWER))


def _mean(losses: Losses) -> float:
    """Return the mean; infinite if it is no number."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf


def _vertex(places: list[float], values: list[float]) -> float:
    """Return where the parabola through three points, of which the middle one is lowest, is lowest."""
    (a, b, c), (at_a, at_b, at_c) = places, values
    if not math.isfinite(at_a + at_c):
        return b
    left, right = (b - a) * (at_b - at_c), (b - c) * (at_b - at_a)
    if left == right:  # all three are equal
        return b
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
