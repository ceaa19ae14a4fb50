"""Which training run to try next, from those that were tried: pure, so that a resumed job decides alike.

The rate of each trial falls to zero within it, and the development rows score it. How a search goes on
depends on the time that there is:

- For a run of full length and one more on all rows: up to three short trials compare rates. Then each trial
  is of full length: the best of them is the centre from which the search goes on to its neighbours, coarse
  steps first. In the end the best one is run again on all rows, if it can be averaged in several orders.
- For less: still shorter trials (probes) compare rates, and one long run takes the time that is left, or a
  part of it if its loss turns.
- Too few steps to compare rates: two runs, the second one on all rows, or a single run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.search.budget import SAFETY, Budget
from trainer_node.engine.search.delta_factor import rate_change
from trainer_node.engine.search.neighbours import (
    LEAST_BATCH,
    LEAST_EPOCHS,
    LEAST_RATE,
    MOST_EPOCHS,
    MOST_RATE,
    RATE_STEP,
    START_EPOCHS,
    in_range,
    is_other_rate,
    key,
    neighbours,
    refuted,
)
from trainer_node.engine.search.prior import SHORT_STEPS, with_prior
from trainer_node.engine.search.trial import Trial, TrialResult, last_pass_of

FEWEST_EPOCHS = 1.5  # of a run that two on all rows follow
# The best rate differs by a factor of three between data sets: `prior.py`.
SHORT_TRIALS, SHORT_EPOCHS = 3, 1.0
SHORT_SHARE = 0.035  # of the time, for each of them, if few rows are held out; but SHORT_STEPS at least
MOST_UNSEEN = 6.0  # epochs of one last run: with more time there is a trial of full length before it
PROBE_SHARE = 0.12  # of the time, for all short trials together
PROBE_TRIALS = 4
PROBE_STEPS = 40  # a trial of fewer steps ranks rates by chance
HORIZON = 0.2  # the best rate falls with the length of a run to this power
# SmolLM2-135M, 120 rows, batch 2: 1.1 epochs of all of them end .09 and .17 below as many of the 96 that are
# left when development rows are held out. Tiny models have little to forget: the arena's Llama is .01 to .04
# better by two epochs of one run on three of four data sets, and .19 where a run has 11 steps
# (docs/experiments.md).
TWIN_EPOCHS, TWIN_STEPS = 1.0, 25  # of each of two runs that share the time of a job that has none to search
TWIN_ROWS = 1.15  # all rows, as a multiple of the training rows: where fewer are held out, it wasn't measured
SEARCH_SHARE = 0.6  # of the time; after it a trial must leave enough for WANTED_REFITS
WANTED_REFITS = 3  # runs like the best trial on all rows, each in an order of its own, to be averaged
MOST_REFITS = 6  # if nothing is left to try: the first gains .01 to .02, two more .01, all others less
LEAST_REFIT = 0.5  # of its epochs: so much shorter may the first of them be
LEAST_MAIN = 0.001  # epochs of a run that takes the rest of the time
MOST_TRIES, LEAST_AGAIN = 2, 0.1  # of a first long run that gave no number, and of the time
LAST_PASS_SHARE = 0.3  # of the time, at most, for a pass over the development rows after the main run
AFTER_LOWEST = 1.25  # a run this much longer than to the lowest point of the one before ends at its own


def next_trial(start: Sequence[Trial], done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the next trial, or None if no further one is worth its time.

    `start` has the arms' first trials, the most promising one first. The first trial is always given.
    """
    if not done:
        return first_trial(start, budget)
    refits = [result for result in done if result.trial.refit]
    best = best_of(done)
    if refits:
        if refits[-1].trial.last_pass:
            return None
        return _refit(refits[0].trial, len(refits), budget)
    if all(result.trial.short for result in done):
        return _rate_or_whole(done, budget)
    long = [result for result in done if is_long(result.trial)]
    if long and (best or long[-1].trial.main) and all(result.loss is None for result in long):
        return _long_again(long, budget)
    if not long and not done[0].trial.short:
        return _probe_or_main(start, done, budget)
    if trial := _search(best.trial if best else done[0].trial, best, start, done, budget):
        return trial
    if best is None:
        return None
    return _refit(at_best_rate(best, done), 0, budget) or _last_pass(best, done[-1], budget)


