"""How far a run went: the factor on all that it changed at which its loss on held-out rows is lowest.

The noise of many steps adds up, and the more so the higher the rate: such a run ends too far from the base
model, and a part of its way back has a lower loss. One at too low a rate should have gone further. So a run
tells whether its rate was right, at the cost of scoring some rows a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from trainer_node.engine.evaluate.candidates import loaded
from trainer_node.engine.model.adapters import Deltas

FACTORS = (0.5, 0.75, 1.0, 1.3)  # that are tried
MOST_ROWS, LEAST_ROWS = 200, 12  # that are scored with each
TIME_SHARE = 0.1  # of a trial's training: scoring with all factors may take it
# A factor of f says that the rate was f ** -3 times the best one. Found on five data sets and two models of
# the arena, at a tenth to ten times the best rate: .47 to .5 at ten times, .65 to .75 at three times, 1.2 to
# 1.3 at a half to a third (docs/experiments.md).
RATE_POWER = 3.0
LEAST_CHANGE, MOST_CHANGE = 1 / 5, 3.0  # of a rate, by one factor

Losses = NDArray[np.floating]


def rows_to_score(count: int, row_s: float, trained_s: float) -> int:
    """Return how many of `count` rows to score with each factor; 0 if there is time for too few.

    `row_s` is what scoring a row takes, and `trained_s` what the training took.
    """
    most = min(count, MOST_ROWS)
    if row_s > 0.0:
        most = min(most, int(TIME_SHARE * trained_s / (len(FACTORS) * row_s)))
    return most if most >= LEAST_ROWS else 0


def best_factor(losses: Mapping[float, Losses]) -> float | None:
    """Return the factor at which the mean loss is lowest, by the losses of the same rows with each.

    Between those that were tried a parabola gives it. It is 1 if another one was lowest, but not on the even
    rows and the odd ones alike: that may be chance. None if there are losses that are no numbers.
    """
    means = {factor: float(rows.mean()) for factor, rows in sorted(losses.items())}
    if not np.isfinite(list(means.values())).all():
        return None
    tried = list(means)
    lowest = min(tried, key=lambda factor: means[factor])
    difference = losses[lowest] - losses[1.0]
    if lowest != 1.0 and not (difference[::2].mean() < 0.0 and difference[1::2].mean() < 0.0):
        return 1.0
    place = tried.index(lowest)
    if place in (0, len(tried) - 1):
        return lowest
    return _vertex(tried[place - 1 : place + 2], [means[factor] for factor in tried[place - 1 : place + 2]])


def rate_change(factor: float | None) -> float:
    """Return the factor on a run's rate that the factor on its delta asks for; 1 if that isn't known."""
    return min(MOST_CHANGE, max(LEAST_CHANGE, (factor or 1.0) ** RATE_POWER))


def losses_by_factor(
    deltas: Deltas, start: Mapping[str, torch.Tensor], score: Callable[[], Losses]
) -> dict[float, Losses]:
    """Collective: score the model with each of FACTORS on its delta; `start` are its untrained weights."""
    found = {}
    for factor in FACTORS:
        with loaded(deltas, partial(_scaled_now, deltas, start, factor)):
            found[factor] = score()
    return found


def scaled(
    weights: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], factor: float
) -> dict[str, torch.Tensor]:
    """Return trained weights, each at `factor` times its distance from the start.

    Of LoRA's two factors only the second one, which starts at zero: the delta is their product.
    """
    return {
        name: value if ".lora_A." in name else torch.lerp(start[name].to(value), value, factor)
        for name, value in weights.items()
    }


def _scaled_now(deltas: Deltas, start: Mapping[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return scaled(deltas.state(), start, factor)


def _vertex(places: Sequence[float], values: Sequence[float]) -> float:
    """Return where the parabola through three points, of which the middle one is lowest, is lowest."""
    (a, b, c), (at_a, at_b, at_c) = places, values
    left, right = (b - a) * (at_b - at_c), (b - c) * (at_b - at_a)
    if left == right:  # all three are equal
        return b
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
