"""The best trial so far, and how it would be run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS
from trainer_node.engine.search.trial import Trial, TrialResult

# Of its loss: so much more than dense runs' the mean of a real model's LoRA runs gains over one of them, if
# these have AVERAGED_EPOCHS. SmolLM2-135M's gain 1.2 to 2.7%, dense ones .5%. Shorter ones gain less
# (docs/experiments.md).
AVERAGE_GAIN, AVERAGED_EPOCHS = 0.01, 2.0
AFTER_LOWEST = 1.25  # a run this much longer than to the lowest point of the one before ends at its own


def best_of(done: Sequence[TrialResult]) -> TrialResult | None:
    """Return the trial with the lowest loss, the earliest of equals. A refit's loss is no held-out one."""
    measured = [result for result in done if result.loss is not None and not result.trial.refit]
    return min(measured, key=lambda result: result.loss or 0.0, default=None)


def most_promising(done: Sequence[TrialResult], gains: Callable[[Trial], bool]) -> TrialResult | None:
    """Return the trial to go on from: the one that runs on all rows repeat, or the one they should repeat.

    Trials of which `gains` is true count as lower than they are, by what the mean of runs like them gains.
    """
    if (repeated := repeated_of(done)) is not None:
        return repeated

    def promise(result: TrialResult) -> float:
        trial = settled(result)
        share = min(1.0, trial.epochs / AVERAGED_EPOCHS) if gains(trial) else 0.0
        return (result.loss or 0.0) * (1.0 - AVERAGE_GAIN * share)

    measured = [result for result in done if result.loss is not None and not result.trial.refit]
    return min(measured, key=promise, default=None)


def repeated_of(done: Sequence[TrialResult]) -> TrialResult | None:
    """Return the trial that runs on all rows repeat, if there are any."""
    numbers = (result.trial.of for result in done)
    return next((done[number] for number in numbers if number is not None), None)


def is_long(trial: Trial) -> bool:
    """Return whether a trial is one that could be submitted, not a shorter one that compares rates."""
    return not trial.short and (trial.main or trial.epochs >= LEAST_EPOCHS)


def is_probe(trial: Trial) -> bool:
    """Return whether a trial is a probe, which compares rates before one long run."""
    return not trial.short and not is_long(trial)


def settled(result: TrialResult) -> Trial:
    """Return one that ends where this trial's loss was lowest, and some more for the rate to fall to zero."""
    trial = replace(result.trial, main=False, short=False, leaves_s=0.0)
    if result.lowest_epochs is None:
        return trial
    return replace(trial, epochs=max(LEAST_EPOCHS, min(trial.epochs, AFTER_LOWEST * result.lowest_epochs)))
