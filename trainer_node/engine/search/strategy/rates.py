"""The rate to go on with: what the best trial's delta asks for, or a parabola through the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.best_trial import is_probe, settled
from trainer_node.engine.search.strategy.delta_factor import rate_change
from trainer_node.engine.search.strategy.neighbours import (
    LEAST_RATE,
    MOST_RATE,
    RATE_STEP,
    is_like,
    is_other_rate,
)
from trainer_node.engine.search.trial import Trial, TrialResult

HORIZON = 0.2  # the best rate falls with the length of a run to this power


def by_length(epochs: float, known: float) -> float:
    """Return the best rate of a run of `epochs`, relative to that of one of `known` epochs."""
    return float((epochs / known) ** -HORIZON)


def at_best_rate(result: TrialResult, done: Sequence[TrialResult]) -> Trial:
    """Return the settled trial at the rate that its delta's best factor asks for.

    Not if that is about a rate which was tried: then it is known to be worse.
    """
    trial = settled(result)
    rate = trial.rate * rate_change(result.factor)
    aimed = replace(trial, rate=min(MOST_RATE, max(LEAST_RATE, rate)))
    tried = (one.trial for one in done if one is not result and _is_as_long(one.trial, result.trial))
    return trial if any(is_like(one, aimed) for one in tried) else aimed


def _is_as_long(trial: Trial, other: Trial) -> bool:
    """Return whether both are probes, both short trials, or both runs of full length."""
    return trial.short == other.short and is_probe(trial) == is_probe(other)


def is_undecided(result: TrialResult) -> bool:
    """Return whether the rows didn't agree on a trial's best factor: its rate may be far off."""
    return result.factor == 1.0


def rates_to_try(
    centre: Trial, best: TrialResult | None, done: Sequence[TrialResult], steps: Sequence[float]
) -> list[float]:
    """Return the rates that shorter trials should try next: none if the best one's delta asks for no other.

    Where that isn't known, these are `steps` from the centre's.
    """
    if best is None or best.factor is None:
        return [centre.rate * step for step in steps]
    rate = at_best_rate(best, done).rate
    return [rate] if is_other_rate(rate / centre.rate) else []


def rate_after(centre: Trial, best: TrialResult | None, done: Sequence[TrialResult]) -> float:
    """Return the rate to go on with after shorter trials: what the best one's delta asks for.

    Where that isn't known, it is the lowest point of a parabola through the losses.
    """
    return _between(centre, done) if best is None or best.factor is None else at_best_rate(best, done).rate


def _between(centre: Trial, done: Sequence[TrialResult]) -> float:
    """Return the lowest point of a parabola in log rate, through the centre and its neighbours."""
    measured = [result for result in done if result.loss is not None]
    losses = {round(math.log(r.trial.rate / centre.rate, RATE_STEP)): r.loss for r in measured}
    low, middle, high = losses.get(-1), losses.get(0), losses.get(1)
    if low is None or middle is None or high is None:
        return centre.rate
    bend = low - 2 * middle + high
    shift = 0.5 * (low - high) / bend if bend > 0 else 0.0
    return centre.rate * RATE_STEP ** min(0.5, max(-0.5, shift))
