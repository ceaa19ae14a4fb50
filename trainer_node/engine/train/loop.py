"""One readable loop: packs in, steps out, until the clock says that it is over.

A step is a pure function of the state at its start: packs by plan and cursor, random numbers by (seed, step),
rate by the schedule. So a run that resumes from a checkpoint repeats, bit for bit on a CPU, what was lost.
"""

from __future__ import annotations

import gc
import time
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from trainer_node.engine.data.packing import Packs, collate
from trainer_node.engine.data.token_noise import Noise
from trainer_node.engine.distributed.sharding import between, decoder_layers
from trainer_node.engine.memory.oom import release
from trainer_node.engine.model.compile import compile_layers
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop
from trainer_node.engine.train.development import measure_dev, measure_due
from trainer_node.engine.train.optimizer import apply_gradients, clip
from trainer_node.engine.train.rollback import go_back
from trainer_node.engine.train.saved_state import prepare_copies, prepare_saver, save
from trainer_node.engine.train.state import TrainState
from trainer_node.engine.train.step_results import begin_copy
from trainer_node.engine.train.weight_average import EVERY, TAIL


class Order(NamedTuple):
    """What every process does next: the first of these that is set, else a step at `rate`."""

    back: float  # to earlier weights, as training went wrong
    end: float
    save: float
    measure: float  # the development rows
    report: float  # first of all, say where training stands
    rate: float  # a share of its peak
    progress: float


def train(state: TrainState, reporter: Reporter, stop: Stop) -> None:
    """Step until progress is 1 or `stop` is asked; leaves a checkpoint of the last step in both cases.

    After progress 1 it may still be on its way to the disk: `state.saver.wait()`.
    """
    state.deltas.model.train()
    prepare_saver(state)
    last_saved, told = state.step, state.health.skipped
    while True:
        told = report_skipped(state, reporter, told)
        due = state.since_report[1] > 0 and (reporter.due() or state.step == 1)
        if written := state.saver.written():
            state.schedule.saved(written.seconds, written.cpu_s / state.cores if state.cores else 0.0)
        order = next_order(state, stop, report=due, unsaved=state.step > last_saved)
        if order.report:
            report(state, reporter)
        if order.back:
            state.read_results()
            go_back(state, reporter)
            continue
        if order.end:
            break
        if order.save:
            save(state, reporter)
            last_saved = state.step
            continue
        if order.measure:
            measure_dev(state, reporter)
            last_saved = -1  # a checkpoint of this step doesn't know the point, nor its weights
            continue
        if not timed_step(state, order.rate * state.health.rate_share, stop):
            break
    state.read_results()
    report_skipped(state, reporter, told)
    if state.since_report[1]:
        report(state, reporter)
    # A run that resumed and made no step has its checkpoint already.
    if state.saves and state.step > last_saved:
        save(state, reporter)
    if state.schedule.state.progress < 1.0:
        state.saver.wait()


def next_order(state: TrainState, stop: Stop, *, report: bool, unsaved: bool) -> Order:
    """Rank 0's decision, from its clock and its signals; `unsaved` says that steps were made since a save."""
    schedule = state.schedule
    order = Order(back=0, end=0, save=0, measure=0, report=report, rate=0, progress=schedule.state.progress)
    if state.process_group.is_main:
        now = state.clock.time()
        # First of all: whether a save is the last one must not depend on when somebody last looked.
        order = order._replace(progress=schedule.update(now, state.tokens, state.step))
        save_due = unsaved and state.saves and schedule.save_due(now)
        is_over = order.progress >= 1.0 or stop.asked
        if save_due or is_over:
            state.read_results()  # weights that went wrong a moment ago must be neither saved nor submitted
        if state.health.must_return:
            order = order._replace(back=1)
        elif save_due and not state.health.in_a_row:
            order = order._replace(save=1)
        elif is_over or state.health.is_hopeless:
            order = order._replace(end=1)
        elif measure_due(state):
            order = order._replace(measure=1)
        else:
            order = order._replace(rate=schedule.rate())
    order = Order(*state.process_group.broadcast_floats(*order))
    schedule.state.progress = order.progress
    return order


def report(state: TrainState, reporter: Reporter) -> None:
    """Report the progress; the loss is the mean over the steps since the last report, if there were any."""
    if not state.since_report[1]:  # rank 0 had read a result
        return
    loss, state.since_report = state.since_report[0] / state.since_report[1], (0.0, 0)
    now, rate = state.clock.time(), float(state.optimizer.param_groups[0]["lr"])
    progress = state.schedule.state.progress  # as all processes have agreed: each clock would give another
    if state.search_at is not None:  # people see how much of the job's time is used
        progress = (now - state.search_at) / max(1e-9, state.schedule.end_at - state.search_at)
    step, tokens = state.steps_before + state.step, state.tokens_before + state.tokens
    reporter.step(step, min(1.0, progress), tokens, loss, rate, state.schedule.eta_s(now))


def report_skipped(state: TrainState, reporter: Reporter, told: int) -> int:
    """Report the newest skipped step if there are more than `told`; return how many there are."""
    if state.health.skipped > told:
        reporter.skipped(state.health.skipped, state.skipped_step)
    return state.health.skipped


