"""Measure the development rows during training; go back to the best weights when their loss has turned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from msgspec.structs import replace
from torch import Tensor

from trainer_node.engine.distributed.process_group import common_clock
from trainer_node.engine.distributed.sharding import load_rows, local
from trainer_node.engine.evaluate.metric import measure
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.train.dev_curve import LATEST_TURN, cooldown_tokens
from trainer_node.engine.train.state import TrainState


def measure_due(state: TrainState) -> bool:
    """Return whether to measure development rows before the next step: not in a cool-down or near the end."""
    schedule = state.schedule.state
    if state.dev is None or schedule.cooldown or schedule.progress > LATEST_TURN:
        return False
    trained_s = state.clock.time() - schedule.begun_at
    epoch_tokens = int(state.examples.lengths.sum())
    all_tokens = state.tokens / max(schedule.progress, 1e-9)  # as it looks now: time may end before the plan
    rule = state.plan.curve
    due = state.curve.due(state.tokens, epoch_tokens, all_tokens, rule)
    return due and state.curve.affordable(state.dev_s, trained_s, rule)


def measure_dev(state: TrainState, reporter: Reporter) -> None:
    """Add a point to the development curve; keep the best weights, or go back to them if it has turned."""
    assert state.dev is not None
    group = state.process_group
    (until,) = group.broadcast_floats(state.schedule.end_at)
    clock = common_clock(state.clock, group)
    began = clock.time()
    result, _ = measure(state.deltas.model, state.dev, clock, until, group, alive=state.alive)
    if len(result.per_example) < len(state.dev):  # time ran out
        state.dev = None
        return
    state.curve = state.curve.extended(state.step, state.tokens, result.per_example.tolist(), 0.0)
    reporter.losses(dev=result.loss)
    keep_lowest(state)
    state.dev_s = clock.time() - began
    state.curve = replace(state.curve, spent_s=state.curve.spent_s + state.dev_s)
    if state.curve.turned(state.plan.curve):
        cool_down(state, reporter)


def keep_lowest(state: TrainState) -> None:
    """Collective: copy the weights of a new lowest point to main memory, if there is room.

    A rule may want those of several of the lowest points: as many are kept as there is room for. Of sharded
    weights each process copies its rows; the one that holds the most bytes decides for all.
    """
    weights = {name: local(value) for name, value in state.deltas.state().items()}
    size = max(state.process_group.gather_objects(state.saver.memory.size_of(weights.values())))
    # Averages of snapshots are made by searches by probes alone, which have no sharded weights.
    wanted = 1 if state.plan.parallel == "fsdp2" else state.plan.curve.snapshots
    count = min(wanted, int(state.most_best_bytes / max(1, size)))
    steps = [point.step for point in state.curve.lowest(count)]
    if state.step not in steps:
        return
    if (count + 1) * size <= state.most_best_bytes:
        copy = copied(state, weights)
    else:
        copy = {name: value.to("cpu", copy=True) for name, value in weights.items()}
    if state.curve.is_at_best:
        state.best = copy
    if wanted > 1:
        state.snapshots = {
            step: kept for step, kept in {**state.snapshots, state.step: copy}.items() if step in steps
        }


def copied(state: TrainState, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy in main memory: in that of an earlier copy which is kept no longer, if there is one.

    The first use of memory costs ten times as much. A checkpoint that is still being written may have the
    earlier copy in it, which must not change then.
    """
    kept = {id(value) for held in (state.best, *state.snapshots.values()) for value in held.values()}
    taken = [memory for memory in state.copies if any(id(value) in kept for value in memory.values())]
    free = [memory for memory in state.copies if all(id(value) not in kept for value in memory.values())]
    if free and not state.saver.is_writing:
        memory = free[0]
    else:
        memory = state.saver.memory.like(weights)
        state.copies = [*taken, memory]
    for name, value in weights.items():
        memory[name].copy_(value, non_blocking=True)
    if any(value.is_cuda for value in weights.values()):
        torch.cuda.current_stream().synchronize()
    return dict(memory)  # a new one: what the checkpoint before has is linked if it is the same object


def cool_down(state: TrainState, reporter: Reporter) -> None:
    """End early: from the best weights the rate falls to its end, or training just ends."""
    best, last = state.curve.best, state.curve.points[-1]
    assert best is not None
    risen = "no number" if last.loss is None else f"{last.loss:.4f}"
    turn = f"the held-out loss rose from {best.loss:.4f} at step {best.step} to {risen} at step {last.step}"
    if not state.plan.curve.goes_back:
        state.schedule.cool_down(state.tokens, 1)
        reporter.message(f"{turn}: training ends")
        return
    if state.best:
        load_rows(state.deltas, state.best)
    if last.loss is None:  # so are the optimiser's moments
        state.optimizer.state.clear()
    if state.average is not None:
        state.average.reset()
    state.schedule.cool_down(state.tokens, cooldown_tokens(best))
    where = f"back to the weights of step {best.step}" if state.best else "on from here"
    reporter.message(f"{turn}: {where}, and the rate falls to zero early")
