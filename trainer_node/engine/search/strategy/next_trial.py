"""Which training run to try next, from those that were tried: pure, so that a resumed job decides alike.

The rate of each trial falls to zero within it, and the development rows score it. How a search goes on
depends on the time that there is:

- For a run of full length and one more on all rows: up to three short trials compare rates. Then each trial
  is of full length: the best of them is the centre from which the search goes on to its neighbours, coarse
  steps first. In the end the best one is run again on all rows, if it can be averaged in several orders.
- A tiny model's LoRA needs less: a trial of one epoch or more, and runs on all rows, all of them averaged.
- For less: still shorter trials (probes) compare rates, and one long run takes the time that is left, or a
  part of it if its loss turns.
- Too few steps to compare rates: two runs, the second one on all rows, or a single run.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer_node.engine.search.strategy.best_trial import is_long, is_probe, most_promising
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.first_trial import first_trial
from trainer_node.engine.search.strategy.full_length import last_pass, long_again, next_neighbour
from trainer_node.engine.search.strategy.probes import probe_or_main
from trainer_node.engine.search.strategy.refits import first_refit, next_refit
from trainer_node.engine.search.strategy.short_trials import rate_or_whole
from trainer_node.engine.search.trial import Trial, TrialResult


def next_trial(start: Sequence[Trial], done: Sequence[TrialResult], budget: Budget) -> Trial | None:
    """Return the next trial, or None if no further one is worth its time.

    `start` has the arms' first trials, the one of the job's own plan first. The first trial is always given.
    """
    if not done:
        return first_trial(start, budget)
    refits = [result for result in done if result.trial.refit]
    best = most_promising(done, budget.gains)
    if refits:
        if refits[-1].trial.last_pass:
            return None
        return next_refit(best, refits, done, budget) if best else None
    if all(result.trial.short for result in done):
        return rate_or_whole(done, budget)
    long = [result for result in done if is_long(result.trial)]
    if long and _is_lost(long, best, budget):
        return long_again(long, best, budget)
    if not long and not done[0].trial.short:
        return probe_or_main(done, budget)
    if trial := next_neighbour(best.trial if best else done[0].trial, best, start, done, budget):
        return trial
    if best is None:
        return None
    return first_refit(best, done, budget) or last_pass(best, done[-1], budget)


def _is_lost(long: Sequence[TrialResult], best: TrialResult | None, budget: Budget) -> bool:
    """Return whether the long runs gave no number, or only ones that are worse than a probe's.

    With a trial on each device the others of a round are not known yet.
    """
    if best is None:
        return budget.width == 1 or long[-1].trial.main
    return is_probe(best.trial) or all(result.loss is None for result in long)