def arm_name(plan: Plan) -> str:
    """Return what a plan trains, in two or three words."""
    ranks = sorted({module.rank for module in plan.modules if module.method == "lora"})
    dense = any(module.method == "dense" for module in plan.modules)
    if plan.extras.norms and plan.extras.embeddings:
        return "everything"
    found = ["dense"] * dense + ["norms"] * plan.extras.norms + [f"LoRA r{rank}" for rank in ranks[-1:]]
    return " and ".join(found)


def trial_of(arm: str, plan: Plan, mean_length: float) -> Trial:
    """Return an arm's first trial: the plan's rates, its batch as a power of two; `mean_length` in tokens."""
    batch = plan.packs_per_step * plan.capacity / mean_length
    return Trial(arm=arm, batch=max(LEAST_BATCH, 2 ** round(math.log2(max(1.0, batch)))))


def first_trial(start: Sequence[Trial], budget: Budget) -> Trial:
    """Return a short trial if there is time for runs of full length after it; else one that is still shorter.

    Rows that are too few for a short trial get a run of full length, if many of them are held out: a second
    run, on all rows, is worth its time then. Otherwise the rate is worth more. With a trial on each device
    rates are compared at full length. If no second run fits, and the steps are too few to compare rates, half
    of a real model's time goes to a run on all rows.
    """
    whole = _whole(start[0], budget)
    if whole is not None:
        whole = with_prior(whole, budget)
        if short := _short(whole, budget):
            return short
    if whole is not None and (budget.many_held_out or budget.width > 1):
        return whole
    if probe := _probe(start[0], budget):
        return probe
    if whole is not None and budget.refits(whole, 1):
        return whole
    return _twin(start[0], budget) or with_prior(_main(start[0], budget), budget)


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
    aimed = replace(trial, rate=_limited(trial.rate * rate_change(result.factor)))
    tried = (one.trial for one in done if one is not result and one.trial.short == result.trial.short)
    return trial if any(_is_like(one, aimed) for one in tried) else aimed


def _is_like(trial: Trial, other: Trial) -> bool:
    same = (trial.arm, trial.batch) == (other.arm, other.batch)
    return same and not is_other_rate(trial.rate / other.rate)


def _limited(rate: float) -> float:
    return min(MOST_RATE, max(LEAST_RATE, rate))


# --- full length


def _search(
    best: Trial,
    result: TrialResult | None,
    start: Sequence[Trial],
    done: Sequence[TrialResult],
    budget: Budget,
) -> Trial | None:
    """Return the first neighbour of the best trial that is new and leaves time for a refit."""
    centre = settled(result) if result else best
    tried = {key(one.trial) for one in done}
    lowest, factor = (result.lowest_epochs, result.factor) if result else (None, None)
    for trial in neighbours(centre, start, lowest, factor):
        if key(trial) in tried or trial.batch < budget.devices or refuted(trial, centre, done):
            continue
        if factor is not None and _is_old_rate(trial, centre, done):
            continue
        spent_s = budget.all_s - budget.left_s + budget.cost_s(trial)
        wanted = 1 if spent_s <= SEARCH_SHARE * budget.all_s else WANTED_REFITS
        # Whether this trial or the best one before it will be run again is not known: the dearer one may be.
        reserve_s = max(budget.refits_s(one, wanted) for one in (trial, centre))
        if SAFETY * (budget.cost_s(trial) + reserve_s) <= budget.left_s:
            return trial
    return None


def _is_old_rate(trial: Trial, centre: Trial, done: Sequence[TrialResult]) -> bool:
    """Return whether a trial is the centre at about a rate that was tried, and so was worse."""
    is_rate = key(trial) == key(replace(centre, rate=trial.rate)) != key(centre)
    return is_rate and any(_is_like(one.trial, trial) for one in done if not one.trial.short)


