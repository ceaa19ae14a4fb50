"""The best trial so far: which one it is, how it would be run again, and the rate that it asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.delta_factor import rate_change
from trainer_node.engine.search.strategy.neighbours import (
    LEAST_EPOCHS,
    LEAST_RATE,
    MOST_RATE,
    RATE_STEP,
    is_other_rate,
)
from trainer_node.engine.search.trial import Trial, TrialResult

AFTER_LOWEST = 1.25  # a run this much longer than to the lowest point of the one before ends at its own


def best_of(done: Sequence[TrialResult]) -> TrialResult | None:
    """Return the trial with the lowest loss, the earliest of equals. A refit's loss is no held-out one."""
    measured = [result for result in done if result.loss is not None and not result.trial.refit]
    return min(measured, key=lambda result: result.loss or 0.0, default=None)


def is_long(trial: Trial) -> bool:
    """Return whether a trial is one that could be submitted, not a shorter one that compares rates."""
    return not trial.short and (trial.main or trial.epochs >= LEAST_EPOCHS)


def settled(result: TrialResult) -> Trial:
    """Return one that ends where this trial's loss was lowest, and some more for the rate to fall to zero."""
    trial = replace(result.trial, main=False, short=False, leaves_s=0.0)
    if result.lowest_epochs is None:
        return trial
    return replace(trial, epochs=max(LEAST_EPOCHS, min(trial.epochs, AFTER_LOWEST * result.lowest_epochs)))


def at_best_rate(result: TrialResult, done: Sequence[TrialResult]) -> Trial:
    """Return the settled trial at the rate that its delta's best factor asks for.

    Not if that is about a rate which was tried: then it is known to be worse.
    """
    trial = settled(result)
    rate = trial.rate * rate_change(result.factor)
    aimed = replace(trial, rate=min(MOST_RATE, max(LEAST_RATE, rate)))
    tried = (one.trial for one in done if one is not result and one.trial.short == result.trial.short)
    return trial if any(is_like(one, aimed) for one in tried) else aimed


def is_like(trial: Trial, other: Trial) -> bool:
    """Return whether two trials train the same arm, in as large steps, at about the same rate."""
    same = (trial.arm, trial.batch) == (other.arm, other.batch)
    return same and not is_other_rate(trial.rate / other.rate)


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


def _between(best: Trial, done: Sequence[TrialResult]) -> float:
    """Return the lowest point of a parabola in log rate, through the best trial and its neighbours."""
    measured = [result for result in done if result.loss is not None]
    losses = {round(math.log(r.trial.rate / best.rate, RATE_STEP)): r.loss for r in measured}
    low, middle, high = losses.get(-1), losses.get(0), losses.get(1)
    if low is None or middle is None or high is None:
        return best.rate
    bend = low - 2 * middle + high
    shift = 0.5 * (low - high) / bend if bend > 0 else 0.0
    return best.rate * RATE_STEP ** min(0.5, max(-0.5, shift))
