"""What of a job's time is left for trials, and what is kept after the last one: for closing, and rounding."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from shared.messages.offers import TaskType
from shared.planning.plan import Plan
from shared.planning.profiles import resolve
from shared.planning.step_size import full_batch
from shared.planning.throughput import SLACK_S, Costs
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.evaluate import base_states
from trainer_node.engine.memory.main_memory import slot_memory
from trainer_node.engine.search.arm_speed import arm_speeds
from trainer_node.engine.search.strategy.budget import Budget, Speed, is_ample, is_averaged, is_low_rank
from trainer_node.engine.search.strategy.delta_factor import MOST_ROWS, PASSES
from trainer_node.engine.search.strategy.prior import is_tiny
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult

ROUND_SHARE = 0.01  # of the job's time is kept for rounding: SmolLM2-135M takes a minute on one busy CPU core
ROUND_MEMORY, MOST_ROUNDED_BYTES = 0.25, 16e9  # of main memory, and at most, for two copies of the weights
FACTORS_SHARE = 0.01  # of the job's time, at most, is kept for factors on the last run's delta


def budget_of(run: RunContext, record: RunRecord, known: SearchRecord, data: JobData) -> Budget:
    """Return what is left, at each method's speed. Every process must call it."""
    longest = int(data.train.lengths.max())
    own, first = next(iter(known.plans.items()))
    mean_length = record.train_tokens / record.train_examples
    least_batch = 1.0 if run.simulated else full_batch(first.devices, longest, mean_length)
    if run.simulated:  # a token takes as long with any method
        speeds = {own: Speed(run.job.token_clock_rate / known.width, known.step_s)}
    else:
        speeds = arm_speeds(known, least_batch)
    passes_s = PASSES * scored_s(record) if are_factors_scored(run) else 0.0
    setup_s = _other_s(record.costs, first)
    trials = [one for one in known.done if one.tokens and not one.trial.refit]
    others_s = [besides_s(one, first.devices, record.costs) for one in trials]
    refits = [
        besides_s(one, first.devices, record.costs) for one in known.done if one.tokens and one.trial.refit
    ]
    unscored = [
        max(0.0, seconds - passes_s * (one.factor is not None))
        for one, seconds in zip(trials, others_s, strict=True)
    ]
    lora = lora_arms(run, known)
    labels = data.train.label_tokens
    return Budget(
        left_s=end_at(run, record, known.plans.values()) - run.clock.time(),
        tokens_per_s=speeds[own].tokens_per_s,
        step_s=speeds[own].step_s,
        others={arm: speed for arm, speed in speeds.items() if arm != own},
        epoch_tokens=record.train_tokens,
        examples=record.train_examples,
        trial_s=0.0 if run.simulated else fmean(others_s or [setup_s + passes_s]),
        refit_s=0.0 if run.simulated else fmean(refits or unscored or [setup_s]),
        all_s=known.all_s,
        score_s=0.0 if run.simulated else record.costs.score_s,
        all_rows=all_rows(record, data),
        single=frozenset(arm for arm, plan in known.plans.items() if not is_averaged(plan)),
        lora=lora,
        ample=frozenset(arm for arm in lora if is_ample(known.plans[arm], first, labels)),
        least_batch=least_batch,
        devices=first.devices,
        width=known.width,
        pairs=run.job.task_type is TaskType.DPO,
        plain=not base_states.is_relative(run.job, data.train),
        tiny=is_tiny(first),
    )


def besides_s(result: TrialResult, devices: int, costs: Costs) -> float:
    """Return the seconds that a trial like this takes besides its steps, on so many devices.

    A trial that others ran scored the rows in another time.
    """
    there_s = costs.score_s * devices / (result.devices or devices)
    return max(0.0, result.other_s + costs.score_s - there_s)


def lora_arms(run: RunContext, known: SearchRecord) -> frozenset[str]:
    """Return the arms of LoRA of low rank; none for preference pairs.

    Tasks with a divergence end .016 lower with LoRA's averages, on the mean of eight. On pairs they end lower
    in two epochs, and higher in six (docs/experiments.md).
    """
    if run.job.task_type is TaskType.DPO:
        return frozenset()
    return frozenset(arm for arm, plan in known.plans.items() if is_low_rank(plan))