def _refit(best: Trial, count: int, budget: Budget) -> Trial | None:
    """Return the best trial once more, on all rows and in another order.

    The first one is shortened if the trials before it took longer than they should.
    """
    refit = replace(best, refit=True, seed=best.seed + count)
    if count >= budget.refits(refit, MOST_REFITS):
        return None
    if budget.fits(refit):
        return refit
    epochs = _epochs_in(refit, budget, budget.left_s / SAFETY) / budget.all_rows
    return replace(refit, epochs=epochs) if not count and epochs >= LEAST_REFIT * refit.epochs else None


# --- short trials, then runs of full length


def _whole(trial: Trial, budget: Budget, least: float = START_EPOCHS[0]) -> Trial | None:
    """Return the trial as long as leaves time for the run on all rows, if any; None below `least` epochs.

    Where many rows are held out it leaves time for two if each has FEWEST_EPOCHS: averaged, they are better
    than one that is longer, by .003 to .038 nat on five of five tasks (docs/experiments.md).
    """
    if budget.many_held_out and budget.refits(trial, 2) == 2:
        epochs = _epochs_before(trial, 2, budget)
        if epochs >= FEWEST_EPOCHS:
            return replace(trial, epochs=min(START_EPOCHS[1], epochs), short=False)
    epochs = _epochs_before(trial, budget.refits(trial, 1), budget)
    return replace(trial, epochs=min(START_EPOCHS[1], epochs), short=False) if epochs >= least else None


def _epochs_before(trial: Trial, runs: int, budget: Budget) -> float:
    """Return the epochs of a trial that as many runs like it on all rows leave time for."""
    seconds = budget.left_s / SAFETY - (1 + runs) * budget.trial_s
    tokens = seconds * budget.tokens_per_s / budget.waste(trial)
    return tokens / (budget.epoch_tokens * (1.0 + runs * budget.all_rows))


def _twin(trial: Trial, budget: Budget) -> Trial | None:
    """Return the trial as the first of two runs, if each has steps enough for a real model.

    The second one, on all rows, pays where many of them are held out.
    """
    pays = not budget.tiny and budget.all_rows >= TWIN_ROWS
    twin = _whole(trial, budget, TWIN_EPOCHS) if pays else None
    twin = with_prior(twin, budget) if twin else None
    return twin if twin and budget.steps(twin) >= TWIN_STEPS else None


def _short(whole: Trial, budget: Budget) -> Trial | None:
    """Return a trial of one epoch at most that stands for a whole one.

    None if it has too few steps, or if there is no time for all of them, a whole run and one on all rows:
    when to end is worth as much as the rate, and only a whole run shows it. Devices that run a trial each
    need no short ones.
    """
    epochs = min(SHORT_EPOCHS, whole.epochs)
    if not budget.many_held_out:  # then epochs have many steps, and the time of a few hundred ranks rates
        least = SHORT_STEPS * whole.batch / budget.examples
        epochs = min(epochs, max(least, _epochs_in(whole, budget, SHORT_SHARE * budget.all_s)))
    short = replace(whole, epochs=epochs, short=True)
    after = replace(budget, left_s=budget.left_s - SAFETY * SHORT_TRIALS * budget.cost_s(short))
    if budget.width > 1 or budget.steps(short) < PROBE_STEPS or not _whole(whole, after):
        return None
    return replace(short, rate=min(MOST_RATE, short.rate * (whole.epochs / short.epochs) ** HORIZON))


