"""What a trial costs, and whether there is time for it: pure."""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

from shared.planning.plan import Plan
from shared.planning.step_size import padding
from trainer_node.engine.search.trial import Trial

TRIAL_SAFETY = 1.05  # a trial may take this much longer than those before it
# All rows, as a multiple of the training rows, from which on a run on all of them is worth its time for the
# further rows alone: 20% of 250 rows are held out, 7% of 5,400 and 2% of 50,000. The other way ends .003 to
# .019 nat lower with 3% held out, and up to .005 higher with 12% (docs/experiments.md).
MANY_HELD_OUT = 1.08
# Of trained weights: above half of it one trial's stay on disk, above all of it one run's on all rows, too.
KEPT_BYTES = 8e9
LOW_RANK = 32  # of LoRA: at higher rates three runs of rank 128 average .05 higher on one of two data sets


class Speed(Struct, frozen=True):
    """How fast the steps of one method are."""

    tokens_per_s: float
    step_s: float = 0.0  # of a step besides its tokens: weights are gathered and sent, the optimiser steps

    def times(self, factor: float) -> Speed:
        """Return the speed of steps that are so many times as fast."""
        return Speed(factor * self.tokens_per_s, self.step_s / factor)


class Budget(Struct, frozen=True, kw_only=True):
    """What the next trial may cost."""

    left_s: float  # until training must be over
    tokens_per_s: float  # of the job's own plan
    epoch_tokens: int
    examples: int
    trial_s: float  # what a trial costs besides its steps: resetting, scoring
    refit_s: float | None = None  # the same of a run on all rows, without factors; None: as much
    all_s: float  # `left_s` before the first trial
    score_s: float = 0.0  # of scoring the development rows once
    step_s: float = 0.0  # of a step of the job's own plan besides its tokens
    others: dict[str, Speed] = {}  # of arms that are faster or slower than the job's own plan
    least_batch: float = 1.0  # examples that fill the smallest packs, one on every device: fewer cost as much
    all_rows: float = 1.0  # training and development rows' tokens, as a multiple of the training rows'
    single: frozenset[str] = frozenset()  # arms whose runs aren't averaged: a second one on all rows is lost
    lora: frozenset[str] = frozenset()  # arms of LoRA of low rank, whose averages are lower than others'
    ample: frozenset[str] = frozenset()  # those of them that may come before a job's own dense deltas
    devices: int = 1  # that share a step: each needs an example
    width: int = 1  # trials that run at once, each on a device of its own
    pairs: bool = False  # of preferences: published rates are below the plan's, none above it was measured
    plain: bool = False  # the loss is that of the labels alone: no pairs, no divergence
    tiny: bool = False  # the model is so small that it wants higher rates than real ones

    def speed(self, trial: Trial) -> Speed:
        """Return how fast a trial's steps are."""
        return self.others.get(trial.arm) or Speed(self.tokens_per_s, self.step_s)

    def cost_s(self, trial: Trial) -> float:
        """Return the seconds that a trial takes."""
        rows = self.all_rows - 1.0 if trial.last_pass else self.all_rows if trial.refit else 1.0
        tokens = self.waste(trial) * trial.epochs * rows * self.epoch_tokens
        return self.other_s(refit=trial.refit) + tokens / self.speed(trial).tokens_per_s

    def other_s(self, *, refit: bool) -> float:
        """Return the seconds that a trial, or a run on all rows, takes besides its steps."""
        return self.refit_s if refit and self.refit_s is not None else self.trial_s

    def waste(self, trial: Trial) -> float:
        """Return how many times as long as its rows' tokens alone a trial's steps take.

        Small batches don't fill packs, and each step takes time of its own.
        """
        speed = self.speed(trial)
        rows_s = trial.batch * self.epoch_tokens / self.examples / speed.tokens_per_s
        return padding(trial.batch, self.least_batch) + speed.step_s / rows_s

    def step_tokens(self, trial: Trial) -> float:
        """Return the tokens that a step computes, padding included."""
        return padding(trial.batch, self.least_batch) * trial.batch * self.epoch_tokens / self.examples

    def fits(self, trial: Trial) -> bool:
        """Return whether a trial would be over in time."""
        return TRIAL_SAFETY * self.cost_s(trial) <= self.left_s

    def fits_with(self, trial: Trial, count: int) -> bool:
        """Return whether there is time for a trial and so many like it on all rows, if they are of use."""
        return TRIAL_SAFETY * (self.cost_s(trial) + self.refits_s(trial, count)) <= self.left_s

    @property
    def many_held_out(self) -> bool:
        """Return whether so many rows are held out that training on them as well is worth another run."""
        return self.all_rows >= MANY_HELD_OUT

    def averages_lora(self, trial: Trial) -> bool:
        """Return whether a trial is LoRA of low rank of a real model with many rows.

        It has seen almost all of them, so it joins the average of its runs on all rows. An average of two, at
        the rate of one run, ended .078 higher than one of three at up to twice that (docs/experiments.md).
        """
        return not self.tiny and not self.many_held_out and trial.arm in self.lora - self.single

    @property
    def averaged(self) -> frozenset[str]:
        """Return the arms of LoRA whose runs on all rows are averaged at a raised rate, of a real model."""
        return frozenset() if self.tiny else self.lora - self.single

    def gains(self, trial: Trial) -> bool:
        """Return whether several runs like a trial will be averaged at a raised rate."""
        return trial.arm in self.averaged and self.runs_left(replace(trial, refit=True), 2) == 2

    def refits(self, trial: Trial, count: int) -> int:
        """Return how many of `count` runs like a trial on all rows are of use: for its rows, and averages."""
        return min(count, int(self.many_held_out)) if trial.arm in self.single else count

    def runs_left(self, trial: Trial, count: int, least: float = 1.0) -> int:
        """Return how many of `count` runs like a trial there is time for, of those that are of use.

        The last one may be shorter, `least` times as long.
        """
        turns = max(0, int(self.left_s / (TRIAL_SAFETY * self.cost_s(trial)) + 1.0 - least))
        return min(self.refits(trial, count), turns * self.width)

    def refits_s(self, trial: Trial, count: int) -> float:
        """Return the seconds that `count` runs like a trial on all rows take, one a device at once."""
        turns = math.ceil(self.refits(trial, count) / self.width)
        return turns * self.cost_s(replace(trial, refit=True))

    def steps(self, trial: Trial) -> float:
        """Return the optimiser steps of a trial."""
        return trial.epochs * self.examples / trial.batch


def is_averaged(plan: Plan) -> bool:
    """Return whether several runs of a plan may end as one average.

    That is if their weights take so little room that all of them stay on disk. LoRA's factors are averaged
    one by one: all runs start at the same ones. The product of their means ends lower than the mean of the
    products (docs/experiments.md).
    """
    return 4 * plan.trained_parameters <= KEPT_BYTES


def is_ample(plan: Plan, own: Plan, label_tokens: int) -> bool:
    """Return whether LoRA may stand for a job's own plan, which trains matrices whole.

    It has at least as many weights as the training rows have label tokens: with fewer it is known to end
    higher than dense deltas (Schulman 2025, "LoRA Without Regret").
    """
    is_dense = any(one.method == "dense" for one in own.modules)
    return is_dense and plan.trained_parameters >= label_tokens


def is_low_rank(plan: Plan) -> bool:
    """Return whether a plan trains LoRA's factors of low rank and nothing else."""
    return all(one.method == "lora" and one.rank <= LOW_RANK for one in plan.modules)
