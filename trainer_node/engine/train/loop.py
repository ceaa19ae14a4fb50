"""One readable loop: packs in, steps out, until the clock says that it is over.

A step is a pure function of the state at its start: packs by plan and cursor, random numbers by (seed, step),
rate by the schedule. So a run that resumes from a checkpoint repeats, bit for bit on a CPU, what was lost.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from msgspec.structs import replace

from shared.clock import Clock, TokenClock
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate, pack
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.distributed.sharding import between, decoder_layers, gathered, local, placed
from trainer_node.engine.model.compile import compile_layers
from trainer_node.engine.model.loading import Deltas
from trainer_node.engine.objectives import Loss
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint, Position
from trainer_node.engine.train.cpu_threads import Lanes
from trainer_node.engine.train.oom import release
from trainer_node.engine.train.schedule import Schedule
from trainer_node.engine.train.weight_average import TAIL, TailAverage

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, in a checkpoint by these names


@dataclass
class Packs:
    """The run's packs in order, epoch after epoch; `epoch` and `index` say which comes next."""

    lengths: list[int]
    capacity: int
    seed: int
    max_examples: int | None = None
    epoch: int = 0
    index: int = 0
    _plan: tuple[int, list[list[int]]] | None = field(default=None, repr=False)

    def take(self, count: int) -> list[list[int]]:
        """The next `count` packs; moves on."""
        return [self._next() for _ in range(count)]

    def _next(self) -> list[int]:
        if self._plan is None or self._plan[0] != self.epoch:
            packs = pack(self.lengths, self.capacity, self.seed, self.epoch, self.max_examples)
            self._plan = (self.epoch, packs)
        packs = self._plan[1]
        chosen = packs[self.index]
        self.index += 1
        if self.index == len(packs):
            self.epoch, self.index = self.epoch + 1, 0
        return chosen


@dataclass
class Training:
    """All that changes while training, and what it needs to go on."""

    plan: Plan
    seed: int
    deltas: Deltas
    optimizer: torch.optim.Optimizer
    objective: Loss
    examples: Examples
    packs: Packs
    schedule: Schedule
    clock: Clock
    average: TailAverage | None
    saver: Saver
    device: torch.device
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0  # real seconds inside steps
    process_group: ProcessGroup = SINGLE_PROCESS
    forward: torch.nn.Module | None = None  # the deltas' model, or what is around it (parallel.spread)
    lanes: Lanes | None = None  # threads that a pack is shared out to
    alive: Callable[[], None] = lambda: None  # said at every pack: a step may take long
    cores: int = 0  # that both training and a save in its thread compute on
    since_save: tuple[torch.Tensor, int] = (torch.zeros(()), 0)  # sum of the losses, steps


class Order(NamedTuple):
    """What every process does next: `end`, or `save`, or else a step at `rate` (a share of its peak)."""

    end: float
    save: float
    report: float  # first of all, say where training stands
    rate: float
    progress: float


def train(run: Training, reporter: Reporter, stop: Stop) -> None:
    """Step until progress is 1 or `stop` is asked; leaves a checkpoint of the last step in both cases.

    After progress 1 it may still be on its way to the disk: `run.saver.wait()`.
    """
    run.deltas.model.train()
    if run.process_group.is_main and run.plan.parallel != "fsdp2":
        parameters = run.deltas.parameters
        will_be = {f"{name}/{key}": value for key, value in parameters.items() for name in MOMENTS}
        run.saver.prepare({"weights": run.deltas.state(), "optimizer": will_be})
    loss_sum, losses, begun, saved = torch.zeros((), device=run.device), 0, run.step, -1
    while True:
        due = losses > 0 and (reporter.due() or run.step == 1)
        if written := run.saver.written():
            run.schedule.saved(written.seconds, written.cpu_s / run.cores if run.cores else 0.0)
        order = next_order(run, stop, report=due, unsaved=run.step > max(begun, saved))
        if order.report:  # reading the loss waits for the device: not every step
            report(run, reporter, float(run.process_group.total(loss_sum)) / losses)
            loss_sum, losses = torch.zeros_like(loss_sum), 0
        if order.end:
            break
        if order.save:
            save(run, reporter)
            saved = run.step
            continue
        began, real = run.clock.time(), time.monotonic()
        loss = one_step(run, order.rate, stop)
        if loss is None:
            break
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)  # else only the launching is timed
        run.schedule.stepped(run.clock.time() - began)
        run.train_s += time.monotonic() - real
        loss_sum, losses = loss_sum + loss, losses + 1
        run.since_save = (run.since_save[0] + loss, run.since_save[1] + 1)
        if run.step == 1:
            gc.collect()
            gc.freeze()  # what lives now lives to the end: later collections needn't look at it
    if losses:
        report(run, reporter, float(run.process_group.total(loss_sum)) / losses)
    if run.step > max(begun, saved):  # a run that resumed and made no step has its checkpoint already
        save(run, reporter)
    if run.schedule.pulse.progress < 1.0:
        run.saver.wait()


