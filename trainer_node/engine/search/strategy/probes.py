"""Probes, shorter than half an epoch, which compare rates before one long run takes the rest of the time."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.neighbours import (
    LEAST_EPOCHS,
    LEAST_RATE,
    MOST_RATE,
    RATE_STEP,
    in_range,
    key,
)
from trainer_node.engine.search.strategy.prior import rate_factor
from trainer_node.engine.search.strategy.rates import by_length, rate_after, rates_to_try
from trainer_node.engine.search.strategy.run_length import epochs_in, main_run
from trainer_node.engine.search.trial import Trial, TrialResult

PROBE_SHARE = 0.12  # of the time, for all of them together
PROBE_TRIALS = 4
# A factor below 1 of one probe alone counts only below TRUSTED. On emoji two such probes asked for .5 and .75
# of their rate, and the long runs after them for twice theirs. Three others asked for more, and the long runs
# found that right within 20% (docs/experiments.md).
TRUSTED = 0.75
# Of real models: a probe of .36 epochs of SmolLM2-135M asked for 2.2 times its rate, as a run that short can
# always go further. The long run ended .069 higher than at the prior's rate (docs/experiments.md).
MOST_ABOVE_PROBE = 1.5
SLACK = 1e-6  # for rounding: four parts of a share may add up to a little more
PROBE_STEPS = 40  # a trial of fewer steps ranks rates by chance


def probe_of(trial: Trial, budget: Budget) -> Trial | None:
    """Return a trial of one part of PROBE_SHARE; None if that has too few steps to tell anything.

    Its rate is so much higher than the prior's that the long run begins at that. The rate of pairs is not
    raised.
    """
    epochs = epochs_in(trial, budget, PROBE_SHARE * budget.all_s / PROBE_TRIALS)
    probe = replace(trial, epochs=min(epochs, 0.99 * LEAST_EPOCHS))
    if epochs <= 0 or budget.steps(probe) < PROBE_STEPS:
        return None
    whole = main_run(trial, replace(budget, left_s=budget.left_s - budget.cost_s(probe)))
    raised = 1.0 if budget.pairs else 1.0 / _lowered(whole, probe)
    return replace(probe, rate=min(MOST_RATE, raised * rate_factor(whole, budget) * trial.rate))


def probe_or_main(done: Sequence[TrialResult], budget: Budget) -> Trial:
    """Return the next probe, or the long run that they lead to."""
    best, first = best_of(done), done[0].trial
    tried = {key(result.trial) for result in done}
    lowest = min(result.trial.rate for result in done)
    centre = best.trial if best else replace(first, rate=lowest / RATE_STEP)
    spent = budget.all_s - budget.left_s
    if spent + budget.cost_s(first) <= (1.0 + SLACK) * PROBE_SHARE * budget.all_s:
        for rate in rates_to_try(centre, best, done, (1.0, 1.0 / RATE_STEP, RATE_STEP)):
            trial = replace(centre, rate=rate)
            if in_range(replace(trial, epochs=1.0)) and key(trial) not in tried:
                return trial
    chosen = main_run(centre, budget)
    rate = rate_after(centre, best, done)
    if len(done) == 1 and best and (best.factor or 1.0) >= TRUSTED:
        rate = max(rate, first.rate)
    if not budget.tiny:
        rate = min(rate, MOST_ABOVE_PROBE * first.rate)
    return replace(chosen, rate=max(LEAST_RATE, rate * _lowered(chosen, first)))


def _lowered(run: Trial, probe: Trial) -> float:
    """Return what a longer run's rate is multiplied by, relative to its probe's: 1/3 to 1."""
    return max(1.0 / RATE_STEP, min(1.0, by_length(run.epochs, probe.epochs)))