def timed_step(state: TrainState, rate: float, stop: Stop) -> bool:
    """Take one optimiser step, timed; return False if `stop` came first."""
    began, real = state.clock.time(), time.monotonic()
    if not one_step(state, rate, stop):
        return False
    now = state.clock.time()
    state.schedule.stepped(now - began)
    took = time.monotonic() - real
    state.train_s += took
    if not state.first_step:  # of this process: one that resumed compiles again
        state.first_step, state.first_s = state.step, took if state.plan.compile else 0.0
    elif state.step == state.first_step + 1 + state.lag:  # one that compiled counts as long as this one
        state.train_s -= max(0.0, state.first_s - took)
    if state.step == 1:
        if state.plan.compile:
            state.schedule.begin_again(now)
        gc.collect()
        gc.freeze()  # what lives now lives to the end: later collections needn't look at it
    return True


def one_step(state: TrainState, rate: float, stop: Stop) -> bool:
    """Take one optimiser step; return False if `stop` came between two packs: no step was taken.

    A step without a finite loss and gradient passes, too, but changes no weight. Its loss is read when the
    device has computed it (`TrainState.read_results`).
    """
    cursor, done = (state.packs.epoch, state.packs.index), False
    packs = state.packs.take(state.plan.packs_per_step)
    try:
        result = gradients(state, packs, stop)
        if result is None:
            return False
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        part, tokens = result
        total = state.process_group.total(part)
        norm = clip(state.deltas.parameters, state.plan.clip)
        apply_gradients(state.optimizer, skip=~(norm.isfinite() & total.isfinite()))
        state.results.append(begin_copy(state.step + 1, total, norm))
        state.read_results(leave=state.lag if state.step else 0)  # the first step is timed
        done = True
    finally:
        free_gradients(state)
        if not done:
            state.packs.epoch, state.packs.index = cursor
    state.step += 1
    state.tokens += tokens
    state.clock.advance(tokens)
    if state.average is not None and state.step % EVERY == 0 and state.schedule.state.progress >= TAIL:
        state.average.update()
        if state.average.count == 1 and state.device.type == "cuda":
            prepare_copies(state)  # 7 GB to be pinned would keep the next save waiting for seconds
    return True


def free_gradients(state: TrainState) -> None:
    """Free the gradients. DDP's stay, as zeros, if a step adds packs up: they are parts of its buckets.

    Without them the first of a step's packs would be given gradients of its own, next to the buckets: 4 bytes
    a weight more while a step adds packs up.
    """
    adds_up = isinstance(state.forward, DistributedDataParallel) and not state.forward.static_graph
    state.optimizer.zero_grad(set_to_none=not adds_up)


def gradients(state: TrainState, packs: list[list[int]], stop: Stop) -> tuple[torch.Tensor, int] | None:
    """Compute gradients of the mean over all examples of the step, pack by pack.

    Return this process's part of that loss, and the tokens of all. A process that isn't alone can't stop
    here: the others wait for it.
    """
    examples, tokens = sum(map(len, packs)), int(sum(state.examples.lengths[pack].sum() for pack in packs))
    total, mine = torch.zeros((), device=state.device), state.process_group.share(packs)
    forward = state.forward or state.deltas.model
    noise = Noise(state.plan.noise, state.seed, state.step) if state.plan.noise else None
    for turn, (number, indices, counts) in enumerate(mine):
        state.alive()
        if stop.asked and state.process_group.is_single:
            return None
        part = shared_out(state, indices, examples, noise)
        if part is None and state.recorded is not None:
            part = state.recorded.backward(state.examples, indices, examples, noise)
        if part is not None:
            total += part
            continue
        # Random numbers belong to a pack, not to a process: dropout is the same on any number of devices.
        torch.manual_seed(((state.seed * 1_000_003 + state.step) * 65_537 + number) % 2**63)
        batch = collate(state.examples, indices, state.plan.capacity, state.device, noise)
        with between(forward, last=turn == len(mine) - 1):
            loss = state.objective(forward, batch) / examples
            if not counts:
                loss = 0.0 * loss
            (loss * state.process_group.world).backward()  # DDP and FSDP2 take the mean over the processes
        total += loss.detach()
    return total, tokens


def shared_out(
    state: TrainState, indices: list[int], examples: int, noise: Noise | None
) -> torch.Tensor | None:
    """Compute a pack's gradients on several CPU threads; its loss, or None if that isn't possible."""
    if state.cpu_threads is None or state.plan.activation_checkpointing:
        return None
    return state.cpu_threads.backward(state.deltas, state.objective, state.examples, indices, examples, noise)


def shrink(state: TrainState) -> None:
    """Take over a smaller plan: what the failed step held is freed, and the cursor is put right.

    A pack plan of another capacity has other packs: unless it has just begun, the run goes on with the next
    epoch's.
    """
    state.read_results()
    state.optimizer.zero_grad(set_to_none=True)
    state.recorded = None
    release()
    if state.plan.activation_checkpointing:
        state.deltas.model.base.activation_checkpointing_enable()
        if state.plan.compile:
            compile_layers(decoder_layers(state.deltas.model), recomputed=True)
    if state.packs.capacity != state.plan.capacity:
        epoch = state.packs.epoch + (state.packs.index > 0)
        state.packs = Packs(
            state.packs.lengths, state.plan.capacity, state.seed, state.packs.max_examples, epoch
        )
