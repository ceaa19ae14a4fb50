"""Which training run to try next, from those that were tried: pure, so that a resumed job decides alike.

A trial is a whole training run whose rate falls to zero within it, scored on the development rows. There are
two regimes. If the time is enough for several runs of full length, each trial is one: the best of them is
submitted, and the search walks from it to its neighbours, coarse steps first. Otherwise short trials compare
rates, and one long run takes the time that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.search.trial import Trial, TrialResult

START_EPOCHS = 2.0  # winners end between 2 and 4; on 500 rows 2 epochs beat 4 by .84 nat
LEAST_EPOCHS, MOST_EPOCHS = 0.5, 8.0
FULL_TRIALS = 2.5  # so many runs of START_EPOCHS must fit before trials are run at full length
RATE_STEP = 3.0  # a rate 3 times off costs .01 to .03 nat, 1.5 times off .001 to .003
FINE_STEP = math.sqrt(RATE_STEP)
BATCH_STEP = 2
LEAST_BATCH, MOST_BATCH = 4, 256  # examples
LEAST_RATE, MOST_RATE = 1 / 30, 30.0
PROBE_SHARE = 0.12  # of the time, for all short trials together
PROBE_TRIALS = 4
PROBE_STEPS = 40  # a trial of fewer steps ranks rates by chance
HORIZON = 0.2  # the best rate falls with the length of a run to this power
SAFETY = 1.15  # a trial may take this much longer than those before it
SEEDS = 3  # other data orders of the best trial, for averaging


Move = Callable[[Trial], Trial]


class Budget(Struct, frozen=True, kw_only=True):
    """What the next trial may cost."""

    left_s: float  # until training must be over
    tokens_per_s: float
    epoch_tokens: int
    examples: int
    trial_s: float  # what a trial costs besides its steps: resetting, scoring
    all_s: float  # `left_s` before the first trial
    least_batch: float = 1.0  # examples that the smallest pack holds, one on every device

    def cost_s(self, trial: Trial) -> float:
        """Seconds that a trial takes."""
        return self.trial_s + trial.epochs * self.epoch_tokens / self.tokens_per_s

    def fits(self, trial: Trial) -> bool:
        """Whether a trial would be over in time."""
        return SAFETY * self.cost_s(trial) <= self.left_s

    def steps(self, trial: Trial) -> float:
        """Optimiser steps of a trial."""
        return trial.epochs * self.examples / trial.batch


def next_trial(start: Sequence[Trial], done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """The next trial, or None if no further one is worth its time.

    `start` has the arms' first trials, the most promising one first. The first trial is always given.
    """
    if any(result.trial.main for result in done):
        return None
    first = done[0].trial if done else first_trial(start, budget)
    if not done:
        return first
    if first.epochs < LEAST_EPOCHS:
        return _probe_or_main(start, done, budget)
    best = best_of(done)
    tried = {_key(result.trial) for result in done}
    for trial in _neighbours(best.trial if best else first, start, turned=bool(best and best.turned)):
        # Below the smallest pack a smaller batch would be the same one.
        if _key(trial) not in tried and budget.fits(trial) and 2 * trial.batch > budget.least_batch:
            return trial
    return None


def arm_name(plan: Plan) -> str:
    """What a plan trains, in two or three words."""
    ranks = sorted({module.rank for module in plan.modules if module.method == "lora"})
    dense = any(module.method == "dense" for module in plan.modules)
    return " and ".join(["dense"] * dense + [f"LoRA r{rank}" for rank in ranks[-1:]])


def trial_of(arm: str, plan: Plan, mean_length: float) -> Trial:
    """An arm's first trial: the plan's rates, and its batch as a power of two; `mean_length` in tokens."""
    batch = plan.packs_per_step * plan.capacity / mean_length
    return Trial(arm=arm, batch=max(LEAST_BATCH, 2 ** round(math.log2(max(1.0, batch)))))


def first_trial(start: Sequence[Trial], budget: Budget) -> Trial:
    """A run of full length if several fit; else a short one, or the only one if there is no time to probe."""
    full = replace(start[0], epochs=START_EPOCHS)
    if FULL_TRIALS * budget.cost_s(full) <= budget.left_s:
        return full
    probe = _probe(start[0], budget)
    return probe or _main(start[0], budget)


def best_of(done: Sequence[TrialResult]) -> TrialResult | None:
    """The trial with the lowest loss; the earliest of equals."""
    measured = [result for result in done if result.loss is not None]
    return min(measured, key=lambda result: result.loss or 0.0, default=None)


# --- full length


def _neighbours(best: Trial, start: Sequence[Trial], *, turned: bool) -> Iterator[Trial]:
    """The trials next to the best one: coarse steps, then fine ones, then other orders of the rows.

    If the best one's loss has turned, a longer run would turn as well, and a shorter one is tried first.
    """
    higher, lower = _by(rate=RATE_STEP), _by(rate=1 / RATE_STEP)
    longer, shorter = _by(epochs=2.0), _by(epochs=0.5)
    larger, smaller = _by(batch=BATCH_STEP), _by(batch=1 / BATCH_STEP)
    if turned:
        moves = [shorter, smaller, lower, higher, larger]
    else:
        moves = [higher, longer, smaller, lower, shorter, larger]
    for move in moves:
        if _in_range(trial := move(best)):
            yield trial
    yield from (replace(best, arm=arm.arm, rate=arm.rate) for arm in start[1:] if arm.arm != best.arm)
    fine = [_by(rate=FINE_STEP), _by(rate=1 / FINE_STEP), _by(epochs=1 / 1.5)]
    if not turned:
        fine.append(_by(epochs=1.5))
    for move in fine:
        if _in_range(trial := move(best)):
            yield trial
    yield from (replace(best, seed=seed) for seed in range(1, SEEDS + 1))


def _by(*, rate: float = 1.0, epochs: float = 1.0, batch: float = 1.0) -> Move:
    """A step in the space of trials, by factors."""
    return lambda trial: replace(
        trial, rate=trial.rate * rate, epochs=trial.epochs * epochs, batch=int(trial.batch * batch)
    )


def _in_range(trial: Trial) -> bool:
    return (
        LEAST_RATE <= trial.rate <= MOST_RATE
        and LEAST_EPOCHS <= trial.epochs <= MOST_EPOCHS
        and LEAST_BATCH <= trial.batch <= MOST_BATCH
    )


def _key(trial: Trial) -> tuple[str, float, float, int, int]:
    return (trial.arm, round(math.log(trial.rate), 3), round(trial.epochs, 3), trial.batch, trial.seed)


# --- short trials, then one long run


def _probe(trial: Trial, budget: Budget) -> Trial | None:
    """A trial of one part of PROBE_SHARE; None if that has too few steps to tell anything."""
    seconds = PROBE_SHARE * budget.all_s / PROBE_TRIALS - budget.trial_s
    epochs = min(seconds * budget.tokens_per_s / budget.epoch_tokens, 0.99 * LEAST_EPOCHS)
    probe = replace(trial, epochs=epochs)
    return probe if epochs > 0 and budget.steps(probe) >= PROBE_STEPS else None


def _main(trial: Trial, budget: Budget) -> Trial:
    """The run that takes the rest of the time."""
    epochs = (budget.left_s - budget.trial_s) * budget.tokens_per_s / budget.epoch_tokens
    return replace(trial, epochs=min(MOST_EPOCHS, max(LEAST_EPOCHS, epochs)), main=True)


def _probe_or_main(start: Sequence[Trial], done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    best, first = best_of(done), done[0].trial
    tried = {_key(result.trial) for result in done}
    centre = best.trial if best else replace(first, rate=first.rate / RATE_STEP)
    spent = budget.all_s - budget.left_s
    if spent + budget.cost_s(first) <= PROBE_SHARE * budget.all_s:
        for trial in (
            replace(centre, rate=centre.rate * RATE_STEP),
            replace(centre, rate=centre.rate / RATE_STEP),
        ):
            if _in_range(replace(trial, epochs=1.0)) and _key(trial) not in tried:
                return trial
    chosen = _main(centre, budget)
    factor = (chosen.epochs / first.epochs) ** -HORIZON
    return replace(chosen, rate=max(centre.rate / RATE_STEP, _between(centre, done) * factor))


def _between(best: Trial, done: Sequence[TrialResult]) -> float:
    """The rate at the lowest point of a parabola in log rate, through the best trial and its neighbours."""
    measured = [result for result in done if result.loss is not None]
    losses = {round(math.log(r.trial.rate / best.rate, RATE_STEP)): r.loss for r in measured}
    low, middle, high = losses.get(-1), losses.get(0), losses.get(1)
    if low is None or middle is None or high is None:
        return best.rate
    bend = low - 2 * middle + high
    shift = 0.5 * (low - high) / bend if bend > 0 else 0.0
    return best.rate * RATE_STEP ** min(0.5, max(-0.5, shift))
