"""What a run does when memory runs out: step down to a plan that needs less, and write that down."""

from __future__ import annotations

from msgspec.structs import replace

from shared.planning.architectures import Batching
from shared.planning.plan import Deviation, Plan
from trainer_node.engine import context
from trainer_node.engine.context import RunContext
from trainer_node.engine.memory.oom import is_out_of_memory
from trainer_node.engine.train import loop
from trainer_node.engine.train.state import TrainState

OUT_OF_MEMORY = "memory ran out"


class SmallerPlan(Exception):
    """Memory ran out in one of several processes: a smaller plan is written down, all must start again.

    The others may be inside a collective that this one will never join: none of them can go on.
    """


def train_or_stop(run: RunContext, state: TrainState) -> bool:
    """Train to the end; False if the job was asked to stop. Both leave a checkpoint."""
    with run.stop.deferred():
        try:
            descend(run, state)
        except BaseException:
            state.saver.wait()  # the process ends without waiting for threads
            raise
        return not run.process_group.broadcast_object(run.stop.asked)


def descend(run: RunContext, state: TrainState) -> None:
    """Train; whenever memory runs out, step down by one rung. What is recorded of passes goes first."""
    while True:
        try:
            loop.train(state, run.reporter, run.stop)
            return
        except (RuntimeError, MemoryError) as error:
            shards = state.deltas.model.batching is Batching.PACKED
            smaller = step_down(state.plan, int(state.examples.lengths.max()), shards=shards)
            if not is_out_of_memory(error) or (smaller is None and state.recorded is None):
                raise
            text = str(error).strip().partition("\n")[0][:500] or "out of memory"
        if smaller is None or state.recorded is not None:
            run.reporter.message(f"out of memory, going on without recorded passes: {text}")
            loop.shrink(state)
            continue
        state.plan = replace(smaller, deviations=[*state.plan.deviations, _because(state.plan, smaller)])
        run.reporter.message(f"out of memory, going on with a smaller step: {text}")
        known = context.read_record(run.folder)
        if known and not run.process_group.others:  # those have plans of their own
            context.write_plan(run.folder, smaller_by(known[1], state.plan))
        if known and not run.process_group.is_single:
            raise SmallerPlan
        loop.shrink(state)


def smaller_by(plan: Plan, other: Plan) -> Plan:
    """Return the plan with the memory needs of another one."""
    return replace(
        plan,
        activation_checkpointing=other.activation_checkpointing,
        capacity=other.capacity,
        packs_per_step=other.packs_per_step,
        parallel=other.parallel,
        deviations=other.deviations,
    )


def step_down(plan: Plan, longest: int, *, shards: bool = True) -> Plan | None:
    """Return the next rung that needs less memory at the same batch; None below the last one.

    Recompute activations, then halve the packs as long as they hold the longest row, then cut the weights.
    Without `shards` they stay whole: a model in padded rows can't be trained over several devices.
    """
    if not plan.activation_checkpointing:
        return replace(plan, activation_checkpointing=True)
    if plan.pack_examples is None and plan.capacity // 2 >= longest:  # packs with a limit are the smallest
        return replace(plan, capacity=plan.capacity // 2, packs_per_step=2 * plan.packs_per_step)
    return replace(plan, parallel="fsdp2") if shards and plan.parallel == "ddp" else None


def was_too_large(plan: Plan) -> bool:
    """Return whether a plan was reduced because memory ran out: it must not be drawn again."""
    return any(deviation.reason == OUT_OF_MEMORY for deviation in plan.deviations)


def _because(old: Plan, new: Plan) -> Deviation:
    if old.parallel != new.parallel:
        return Deviation("parallel", old.parallel, new.parallel, OUT_OF_MEMORY)
    if old.capacity == new.capacity:
        return Deviation("activation checkpointing", "off", "on", OUT_OF_MEMORY)
    return Deviation("pack capacity", str(old.capacity), str(new.capacity), OUT_OF_MEMORY)