def next_order(run: Training, stop: Stop, *, report: bool, unsaved: bool) -> Order:
    """Rank 0's decision, from its clock and its signals; `unsaved` says that steps were made since a save."""
    schedule = run.schedule
    order = Order(end=0, save=0, report=report, rate=0, progress=schedule.pulse.progress)
    if run.process_group.is_main:
        now = run.clock.time()
        # First of all: whether a save is the last one must not depend on when somebody last looked.
        order = order._replace(progress=schedule.update(now, run.tokens))
        if unsaved and schedule.save_due(now):
            order = order._replace(save=1)
        elif order.progress >= 1.0 or stop.asked:
            order = order._replace(end=1)
        else:
            order = order._replace(rate=schedule.rate())
    order = Order(*run.process_group.broadcast_floats(*order))
    schedule.pulse.progress = order.progress
    return order


def report(run: Training, reporter: Reporter, loss: float) -> None:
    """Where training stands; `loss` is the mean over the steps since the last report."""
    now, rate = run.clock.time(), float(run.optimizer.param_groups[0]["lr"])
    progress = run.schedule.pulse.progress  # as all processes have agreed: each clock would tell another
    reporter.step(run.step, progress, run.tokens, loss, rate, run.schedule.eta_s(now))


def one_step(run: Training, rate: float, stop: Stop) -> torch.Tensor | None:
    """One optimiser step; its loss, or None if `stop` came between two packs: then the step never was."""
    cursor, done = (run.packs.epoch, run.packs.index), False
    packs = run.packs.take(run.plan.packs_per_step)
    try:
        result = gradients(run, packs, stop)
        if result is None:
            return None
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        torch.nn.utils.clip_grad_norm_(list(run.deltas.parameters.values()), run.plan.clip)  # over all shards
        run.optimizer.step()
        done = True
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        if not done:
            run.packs.epoch, run.packs.index = cursor
    loss, tokens = result
    run.step += 1
    run.tokens += tokens
    run.clock.advance(tokens)
    if run.average is not None and run.schedule.pulse.progress >= TAIL:
        run.average.update()
    return loss


def gradients(run: Training, packs: list[list[int]], stop: Stop) -> tuple[torch.Tensor, int] | None:
    """Gradients of the mean over all examples of the step, pack by pack.

    Returns this process's part of that loss, and the tokens of all. A process that isn't alone can't stop
    here: the others wait for it.
    """
    examples, tokens = sum(map(len, packs)), int(sum(run.examples.lengths[pack].sum() for pack in packs))
    total, mine = torch.zeros((), device=run.device), run.process_group.share(packs)
    forward = run.forward or run.deltas.model
    for turn, (number, indices, counts) in enumerate(mine):
        run.alive()
        if stop.asked and run.process_group.is_single:
            return None
        if run.lanes is not None and not run.plan.activation_checkpointing:
            shared = run.lanes.backward(run.deltas, run.objective, run.examples, indices, examples)
            if shared is not None:
                total += shared
                continue
        # Random numbers belong to a pack, not to a process: dropout is the same on any number of devices.
        torch.manual_seed(((run.seed * 1_000_003 + run.step) * 65_537 + number) % 2**63)
        batch = collate(run.examples, indices, run.plan.capacity, run.device)
        with between(forward, last=turn == len(mine) - 1):
            loss = run.objective(forward, batch) / examples
            if not counts:
                loss = 0.0 * loss
            (loss * run.process_group.world).backward()  # DDP and FSDP2 take the mean over the processes
        total += loss.detach()
    return total, tokens


def make_optimizer(deltas: Deltas, plan: Plan) -> torch.optim.Optimizer:
    """AdamW in one fused kernel; each group's rate is its `peak` times the schedule's multiplier."""
    groups = [{**group, "peak": group["lr"]} for group in deltas.param_groups(plan)]
    return torch.optim.AdamW(groups, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)


