"""The first trial of a job: its arm, its length by the time there is, its batch and rate by the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shared.planning.plan import Plan
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.neighbours import LEAST_BATCH, START_EPOCHS
from trainer_node.engine.search.strategy.prior import SHORT_STEPS, with_prior
from trainer_node.engine.search.strategy.probes import probe_of
from trainer_node.engine.search.strategy.run_length import main_run, runs_after, whole_run
from trainer_node.engine.search.strategy.short_trials import short_trial
from trainer_node.engine.search.trial import Trial

# SmolLM2-135M, 120 rows, batch 2: 1.1 epochs of all of them end .09 and .17 below as many of the 96 that are
# left when development rows are held out. Tiny models have little to forget: the arena's Llama is .01 to .04
# better by two epochs of one run on three of four data sets, and .19 where a run has 11 steps
# (docs/experiments.md).
TWIN_EPOCHS, TWIN_STEPS = 1.0, 25  # of each of two runs that share the time of a job that has none to search
TWIN_ROWS = 1.15  # all rows, as a multiple of the training rows: where fewer are held out, it wasn't measured
# The average of LoRA's runs ends lower than that of dense ones on four data sets, by .008 to .03 nat on the
# arena's models and .06 on SmolLM2-135M. Its factors start at zero, and in 24 to 48 steps they come less
# far: .06 to .2 higher on Python code and manual pages. In 50 they are .07 to .09 higher on manual pages,
# and .007 to .014 lower on fortunes. 72 are enough (docs/experiments.md).
LORA_STEPS = 60
# Many rows, time for 2.5 epochs, one long run (SmolLM2-135M, 5,600 rows): LoRA r32 ends .048 lower than
# dense deltas on German-English, .017 on WordNet (docs/experiments.md). Less than an epoch wasn't measured.
LORA_EPOCHS = 1.0
# Of a tiny model: jobs of 400 rows end .02 lower with LoRA, of 1,000 .006 lower and .056 higher, one of 2,000
# .03 higher (docs/experiments.md).
MOST_TINY_LORA_ROWS = 600


def first_trial(start: Sequence[Trial], budget: Budget) -> Trial:
    """Return a short trial if there is time for runs of full length after it; else one that is still shorter.

    Rows that are too few for a short trial get a run of full length, if many of them are held out or LoRA's
    runs will be averaged: a second run, on all rows, is worth its time then. Otherwise the rate is worth
    more. With a trial on each device rates are compared at full length. Without time for more than one other
    run, and with too few steps to compare rates, half of a real model's time goes to a run on all rows.
    """
    start = _in_order(start, budget)
    whole = _first_of_lora(start, budget) or _whole(start[0], budget)
    if whole is not None and (short := short_trial(whole, budget)):
        return short
    if whole is not None and (budget.many_held_out or budget.width > 1 or _will_be_averaged(whole, budget)):
        return whole
    if probe := probe_of(start[0], budget):
        return probe
    if whole is not None and budget.refits(whole, 1):
        return whole
    return _twin(start[0], budget) or with_prior(main_run(start[0], budget), budget)


def _will_be_averaged(whole: Trial, budget: Budget) -> bool:
    """Return whether LoRA's run will be averaged with two on all rows, though few rows are held out."""
    return budget.averages_lora(whole) and runs_after(whole, budget) == 2


def _in_order(start: Sequence[Trial], budget: Budget) -> Sequence[Trial]:
    """Return the arms' first trials, one of LoRA first where few of a real model's many rows are held out."""
    ample = [one for one in start if one.arm in budget.ample - budget.single]
    if budget.tiny or budget.many_held_out or not ample:
        return start
    longest = main_run(ample[0], budget)
    if longest.epochs < LORA_EPOCHS or budget.steps(longest) < SHORT_STEPS:
        return start
    return [ample[0], *(one for one in start if one is not ample[0])]


def _first_of_lora(start: Sequence[Trial], budget: Budget) -> Trial | None:
    """Return LoRA's first run of full length, if it has enough steps and its runs will be averaged.

    Two of them on all rows follow, and of a tiny model at least one.
    """
    arms = (budget.lora if budget.tiny or budget.many_held_out else budget.ample) - budget.single
    least_runs = 1 if budget.tiny and budget.all_rows >= TWIN_ROWS else 2
    is_small = not budget.tiny or budget.examples <= MOST_TINY_LORA_ROWS
    for trial in start if is_small else ():
        if trial.arm not in arms or runs_after(trial, budget) < least_runs:
            continue
        whole = _whole(trial, budget, TWIN_EPOCHS)
        if whole and budget.steps(whole) >= LORA_STEPS and whole.epochs >= TWIN_EPOCHS:
            return whole
    return None


def _whole(trial: Trial, budget: Budget, least: float = START_EPOCHS[0]) -> Trial | None:
    """Return a run of full length with the prior's batch and rate.

    If fewer than two runs follow it, it has `least` epochs, or is None.
    """
    whole = whole_run(trial, budget, least)
    return with_prior(whole, budget, runs_after(trial, budget)) if whole else None


def _twin(trial: Trial, budget: Budget) -> Trial | None:
    """Return the trial as the first of two runs, if each has steps enough for a real model.

    The second one, on all rows, pays where many of them are held out.
    """
    pays = not budget.tiny and budget.all_rows >= TWIN_ROWS
    twin = _whole(trial, budget, TWIN_EPOCHS) if pays else None
    return twin if twin and budget.steps(twin) >= TWIN_STEPS else None


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
