"""How fast each method of a search trains: as measured; before that, as the planner compares the methods.

A step of dense deltas computes 6 FLOPs for each weight and token, one of LoRA 4. On a CPU a dense step takes
1.5 to 1.8 times as long, so the trials of each method are planned at a speed of their own.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from shared.planning.memory_fit import layout_of
from shared.planning.plan import Plan
from shared.planning.step_size import padding
from shared.planning.throughput import Rows, estimated_rate, flops_per_token
from trainer_node.engine import prepare
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.evaluate import base_states
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.search.strategy.budget import Speed
from trainer_node.engine.search.trial import SearchRecord

LEAST_SHARE = 0.1  # of the trials' time went into their tokens, however long steps seemed to take besides


def arm_speeds(known: SearchRecord, least_batch: float) -> dict[str, Speed]:
    """Return the speed of each arm: of its trials, or its steps that were timed, or as the plans compare.

    What was measured of other arms says how much faster all are than their plans expect.
    """
    expected = {arm: plan.expected_tokens_per_s for arm, plan in known.plans.items()}
    timed_arm = known.timed_arm or _first_arm(known)
    timed = Speed(known.tokens_per_s or expected[timed_arm], known.step_s)
    by_timed = {arm: timed.times(rate / expected[timed_arm]) for arm, rate in expected.items()}
    measured = {timed_arm: timed} if known.tokens_per_s else {}
    measured |= trained_speeds(known, {arm: speed.step_s for arm, speed in by_timed.items()}, least_batch)
    if not measured:
        return by_timed
    faster = sum(speed.tokens_per_s / expected[arm] for arm, speed in measured.items()) / len(measured)
    unknown = {arm: Speed(faster * rate, by_timed[arm].step_s) for arm, rate in expected.items()}
    return unknown | measured


def trained_speeds(known: SearchRecord, step_s: dict[str, float], least_batch: float) -> dict[str, Speed]:
    """Return the speed of each arm's trials, where a step takes `step_s` of the arm besides its tokens."""
    found = {}
    for arm in known.plans:
        done = [one for one in known.done if one.trial.arm == arm]
        all_s = sum(one.train_s for one in done)
        # An older version did not record steps: then what one takes besides its tokens is in the speed.
        besides_s = step_s[arm] if all(one.steps for one in done if one.tokens) else 0.0
        rows_s = max(LEAST_SHARE * all_s, all_s - sum(one.steps for one in done) * besides_s)
        devices = known.plans[arm].devices
        tokens = sum(
            one.tokens * padding(one.trial.batch, least_batch) * devices / (one.devices or devices)
            for one in done
        )
        if tokens and rows_s > 0:
            found[arm] = Speed(tokens / rows_s, besides_s)
    return found


def on_devices(known: SearchRecord, devices: int) -> SearchRecord:
    """Return the record with the speeds that so many devices have together, by what others had.

    The plans' own numbers of devices stay. Trials of an older version were run by these.
    """
    before = next(iter(known.plans.values())).devices
    plans = {
        arm: replace(plan, expected_tokens_per_s=plan.expected_tokens_per_s * devices / plan.devices)
        for arm, plan in known.plans.items()
    }
    done = [replace(one, devices=one.devices or before) for one in known.done]
    return replace(known, plans=plans, done=done, tokens_per_s=known.tokens_per_s * devices / before)


def _first_arm(known: SearchRecord) -> str:
    """Return the arm of the first trial, whose steps an older version timed; else the job's own."""
    begun = known.done[0].trial if known.done else known.trial
    return begun.arm if begun is not None and known.timed else next(iter(known.plans))


def estimate(run: RunContext, config: Any, data: JobData, plan: Plan) -> float:
    """Return the planner's tokens/s of a plan that is not compiled; two are compared, nothing else is."""
    shape, stats, hardware = model_shape(config), prepare.data_stats(data.train), run.job.hardware
    rows = Rows(stats.examples, stats.tokens / stats.examples, stats.label_tokens / stats.tokens)
    recompute = plan.activation_checkpointing
    flops = flops_per_token(shape, plan.modules, rows, checkpointing=recompute, extras=plan.extras)
    compared, device = base_states.wanted(run.job), run.process_group.device
    gain = prepare.recorded_gain(config, plan, data, hardware, device, divergence=compared)
    layout = layout_of(plan, cpu=hardware.device == "cpu")
    return estimated_rate(shape, layout, flops, hardware, recorded=gain > 1.0)