def shrink(run: Training) -> None:
    """Take over a smaller plan: what the failed step held is freed, and the cursor is put right.

    A pack plan of another capacity has other packs: unless it has just begun, the run goes on with the next
    epoch's.
    """
    run.optimizer.zero_grad(set_to_none=True)
    release()
    if run.plan.activation_checkpointing:
        run.deltas.model.base.activation_checkpointing_enable()
        if run.plan.compile:
            compile_layers(decoder_layers(run.deltas.model), recomputed=True)
    if run.packs.capacity != run.plan.capacity:
        epoch = run.packs.epoch + (run.packs.index > 0)
        run.packs = Packs(run.packs.lengths, run.plan.capacity, run.seed, run.packs.max_examples, epoch)


def save(run: Training, reporter: Reporter) -> None:
    """Begin a checkpoint of this moment; the same on any number of devices. Every process must call it.

    None is made of weights that are no longer numbers: what is on disk is better. After the last step the
    optimiser has done its work; without it, and with nothing left to change, the closing need not wait.
    """
    began, over = run.clock.time(), run.schedule.pulse.progress >= 1.0
    if not is_finite(run):
        reporter.message(f"the weights of step {run.step} are not finite: they are not saved")
        run.schedule.save_begun(began, 0.0)
        return
    loss_sum, steps = run.since_save
    run.since_save = (torch.zeros_like(loss_sum), 0)
    # The pulse inside must say that this save was made: a resumed run's next is due as if it never stopped.
    run.schedule.save_begun(began, 0.0)
    position = Position(
        step=run.step,
        epoch=run.packs.epoch,
        pack=run.packs.index,
        tokens=run.tokens,
        clock_tokens=run.clock.tokens if isinstance(run.clock, TokenClock) else 0,
        train_s=run.train_s,
        averaged=run.average.count if run.average else 0,
        capacity=run.plan.capacity,
        pulse=replace(run.schedule.pulse),  # it is written while training goes on
        loss=float(run.process_group.total(loss_sum)) / steps if steps else None,
    )
    optimizer = {} if over else dict(_optimizer_tensors(run.optimizer, run.deltas.parameters))
    tensors = {
        "weights": gathered(run.deltas.state(), run.process_group),
        "optimizer": gathered(optimizer, run.process_group),
        "average": gathered(run.average.weights, run.process_group) if run.average else {},
    }
    if run.process_group.is_main:
        run.saver.begin(position, tensors, still=over)
    run.schedule.save_begun(began, run.clock.time() - began)


def is_finite(run: Training) -> bool:
    """Whether all trained weights are numbers, in every process."""
    sums = torch.stack([local(weight.detach()).sum() for weight in run.deltas.parameters.values()])
    return float(run.process_group.total((~sums.isfinite()).any().float())) == 0.0


def restore(run: Training, found: Checkpoint) -> None:
    """Continue where a checkpoint stopped: weights, optimiser, average, cursor and clock."""
    parameters = run.deltas.parameters
    weights = found.tensors("weights").items()
    run.deltas.load_state({name: placed(value, parameters[name]) for name, value in weights})
    moments = found.tensors("optimizer")
    for key, tensor in moments.items():
        field_name, name = key.split("/", 1)
        parameter = parameters[name]
        # Fused AdamW wants its step counter in fp32 next to the weights.
        run.optimizer.state[parameter][field_name] = (
            placed(tensor, parameter) if tensor.shape else tensor.to(parameter.device, copy=True)
        )
    position = found.manifest.position
    if run.average is not None:
        run.average.count = position.averaged
        run.average.weights = {
            name: placed(value, parameters[name]) for name, value in found.tensors("average").items()
        }
    run.step, run.tokens, run.train_s = position.step, position.tokens, position.train_s
    run.packs.epoch, run.packs.index = position.epoch, position.pack
    if position.capacity not in (0, run.plan.capacity):  # its packs were others: as in `shrink`
        run.packs.epoch, run.packs.index = position.epoch + (position.pack > 0), 0
    if isinstance(run.clock, TokenClock):
        run.clock.tokens = position.clock_tokens


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in parameters.items():
        for field_name, value in optimizer.state.get(parameter, {}).items():
            yield f"{field_name}/{name}", value
