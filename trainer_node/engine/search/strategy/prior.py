"""A first trial's batch and rate, by its rows and steps alone: before anything was tried."""

from __future__ import annotations

from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.neighbours import LEAST_BATCH
from trainer_node.engine.search.trial import Trial

# Of a first trial, if a batch leaves so many: batch 2 beats 4 by .04 on 120 rows, each at the better of its
# rates (SmolLM2-135M, one epoch); with 60 to 800 steps batches differ by .02 at most (docs/experiments.md).
LEAST_STEPS = 100
# The first rate, as a multiple of the plan's.
SHORT_STEPS, PLAN_TOKENS, TINY_TOKENS = 150, 1280, 320  # so many steps of so many tokens want the plan's rate
RATE_BY_STEPS, RATE_BY_FEW, RATE_BY_TOKENS = 0.3, 0.8, 0.25  # powers; RATE_BY_FEW below SHORT_STEPS
FEWEST_STEPS = 60  # fewer are as these
LEAST_FACTOR, MOST_FACTOR = 0.2, 4.0
# Rows that are seen once allow more: 120 steps of SmolLM2-135M on 480 rows end .085 and .036 nat lower at 1.2
# times the plan's rate than at .6 times; on 240 rows, twice, the two are alike.
ONCE, ONCE_FACTOR, MOST_ONCE = 1.5, 1.6, 1.3  # epochs; a factor, but not beyond that
# Of LoRA, tiny models: in one epoch of 50 to 160 steps both of the arena's want about this many times the
# plan's rate on three of five data sets, less on two, and about half of it in two epochs; batch 2 on five
# of them, batch 4 on two (docs/experiments.md).
LORA_ONCE, LORA_ONCE_BATCH = 1.8, 4
PAIR_BATCH = 4  # of preference pairs: smaller batches alone want less than the plan's rate
MOST_DEARER = 1.2  # so much longer may a finer batch take per row: half of the epochs cost .07 to .3 nat
TINY = 20e6  # weights of all linear modules: the arena's own models have 2 to 4 million, SmolLM2-135M 106


def is_tiny(plan: Plan) -> bool:
    """Return whether a plan's model is smaller than real ones, and other rates hold for it."""
    return sum(one.in_features * one.out_features * one.count for one in plan.modules) < TINY


def with_prior(trial: Trial, budget: Budget, runs: int = 1) -> Trial:
    """Return the trial with a batch that leaves LEAST_STEPS, if one does, and a rate that fits its steps.

    `runs` on all rows are to follow it. If such a batch costs more time, they and the trial are made shorter.
    """
    trial = _with_steps(trial, budget, runs)
    return replace(trial, rate=trial.rate * rate_factor(trial, budget))


def rate_factor(trial: Trial, budget: Budget) -> float:
    """Return the first rate as a multiple of the plan's.

    Short runs want higher rates: below SHORT_STEPS the sum of all steps' rates is much the same. Steps of few
    tokens want lower ones. SmolLM2-135M wants .6 times the plan's in 120 steps of 112 tokens, 1.2 times in 60
    of 56, 1.7 in 156 of 2,500, 3 in 47 of 19,000. Models of 4 M weights want 1 in 125 of 160, .7 in 200 of
    100, .4 in 800 of 100, 1.5 to 5 in 40 to 60 of 340 to 500 (docs/experiments.md).
    """
    if budget.pairs:  # the plan's rate goes by the steps already
        return min(1.0, trial.batch / PAIR_BATCH) ** 0.5
    is_small = trial.epochs <= ONCE and trial.batch <= LORA_ONCE_BATCH
    if budget.tiny and trial.arm in budget.lora and is_small:
        return LORA_ONCE / max(1.0, trial.epochs)
    step_tokens = trial.batch * budget.epoch_tokens / budget.examples
    share = step_tokens / (TINY_TOKENS if budget.tiny else PLAN_TOKENS)
    fewer = SHORT_STEPS / max(FEWEST_STEPS, budget.steps(trial))
    factor = share**RATE_BY_TOKENS * fewer ** (RATE_BY_FEW if fewer > 1.0 else RATE_BY_STEPS)
    if trial.epochs <= ONCE and not budget.tiny:
        factor = max(factor, min(MOST_ONCE, ONCE_FACTOR * factor))
    return min(MOST_FACTOR, max(LEAST_FACTOR, factor))


def _with_steps(trial: Trial, budget: Budget, runs: int) -> Trial:
    start = trial
    while budget.steps(trial) < LEAST_STEPS and trial.batch >= 2 * max(LEAST_BATCH, budget.devices):
        finer = replace(start, batch=trial.batch // 2)
        dearer = budget.waste(finer) / budget.waste(start)
        if dearer > 1.0 and not budget.fits_with(finer, runs):
            if dearer > MOST_DEARER:
                break
            finer = replace(finer, epochs=start.epochs / dearer)
        trial = finer
    return trial
