"""The trials next to the best one, in the order in which they are tried: pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from trainer_node.engine.search.trial import Trial, TrialResult

START_EPOCHS = (2.0, 2.5)  # of the first trial, by the time there is; with more time longer ones follow
LEAST_EPOCHS, MOST_EPOCHS = 0.5, 8.0
RATE_STEP = 3.0  # a rate 3 times off costs .01 to .03 nat, 1.5 times off .001 to .003
FINE_STEP = math.sqrt(RATE_STEP)
SAME_RATE = 1.5
BATCH_STEP = 2
BATCH_RATE = math.sqrt(BATCH_STEP)  # for twice the batch the prior has 1.5 times the rate, or 2.1
LEAST_BATCH, MOST_BATCH = 2, 256  # examples
LEAST_RATE, MOST_RATE = 1 / 30, 30.0

Move = Callable[[Trial], Trial]


def neighbours(
    best: Trial, start: Sequence[Trial], lowest: float | None, told: Trial | None = None
) -> Iterator[Trial]:
    """Yield the trials next to the best one: coarse steps, then fine ones.

    If the best one's loss has turned, at `lowest` epochs, a longer run would turn as well: it is first run as
    long as it should have been. If it turned within the first epoch, its rate is too high: no row was seen
    twice. If it `told` the rate that it should have had, all others have that one.
    """
    turned = lowest is not None
    higher, lower = _by(rate=RATE_STEP), _by(rate=1 / RATE_STEP)
    longer, shorter = _by(epochs=2.0), _by(epochs=0.5)
    larger = _by(batch=BATCH_STEP, rate=BATCH_RATE)
    smaller = _by(batch=1 / BATCH_STEP, rate=1 / BATCH_RATE)
    if lowest is not None and lowest < 1.0 and best.rate / RATE_STEP >= LEAST_RATE:
        yield lower(replace(best, epochs=max(best.epochs, START_EPOCHS[0])))
    centre = told or best
    if turned:
        yield centre
        moves = [smaller, lower, higher, shorter, larger]
    else:
        moves = [higher, longer, smaller, lower, shorter, larger]
    if told is not None:
        moves = [move for move in moves if move not in (higher, lower)]
        if is_other_rate(told.rate / best.rate):
            moves = [_by(), *moves]
    for number, move in enumerate(moves):
        if in_range(trial := move(centre)):
            yield trial
        if number == 0:  # no step is as large: LoRA against dense deltas differs by up to .07 nat either way
            yield from (replace(best, arm=arm.arm, rate=arm.rate) for arm in start if arm.arm != best.arm)
    yield from (replace(centre, arm=arm.arm) for arm in start if arm.arm != best.arm)
    fine = [] if told else [_by(rate=FINE_STEP), _by(rate=1 / FINE_STEP)]
    fine.append(_by(epochs=1 / 1.5))
    if not turned:
        fine.append(_by(epochs=1.5))
    for move in fine:
        if in_range(trial := move(centre)):
            yield trial


def refuted(trial: Trial, centre: Trial, done: Sequence[TrialResult]) -> bool:
    """Return whether a short trial has shown that a coarse step of the rate, and nothing else, is wrong.

    It has if its rate is nearer to the trial's than a fine step and another short trial was better.
    """
    short = [result for result in done if result.trial.short and result.loss is not None]
    best = min(short, key=lambda result: result.loss or 0.0, default=None)
    same = key(replace(trial, rate=centre.rate)) == key(centre)
    if best is None or not same or not _differs(trial, centre, RATE_STEP):
        return False
    near = [one for one in short if not _differs(one.trial, trial, FINE_STEP)]
    return any(
        one is not best and (one.trial.arm, one.trial.batch) == (trial.arm, trial.batch) for one in near
    )


def is_other_rate(change: float, least: float = SAME_RATE) -> bool:
    """Return whether a factor on a rate is worth a trial: up to SAME_RATE it changes .003 nat at most."""
    return abs(math.log(change)) > math.log(least)


def is_like(trial: Trial, other: Trial) -> bool:
    """Return whether two trials train the same arm, in as large steps, at about the same rate."""
    same = (trial.arm, trial.batch) == (other.arm, other.batch)
    return same and not is_other_rate(trial.rate / other.rate)


def _differs(trial: Trial, other: Trial, step: float) -> bool:
    """Return whether two rates are a step or more apart."""
    return abs(math.log(trial.rate / other.rate)) > math.log(step) - 1e-6


def _by(*, rate: float = 1.0, epochs: float = 1.0, batch: float = 1.0) -> Move:
    """Return a step in the space of trials, by factors."""
    return lambda trial: replace(
        trial, rate=trial.rate * rate, epochs=trial.epochs * epochs, batch=int(trial.batch * batch)
    )


def in_range(trial: Trial) -> bool:
    """Return whether a trial is one that the search may come to."""
    return (
        LEAST_RATE <= trial.rate <= MOST_RATE
        and LEAST_EPOCHS <= trial.epochs <= MOST_EPOCHS
        and LEAST_BATCH <= trial.batch <= MOST_BATCH
    )


def key(trial: Trial) -> tuple[str, float, float, int]:
    """Return what tells two trials on the same rows apart."""
    return (trial.arm, round(math.log(trial.rate), 3), round(trial.epochs, 3), trial.batch)
