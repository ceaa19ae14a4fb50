"""The best trial again, on all rows: how often, at which rate, and how long."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import MOST_RATE, is_other_rate
from trainer_node.engine.search.strategy.rates import at_best_rate, is_undecided
from trainer_node.engine.search.strategy.run_length import FEWEST_EPOCHS, epochs_in
from trainer_node.engine.search.trial import Trial, TrialResult

MOST_REFITS = 6  # if nothing is left to try: the first gains .01 to .02, two more .01, all others less
# Of runs of LoRA, as a multiple of the rate that is best for one, by how many are averaged. Three end up to
# .06 lower with it (docs/experiments.md). Dense runs want the rate of one.
LORA_RATES = (1.0, 1.0, 2.0, 3.0)
# Of a real model's, however many: with noise three and six of SmolLM2-135M end alike at 1 and at 2 times the
# plan's rate on two data sets, and .10 higher at 3 times on one of them (docs/experiments.md).
MOST_REAL_RATE = 2.0
MOST_ABOVE_RUN = 4.0  # times a rate that was run: a higher one may diverge
# A tiny model's best trial joins the average, which ends .001 to .016 lower. The longer one run is, the
# lower is its best rate; that of averages stays. So averages want 1.3 times as much in runs of one epoch,
# and twice in runs of two. SmolLM2-135M's trial, on four fifths of the rows, can be .12 worse than runs on
# all of them (docs/experiments.md).
LEAST_JOINED_RATE = 1.3  # times the rate that is best for one run; at more, a run counts in averages only
# If the trial joins, the runs on all rows have at most so many times its rate. It doesn't join if it asks
# for more than that, or for so many times less. A trial at the rate of a run on all rows makes the average
# .001 higher and .023 lower than that run, at twice its rate .008 higher and .010 lower, at .4 times .021
# higher and .002 lower, at three times .036 and .089 higher (docs/experiments.md).
MOST_APART = 2.0
LEAST_REFIT = 0.5  # of its epochs: so much shorter may the first of them be
# Of its epochs, for one more run. Speeds are known to some percent: where a planned run missed the
# time by that, a third of a job's time stayed unused, and .005 nat (docs/experiments.md).
LEAST_MORE = 0.75
# On the embeddings of a real model's runs that are averaged alone, at rates that are too high for one: see
# Plan. SmolLM2-135M's mean of two ends .001 to .215 lower with it on six of seven tasks. A tiny model's runs
# at 1.3 to 2 times the rate of one, averaged with the trial, end .003 to .022 higher (docs/experiments.md).
NOISE = 5.0


def first_refit(best: TrialResult, done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the best trial on all rows, at the rate of all such runs: what is best for their average.

    The best trial joins it if its rate is near theirs and it has seen almost all rows, or if it is LoRA of a
    tiny model.
    """
    trial = replace(at_best_rate(best, done), of=list(done).index(best))
    is_near = not is_other_rate(trial.rate / best.trial.rate, MOST_APART)
    has_seen_all = budget.averages_lora(trial)
    if trial.arm not in budget.lora - budget.single or not (budget.many_held_out or has_seen_all):
        joins = is_near and not budget.many_held_out and trial.arm not in budget.single
        return refit_of(replace(trial, with_best=joins), 0, budget)
    runs = min(budget.runs_left(replace(trial, refit=True), MOST_REFITS, LEAST_MORE), len(LORA_RATES) - 1)
    joins = (budget.tiny or has_seen_all) and is_near
    times, most = LORA_RATES[runs], MOST_ABOVE_RUN
    if not budget.tiny:
        times = min(times, MOST_REAL_RATE)
    if joins and has_seen_all:
        # Measured for two runs and a trial of 1.95 epochs; those of 1.1 epochs gained nothing.
        is_measured = runs >= 2 and trial.epochs >= FEWEST_EPOCHS
        times, most = (LORA_RATES[2] if is_measured else 1.0), MOST_APART
    elif joins:
        times, most = max(LEAST_JOINED_RATE, min(times, trial.epochs)), MOST_APART
    is_told = best.factor is not None and not is_undecided(best)
    rate = min(MOST_RATE, most * best.trial.rate, times * trial.rate) if is_told else trial.rate
    refit = replace(trial, rate=rate, averaged=rate > LEAST_JOINED_RATE * trial.rate, with_best=joins)
    if refit.averaged and budget.plain and not (joins or budget.tiny):
        refit = replace(refit, noise=NOISE)
    return refit_of(refit, 0, budget)


def next_refit(
    best: TrialResult, refits: Sequence[TrialResult], done: Sequence[TrialResult], budget: Budget
) -> Trial | None:
    """Return one more run like the first one that gave a number; at the rate of one run if none did."""
    good = (result.trial for result in refits if result.loss is not None)
    first = replace(next(good, refits[0].trial), seed=refits[0].trial.seed)
    ran = [result for result in refits if result.tokens]  # the others are of the same round, on other devices
    if ran and all(result.loss is None for result in ran):
        trials = [result for result in done if not result.trial.refit]
        first = replace(first, rate=at_best_rate(best, trials).rate, averaged=False, noise=0.0)
    return refit_of(first, len(refits), budget)


def refit_of(best: Trial, count: int, budget: Budget) -> Trial | None:
    """Return the best trial once more, on all rows and in another order.

    The first one is shortened if the trials before it took longer than they should, and the second one if
    the first alone is of no use. One of LoRA may always be a little shorter than those that it joins.
    """
    refit = replace(best, refit=True, seed=best.seed + count)
    if count >= budget.refits(refit, MOST_REFITS):
        return None
    if budget.fits(refit):
        return refit
    epochs = epochs_in(refit, budget, budget.left_s / TRIAL_SAFETY) / budget.all_rows
    needed = count < (2 if best.averaged and not best.with_best else 1)
    least = LEAST_REFIT if needed else LEAST_MORE
    return replace(refit, epochs=epochs) if epochs >= least * refit.epochs else None
