"""Probes, shorter than half an epoch, which compare rates before one long run takes the rest of the time."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS, RATE_STEP, in_range, key
from trainer_node.engine.search.strategy.rates import HORIZON, rate_after, rates_to_try
from trainer_node.engine.search.strategy.run_length import epochs_in, main_run
from trainer_node.engine.search.trial import Trial, TrialResult

PROBE_SHARE = 0.12  # of the time, for all of them together
PROBE_TRIALS = 4
PROBE_STEPS = 40  # a trial of fewer steps ranks rates by chance


def probe_of(trial: Trial, budget: Budget) -> Trial | None:
    """Return a trial of one part of PROBE_SHARE; None if that has too few steps to tell anything."""
    epochs = min(epochs_in(trial, budget, PROBE_SHARE * budget.all_s / PROBE_TRIALS), 0.99 * LEAST_EPOCHS)
    probe = replace(trial, epochs=epochs)
    return probe if epochs > 0 and budget.steps(probe) >= PROBE_STEPS else None


def probe_or_main(done: Sequence[TrialResult], budget: Budget) -> Trial:
    """Return the next probe, or the long run that they lead to."""
    best, first = best_of(done), done[0].trial
    tried = {key(result.trial) for result in done}
    centre = best.trial if best else replace(first, rate=first.rate / RATE_STEP)
    spent = budget.all_s - budget.left_s
    if spent + budget.cost_s(first) <= PROBE_SHARE * budget.all_s:
        for rate in rates_to_try(centre, best, done, (1.0, RATE_STEP, 1.0 / RATE_STEP)):
            trial = replace(centre, rate=rate)
            if in_range(replace(trial, epochs=1.0)) and key(trial) not in tried:
                return trial
    chosen = main_run(centre, budget)
    factor = min(1.0, (chosen.epochs / first.epochs) ** -HORIZON)
    return replace(chosen, rate=rate_after(centre, best, done) * max(factor, 1 / RATE_STEP))
