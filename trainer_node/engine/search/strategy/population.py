"""Whether a search runs its trials side by side, one on each device, and which ones: pure.

Several devices share a step of 4 to 32 short examples badly: each has too little to compute, and all wait for
the gradients. One device per trial wastes nothing, but each trial takes longer, and those of one round are
chosen without knowing each other's losses.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from shared.planning.plan import Plan
from trainer_node.engine.search.strategy.budget import TRIAL_SAFETY, Budget
from trainer_node.engine.search.strategy.neighbours import START_EPOCHS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.trial import Trial, TrialResult, without_loss

LEAST_ROUNDS = 3  # two to search in, the second knowing the first's losses, and one on all rows


def is_population(start: Sequence[Trial], budget: Budget) -> bool:
    """Return whether one device, whose `budget` it is, has time for LEAST_ROUNDS trials of full length.

    Otherwise all devices train one trial after another together.
    """
    trial = replace(start[0], epochs=START_EPOCHS[0])
    rounds_s = (LEAST_ROUNDS - 1) * budget.cost_s(trial) + budget.cost_s(replace(trial, refit=True))
    return budget.width > 1 and TRIAL_SAFETY * rounds_s <= budget.left_s


def next_round(start: Sequence[Trial], done: Sequence[TrialResult], budget: Budget) -> list[Trial]:
    """Return the trials to run at once, at most one a device; none if no further one is worth its time.

    Each is the one that would be next if those before it had shown nothing: the best trial's neighbours in
    their order, or the best trial on all rows in several orders, never both.
    """
    chosen: list[Trial] = []
    while len(chosen) < budget.width:
        trial = next_trial(start, [*done, *map(without_loss, chosen)], budget)
        if trial is None or (chosen and trial.refit != chosen[0].refit):
            break
        chosen.append(trial)
    return chosen


def on_one_device(plan: Plan) -> Plan:
    """Return a plan whose devices each hold the whole model, as one of them carries it out alone."""
    return replace(
        plan,
        parallel="single",
        devices=1,
        expected_tokens_per_s=plan.expected_tokens_per_s / plan.devices,
    )


def give_up(checkpoints: Sequence[bool], starts: int, most: int, *, has_loss: bool) -> list[bool]:
    """Decide which trials of a round are given up at its next start, by whether each has a checkpoint.

    After `most` starts those without one are: they may be what ends the worker. If none has a checkpoint and
    no trial has a loss, there is nothing to go on with, and all are tried again.
    """
    hopeless = starts > most and (has_loss or any(checkpoints))
    return [hopeless and not found for found in checkpoints]