def _rate_or_whole(done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the next short trial, or the run of full length that they lead to.

    Each further short trial has the rate that the best one's delta asks for. Where that isn't known it has a
    third of the best one's rate, or three times it, if the third is worse.
    """
    best = best_of(done)
    centre = best.trial if best else done[-1].trial
    tried = {key(result.trial) for result in done}
    lower, higher = (replace(centre, rate=centre.rate * factor) for factor in (1 / RATE_STEP, RATE_STEP))
    further = [lower, higher] if best else [lower]
    if best and best.factor is not None:
        aimed = replace(at_best_rate(best, done), epochs=centre.epochs, short=True)
        further = [aimed] if is_other_rate(aimed.rate / centre.rate) else []
    for trial in further:
        is_new = key(trial) not in tried and LEAST_RATE <= trial.rate <= MOST_RATE
        if is_new and len(done) < SHORT_TRIALS and budget.fits(trial):
            return trial
    if best is None:  # they diverged
        centre = lower
    elif best.factor is not None:
        centre = replace(centre, rate=at_best_rate(best, done).rate)
    whole = _whole(centre, budget)
    if not budget.refits(centre, 1):  # nothing follows a run of full length: it may take all the time
        last = replace(_main(centre, budget), short=False)
        whole = last if whole is None or last.epochs <= MOST_UNSEEN else whole
    if whole is None:
        return _refit(at_best_rate(best, done), 0, budget) if best else None
    factor = (whole.epochs / centre.epochs) ** -HORIZON
    rate = centre.rate if best and best.factor is not None else _between(centre, done)
    return replace(whole, rate=max(LEAST_RATE, rate * factor))


# --- shorter trials, then one long run


def _probe(trial: Trial, budget: Budget) -> Trial | None:
    """Return a trial of one part of PROBE_SHARE; None if that has too few steps to tell anything."""
    epochs = min(_epochs_in(trial, budget, PROBE_SHARE * budget.all_s / PROBE_TRIALS), 0.99 * LEAST_EPOCHS)
    probe = replace(trial, epochs=epochs)
    return probe if epochs > 0 and budget.steps(probe) >= PROBE_STEPS else None


def _main(trial: Trial, budget: Budget) -> Trial:
    """Return the run that takes the rest of the time, but for a pass over the development rows.

    Without time for all training rows there is no such pass: those that are left are new rows as well.
    """
    leaves_s = SAFETY * budget.cost_s(last_pass_of(trial)) if budget.all_rows > 1.0 else 0.0
    epochs = _epochs_in(trial, budget, budget.left_s - leaves_s)
    if leaves_s > LAST_PASS_SHARE * budget.left_s or epochs < 1.0:
        # What follows the last run is not in what is left, and nothing comes before it.
        leaves_s, epochs = 0.0, _epochs_in(trial, budget, budget.left_s + budget.trial_s)
    epochs = min(MOST_EPOCHS, max(LEAST_MAIN, epochs))
    return replace(trial, epochs=epochs, main=True, leaves_s=leaves_s)


def _long_again(failed: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the run that gave no number once more, at a third of its rate; None without time for it."""
    lower = replace(failed[-1].trial, rate=failed[-1].trial.rate / RATE_STEP)
    if len(failed) >= MOST_TRIES or lower.rate < LEAST_RATE or budget.left_s < LEAST_AGAIN * budget.all_s:
        return None
    return lower if not lower.main and budget.fits(lower) else _main(lower, budget)


def _epochs_in(trial: Trial, budget: Budget, seconds: float) -> float:
    tokens = (seconds - budget.trial_s) * budget.tokens_per_s / budget.waste(trial)
    return tokens / budget.epoch_tokens


def _last_pass(best: TrialResult, newest: TrialResult, budget: Budget) -> Trial | None:
    """Return a pass over the development rows from the weights of the main run, if it is the best one."""
    if newest is not best or not best.trial.main or best.trial.epochs < 1.0 or budget.all_rows <= 1.0:
        return None
    last = last_pass_of(at_best_rate(best, ()))
    return last if budget.cost_s(last) <= budget.left_s else None


def _probe_or_main(start: Sequence[Trial], done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    best, first = best_of(done), done[0].trial
    tried = {key(result.trial) for result in done}
    centre = best.trial if best else replace(first, rate=first.rate / RATE_STEP)
    spent = budget.all_s - budget.left_s
    if spent + budget.cost_s(first) <= PROBE_SHARE * budget.all_s:
        factors = [1.0, RATE_STEP, 1.0 / RATE_STEP]
        if best and best.factor is not None:
            aimed = at_best_rate(best, done).rate / centre.rate
            factors = [aimed] if is_other_rate(aimed) else []
        for factor in factors:
            trial = replace(centre, rate=centre.rate * factor)
            if in_range(replace(trial, epochs=1.0)) and key(trial) not in tried:
                return trial
    chosen = _main(centre, budget)
    factor = min(1.0, (chosen.epochs / first.epochs) ** -HORIZON)
    rate = _between(centre, done)
    if best and best.factor is not None:
        rate = at_best_rate(best, done).rate
    return replace(chosen, rate=max(rate / RATE_STEP, rate * factor))


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
