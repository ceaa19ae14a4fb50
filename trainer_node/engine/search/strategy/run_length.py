"""How long a run may be: by the time that is left, and by what is to follow it."""

from __future__ import annotations

from msgspec.structs import replace

from trainer_node.engine.search.strategy.budget import SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import MOST_EPOCHS, START_EPOCHS
from trainer_node.engine.search.trial import Trial, last_pass_of

FEWEST_EPOCHS = 1.5  # of a run that two on all rows follow
LEAST_MAIN = 0.001  # epochs of a run that takes the rest of the time
LAST_PASS_SHARE = 0.3  # of the time, at most, for a pass over the development rows after the main run


def whole_run(trial: Trial, budget: Budget, least: float = START_EPOCHS[0]) -> Trial | None:
    """Return the trial as long as leaves time for the run on all rows, if any; None below `least` epochs.

    Where many rows are held out it leaves time for two if each has FEWEST_EPOCHS: averaged, they are better
    than one that is longer, by .003 to .038 nat on five of five tasks (docs/experiments.md).
    """
    if is_run_twice(trial, budget):
        epochs = _epochs_before(trial, 2, budget)
        return replace(trial, epochs=min(START_EPOCHS[1], epochs), short=False)
    epochs = _epochs_before(trial, budget.refits(trial, 1), budget)
    return replace(trial, epochs=min(START_EPOCHS[1], epochs), short=False) if epochs >= least else None


def is_run_twice(trial: Trial, budget: Budget) -> bool:
    """Return whether two runs on all rows, to be averaged, are of use and fit after a trial like them."""
    if not budget.many_held_out or budget.refits(trial, 2) < 2:
        return False
    return _epochs_before(trial, 2, budget) >= FEWEST_EPOCHS


def main_run(trial: Trial, budget: Budget) -> Trial:
    """Return the run that takes the rest of the time, but for a pass over the development rows.

    Without time for all training rows there is no such pass: those that are left are new rows as well.
    """
    leaves_s = SAFETY * budget.cost_s(last_pass_of(trial)) if budget.all_rows > 1.0 else 0.0
    epochs = epochs_in(trial, budget, budget.left_s - leaves_s)
    if leaves_s > LAST_PASS_SHARE * budget.left_s or epochs < 1.0:
        # What follows the last run is not in what is left, and nothing comes before it.
        leaves_s, epochs = 0.0, epochs_in(trial, budget, budget.left_s + budget.trial_s)
    epochs = min(MOST_EPOCHS, max(LEAST_MAIN, epochs))
    return replace(trial, epochs=epochs, main=True, leaves_s=leaves_s)


def _epochs_before(trial: Trial, runs: int, budget: Budget) -> float:
    """Return the epochs of a trial that as many runs like it on all rows leave time for."""
    seconds = budget.left_s / SAFETY - (1 + runs) * budget.trial_s
    tokens = seconds * budget.tokens_per_s / budget.waste(trial)
    return tokens / (budget.epoch_tokens * (1.0 + runs * budget.all_rows))


def epochs_in(trial: Trial, budget: Budget, seconds: float) -> float:
    """Return the epochs of a trial that takes so many seconds, with what it costs besides its steps."""
    tokens = (seconds - budget.trial_s) * budget.tokens_per_s / budget.waste(trial)
    return tokens / budget.epoch_tokens
