"""Runs of full length: the best one's neighbours, one that failed again, and a last pass."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from trainer_node.engine.search.strategy.best_trial import AFTER_LOWEST, is_long, settled
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import (
    LEAST_RATE,
    RATE_STEP,
    is_like,
    is_other_rate,
    key,
    neighbours,
    refuted,
)
from trainer_node.engine.search.strategy.prior import rate_factor
from trainer_node.engine.search.strategy.rates import at_best_rate, is_undecided
from trainer_node.engine.search.strategy.refits import MOST_REFITS
from trainer_node.engine.search.strategy.run_length import main_run
from trainer_node.engine.search.trial import Trial, TrialResult, last_pass_of

SEARCH_SHARE = 0.6  # of the time; after it a trial must leave enough for WANTED_REFITS
WANTED_REFITS = 3  # runs like the best trial on all rows, each in an order of its own, to be averaged
# Once the best trial's factor gives its rate, a second run on all rows is worth more than another trial. Not
# if that rate is more than FAR_RATE times off: then the factor is imprecise.
# A real model's LoRA has time for all of them first: SmolLM2-135M on 240 rows of German-English, with time
# for twelve epochs, spent it on trials of one epoch instead, and ended .20 higher (docs/experiments.md).
TOLD_REFITS, FAR_RATE = 2, 2.5
MOST_TRIES, LEAST_AGAIN = 2, 0.1  # of long runs, if a short one has a loss, and of the time
LEAST_LAST_PASS = 0.25  # of the development rows: time is kept for all of them, by a speed that was a guess


def next_neighbour(
    best: Trial,
    result: TrialResult | None,
    start: Sequence[Trial],
    done: Sequence[TrialResult],
    budget: Budget,
) -> Trial | None:
    """Return the first neighbour of the best trial that is new and leaves time for a refit."""
    centre = settled(result) if result else best
    others_first = result is not None and centre.arm in budget.lora and is_undecided(result)
    told = at_best_rate(result, done) if result and result.factor is not None and not others_first else None
    firsts = [_with_first_rate(one, centre, budget) for one in start]
    trials = neighbours(centre, firsts, result.lowest_epochs if result else None, told)
    for trial in sorted(trials, key=lambda trial: others_first and trial.arm == centre.arm):
        if (
            trial.batch < budget.devices
            or refuted(trial, centre, done)
            or _is_tried(trial, centre, told, done)
            or _is_past_turn(trial, done)
        ):
            continue
        spent_s = budget.all_s - budget.left_s + budget.cost_s(trial)
        is_far = told and trial.arm == centre.arm and is_other_rate(told.rate / centre.rate, FAR_RATE)
        wanted = TOLD_REFITS if told and not is_far else 1
        if wanted == TOLD_REFITS and centre.arm in budget.averaged:
            wanted = MOST_REFITS
        elif spent_s > SEARCH_SHARE * budget.all_s:
            wanted = WANTED_REFITS
        # Whether this trial or the best one before it will be run again is not known: the dearer one may be.
        reserve_s = max(budget.refits_s(one, wanted) for one in (trial, centre))
        if TRIAL_SAFETY * (budget.cost_s(trial) + reserve_s) <= budget.left_s:
            return trial
    return None


def _with_first_rate(arm: Trial, centre: Trial, budget: Budget) -> Trial:
    """Return an arm's first trial at the rate that the prior gives it in runs like the centre."""
    if arm.arm == centre.arm:
        return arm
    return replace(arm, rate=arm.rate * rate_factor(replace(centre, arm=arm.arm), budget))


def _is_tried(trial: Trial, centre: Trial, told: Trial | None, done: Sequence[TrialResult]) -> bool:
    """Return whether a trial, or one that tells as much, was run.

    Where the best trial told its rate, one at about the same rate does; if it is only about the rate, one of
    any length.
    """
    if key(trial) in {key(one.trial) for one in done}:
        return True
    if told is None:
        return False
    is_rate = key(trial) == key(replace(centre, rate=trial.rate)) != key(centre)
    long = (one.trial for one in done if is_long(one.trial))
    return any(
        is_like(one, trial) and (is_rate or key(replace(one, rate=trial.rate)) == key(trial)) for one in long
    )


def _is_past_turn(trial: Trial, done: Sequence[TrialResult]) -> bool:
    """Return whether a run that is like the trial, and not longer, has turned: the trial would, too."""
    return any(
        is_like(one.trial, trial)
        and one.lowest_epochs is not None
        and trial.epochs >= max(one.trial.epochs, AFTER_LOWEST * one.lowest_epochs)
        for one in done
        if is_long(one.trial)
    )


def long_again(failed: Sequence[TrialResult], best: TrialResult | None, budget: Budget) -> Trial | None:
    """Return the run that gave no number, or was worse than a probe, again at a third of its rate.

    None without time for it, and of a search that has a loss after MOST_TRIES.
    """
    lower = replace(failed[-1].trial, rate=failed[-1].trial.rate / RATE_STEP)
    if (best and len(failed) >= MOST_TRIES) or budget.left_s < LEAST_AGAIN * budget.all_s:
        return None
    if lower.rate < LEAST_RATE:
        return None
    return lower if not lower.main and budget.fits(lower) else main_run(lower, budget)


def last_pass(best: TrialResult, newest: TrialResult, budget: Budget) -> Trial | None:
    """Return a pass over the development rows from the weights of the main run, if it is the best one.

    If there is no time for all of them, it is one over a part of them.
    """
    if newest is not best or not best.trial.main or best.trial.epochs < 1.0 or budget.all_rows <= 1.0:
        return None
    last = last_pass_of(at_best_rate(best, ()))
    other_s = budget.other_s(refit=True)
    share = min(1.0, (budget.left_s - other_s) / max(1e-9, budget.cost_s(last) - other_s))
    return replace(last, epochs=share) if share >= LEAST_LAST_PASS else None
