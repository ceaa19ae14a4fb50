"""Short trials of an epoch at most, which compare rates before runs of full length."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import LEAST_RATE, MOST_RATE, RATE_STEP, key
from trainer_node.engine.search.strategy.prior import SHORT_STEPS
from trainer_node.engine.search.strategy.probes import PROBE_STEPS
from trainer_node.engine.search.strategy.rates import by_length, rate_after, rates_to_try
from trainer_node.engine.search.strategy.refits import first_refit
from trainer_node.engine.search.strategy.run_length import epochs_in, main_run, whole_run
from trainer_node.engine.search.trial import Trial, TrialResult

# The best rate differs by a factor of 35 between data sets, at the same batch (docs/experiments.md).
SHORT_TRIALS, SHORT_EPOCHS = 3, 1.0
LEAST_LONGER = 1.5  # times as long is the run after a short trial, at least; else it tells its rate itself
SHORT_SHARE = 0.035  # of the time, for each of them, if few rows are held out; but SHORT_STEPS at least
MOST_UNSEEN = 6.0  # epochs of one last run: with more time there is a trial of full length before it


def short_trial(whole: Trial, budget: Budget) -> Trial | None:
    """Return a trial of one epoch at most that stands for a whole one.

    None if it has too few steps, or if there is no time for all of them, a longer run and one on all rows:
    when to end is worth as much as the rate, and only a whole run shows it. Devices that run a trial each
    need no short ones. Its rate is raised for the shorter run, that of pairs is not.
    """
    epochs = min(SHORT_EPOCHS, whole.epochs)
    if not budget.many_held_out:  # then epochs have many steps, and the time of a few hundred ranks rates
        least = SHORT_STEPS * whole.batch / budget.examples
        epochs = min(epochs, max(least, epochs_in(whole, budget, SHORT_SHARE * budget.all_s)))
    short = replace(whole, epochs=epochs, short=True)
    after = replace(budget, left_s=budget.left_s - TRIAL_SAFETY * SHORT_TRIALS * budget.cost_s(short))
    if budget.width > 1 or budget.steps(short) < PROBE_STEPS or not _longer(short, after):
        return None
    raised = 1.0 if budget.pairs else by_length(short.epochs, whole.epochs)
    return replace(short, rate=min(MOST_RATE, short.rate * raised))


def _longer(short: Trial, budget: Budget) -> Trial | None:
    """Return the run of full length after short trials, if there is time for one that is much longer.

    Only a tiny model's LoRA has runs of full length that may be too short for that.
    """
    whole = whole_run(short, budget)
    return whole if whole and whole.epochs >= LEAST_LONGER * short.epochs else None


def rate_or_whole(done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the next short trial, or the run of full length that they lead to.

    Each further short trial has the rate that the best one's delta asks for. Where that isn't known it has a
    third of the best one's rate, or three times it, if the third is worse.
    """
    best = best_of(done)
    centre = best.trial if best else done[-1].trial
    tried = {key(result.trial) for result in done}
    for rate in rates_to_try(centre, best, done, (1 / RATE_STEP, RATE_STEP) if best else (1 / RATE_STEP,)):
        trial = replace(centre, rate=rate)
        is_new = key(trial) not in tried and LEAST_RATE <= rate <= MOST_RATE
        if is_new and len(done) < SHORT_TRIALS and budget.fits(trial):
            return trial
    if best is None:  # they diverged
        centre = replace(centre, rate=centre.rate / RATE_STEP)
    centre = replace(centre, rate=rate_after(centre, best, done))
    whole = _longer(centre, budget) if best else whole_run(centre, budget)
    if not budget.refits(centre, 1):  # nothing follows a run of full length: it may take all the time
        last = replace(main_run(centre, budget), short=False)
        whole = last if whole is None or last.epochs <= MOST_UNSEEN else whole
    if whole is None and best:
        return first_refit(best, done, budget)
    whole = whole or replace(main_run(centre, budget), short=False)
    return replace(whole, rate=max(LEAST_RATE, centre.rate * by_length(whole.epochs, centre.epochs)))
