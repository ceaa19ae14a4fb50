"""The best trial again, on all rows: how often, at which rate, and how long."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.budget import SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import MOST_RATE
from trainer_node.engine.search.strategy.rates import at_best_rate, is_undecided
from trainer_node.engine.search.strategy.run_length import epochs_in
from trainer_node.engine.search.trial import Trial, TrialResult

MOST_REFITS = 6  # if nothing is left to try: the first gains .01 to .02, two more .01, all others less
# Of runs of LoRA, as a multiple of the rate that is best for one, by how many are averaged. Three end up to
# .06 lower with it (docs/experiments.md). Dense runs want the rate of one.
LORA_RATES = (1.0, 1.0, 2.0, 3.0)
MOST_RAISED = 4.0  # times a rate that was run: a higher one may diverge
LEAST_REFIT = 0.5  # of its epochs: so much shorter may the first of them be


def first_refit(best: TrialResult, done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the best trial on all rows, at the rate of all such runs: what is best for their average."""
    trial = at_best_rate(best, done)
    averages_well = trial.arm in budget.lora and budget.many_held_out
    if not averages_well or best.factor is None or is_undecided(best):
        return refit_of(trial, 0, budget)
    runs = min(budget.runs_left(replace(trial, refit=True), MOST_REFITS), len(LORA_RATES) - 1)
    rate = min(MOST_RATE, MOST_RAISED * best.trial.rate, LORA_RATES[runs] * trial.rate)
    return refit_of(replace(trial, rate=rate, averaged=rate > trial.rate), 0, budget)


def next_refit(
    best: TrialResult, refits: Sequence[TrialResult], done: Sequence[TrialResult], budget: Budget
) -> Trial | None:
    """Return one more run like the first one on all rows; at the rate of one run if none gave a number."""
    first = refits[0].trial
    ran = [result for result in refits if result.tokens]  # the others are of the same round, on other devices
    if first.averaged and ran and all(result.loss is None for result in ran):
        trials = [result for result in done if not result.trial.refit]
        first = replace(first, rate=at_best_rate(best, trials).rate, averaged=False)
    return refit_of(first, len(refits), budget)


def refit_of(best: Trial, count: int, budget: Budget) -> Trial | None:
    """Return the best trial once more, on all rows and in another order.

    The first one is shortened if the trials before it took longer than they should, and the second one if
    the first alone is of no use.
    """
    refit = replace(best, refit=True, seed=best.seed + count)
    if count >= budget.refits(refit, MOST_REFITS):
        return None
    if budget.fits(refit):
        return refit
    epochs = epochs_in(refit, budget, budget.left_s / SAFETY) / budget.all_rows
    needed = count < (2 if best.averaged else 1)
    return replace(refit, epochs=epochs) if needed and epochs >= LEAST_REFIT * refit.epochs else None