def averaged_arms(run: RunContext, known: SearchRecord) -> frozenset[str]:
    """Return the arms of LoRA whose runs on all rows are averaged at a raised rate; none of a tiny model."""
    if is_tiny(next(iter(known.plans.values()))):
        return frozenset()
    return frozenset(arm for arm in lora_arms(run, known) if is_averaged(known.plans[arm]))


def all_rows(record: RunRecord, data: JobData) -> float:
    """Return the tokens of training and development rows, as a multiple of the training rows'."""
    return 1.0 + int(data.dev.lengths.sum()) / record.train_tokens


def _other_s(costs: Costs, plan: Plan) -> float:
    """Return what a trial costs besides its steps, until one has shown it: to save, score, and begin again.

    Its last save has no moments and is at most half of others. Sharded weights may be read again after it.
    """
    again_s = costs.load_s if plan.parallel == "fsdp2" else 0.0
    return costs.score_s + costs.save_s / 2 + again_s + SLACK_S


def end_at(run: RunContext, record: RunRecord, plans: Iterable[Plan]) -> float:
    """Return when the last trial must be over: the closing reads the best one's weights again."""
    costs = record.costs
    end = run.job.ready_by - costs.closing_s - costs.load_s - 2 * SLACK_S - after_s(run, record, plans)
    return run.process_group.broadcast_floats(end)[0]  # only rank 0 learns what a save costs


def after_s(run: RunContext, record: RunRecord, plans: Iterable[Plan]) -> float:
    """Return the seconds that a search's closing takes longer than that of one run.

    Sharded weights are reset first; without a copy the base model is read again. Then the best ones are read
    and hashed: in fp32 they are up to twice the model's bytes.
    """
    plans = list(plans)
    sharded = any(plan.parallel == "fsdp2" for plan in plans)
    sharded_s = 2 * record.costs.load_s if sharded else 0.0
    return rounding_s(run, plans) + factors_s(run, record) + sharded_s


def factors_s(run: RunContext, record: RunRecord) -> float:
    """Return the seconds after the last trial in which it is scored at other factors on its delta."""
    if run.simulated or not are_factors_scored(run):
        return 0.0
    # The last weights and the lowest point's are scored, and then what is chosen.
    seconds = record.costs.score_s + 2 * PASSES * scored_s(record)
    return min(FACTORS_SHARE * (run.job.ready_by - run.job.start_at), seconds)


def scored_s(record: RunRecord) -> float:
    """Return the seconds of one pass over the rows by which a factor is judged."""
    return record.costs.score_s * min(1.0, MOST_ROWS / max(1, len(record.base_losses)))


def are_factors_scored(run: RunContext, trial: Trial | None = None) -> bool:
    """Return whether a job's trials, or this one, are scored at other factors on their deltas.

    Not of pairs, on which factors were never compared with rates; not where a profile's probes tell the rate;
    not a run on all rows, which has seen those that would score it.
    """
    by_profile = run.job.task_type is not TaskType.DPO and not resolve(run.job.profile).probes
    return by_profile and not (trial and trial.refit)


def rounding_s(run: RunContext, plans: Iterable[Plan]) -> float:
    """Return the seconds after the last trial in which the chosen weights are rounded."""
    if run.simulated or not any(is_rounded(run, plan) for plan in plans):
        return 0.0
    return ROUND_SHARE * (run.job.ready_by - run.job.start_at)


def is_rounded(run: RunContext, plan: Plan) -> bool:
    """Return whether weights that a plan trains are rounded by their inputs, if they are submitted.

    Only matrices that are trained whole, in bf16, by devices that each hold all of them, and of which main
    memory holds two copies in fp32.
    """
    dense = plan.parallel != "fsdp2" and all(module.method == "dense" for module in plan.modules)
    most = ROUND_MEMORY * slot_memory(run.job) / run.process_group.sharers
    fits = 2 * 4 * plan.trained_parameters <= min(most, MOST_ROUNDED_BYTES)
    return resolve(run.job.profile).rounds and dense and plan.dtype == "bfloat16" and fits
