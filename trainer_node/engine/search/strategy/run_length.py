"""How long a run may be: by the time that is left, and by what is to follow it."""

from __future__ import annotations

from msgspec.structs import replace

from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import MOST_EPOCHS, START_EPOCHS
from trainer_node.engine.search.trial import Trial, last_pass_of

# Of a run that two on all rows follow: averaged, they are better than one that is longer, by .003 to .038 nat
# on five of five tasks (docs/experiments.md). The prior's finer batches make them up to a sixth shorter.
FEWEST_EPOCHS = 1.5
# Of a tiny model's LoRA: a trial and two runs of 1.4 epochs, all averaged, end .003, .035 and .04 nat lower
# than a trial and one run of 2.2, in the same time (150 rows, docs/experiments.md).
FEWEST_TINY_EPOCHS = 1.0
LEAST_MAIN = 0.001  # epochs of a run that takes the rest of the time
LAST_PASS_SHARE = 0.3  # of the time, at most, for a pass over the development rows after the main run


def whole_run(trial: Trial, budget: Budget, least: float = START_EPOCHS[0]) -> Trial | None:
    """Return the trial as long as leaves time for the runs on all rows, if any; None below `least` epochs.

    If two will be averaged it is shorter than that, down to FEWEST_EPOCHS or FEWEST_TINY_EPOCHS.
    """
    runs = runs_after(trial, budget)
    epochs = _epochs_before(trial, runs, budget)
    if runs < 2 and epochs < least:
        return None
    return replace(trial, epochs=min(START_EPOCHS[1], epochs), short=False)


def runs_after(trial: Trial, budget: Budget) -> int:
    """Return how many runs on all rows follow such a trial: two to average if they fit, or one, or none."""
    is_lora = trial.arm in budget.lora
    fewest = FEWEST_TINY_EPOCHS if budget.tiny and is_lora else FEWEST_EPOCHS
    pays = (budget.many_held_out or budget.averages_lora(trial)) and budget.refits(trial, 2) == 2
    return 2 if pays and _epochs_before(trial, 2, budget) >= fewest else budget.refits(trial, 1)


def main_run(trial: Trial, budget: Budget) -> Trial:
    """Return the run that takes the rest of the time, but for a pass over the development rows.

    Without time for all training rows there is no such pass: those that are left are new rows as well.
    """
    leaves_s = _last_pass_s(trial, budget) if budget.all_rows > 1.0 else 0.0
    epochs = epochs_in(trial, budget, budget.left_s - leaves_s)
    if leaves_s > LAST_PASS_SHARE * budget.left_s or epochs < 1.0:
        # `left_s` excludes the closing already, and this run has no setup: the time of one is free.
        leaves_s, epochs = 0.0, epochs_in(trial, budget, budget.left_s + budget.trial_s)
    epochs = min(MOST_EPOCHS, max(LEAST_MAIN, epochs))
    return replace(trial, epochs=epochs, main=True, leaves_s=leaves_s)


def _last_pass_s(trial: Trial, budget: Budget) -> float:
    """Return the time of a last pass, and of the scores between it and the run's own end."""
    scores_s = max(0.0, budget.trial_s - budget.other_s(refit=True))
    return TRIAL_SAFETY * (budget.cost_s(last_pass_of(trial)) + scores_s)


def _epochs_before(trial: Trial, runs: int, budget: Budget) -> float:
    """Return the epochs of a trial that as many runs like it on all rows leave time for."""
    seconds = budget.left_s / TRIAL_SAFETY - budget.trial_s - runs * budget.other_s(refit=True)
    tokens = seconds * budget.speed(trial).tokens_per_s / budget.waste(trial)
    return tokens / (budget.epoch_tokens * (1.0 + runs * budget.all_rows))


def epochs_in(trial: Trial, budget: Budget, seconds: float) -> float:
    """Return the epochs of a trial that takes so many seconds, with what it costs besides its steps."""
    steps_s = seconds - budget.other_s(refit=trial.refit)
    return steps_s * budget.speed(trial).tokens_per_s / budget.waste(trial) / budget.epoch_tokens
