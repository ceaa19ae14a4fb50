"""A training run's state as a checkpoint: saved while training goes on, and restored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from msgspec.structs import replace

from shared.clock import TokenClock
from trainer_node.engine.damage.repair import restores_frozen
from trainer_node.engine.distributed.checkpoint_parts import Writer
from trainer_node.engine.distributed.sharding import local, own_rows
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.train.async_saver import size_of
from trainer_node.engine.train.checkpoint import Checkpoint, Position
from trainer_node.engine.train.disk_plan import CheckpointContent, Sizes
from trainer_node.engine.train.optimizer import MOMENTS, optimizer_tensors
from trainer_node.engine.train.rollback import load_trained
from trainer_node.engine.train.state import TrainState


def prepare_saver(state: TrainState) -> None:
    """Have memory for the copies that checkpoints are written from, and say if the disk is short."""
    if state.process_group.is_main:
        state.saver.make_room(sizes_of(state, over=False), export_bytes(state))
    prepare_copies(state)


def prepare_copies(state: TrainState) -> None:
    """Have memory for copies of what a checkpoint holds now, and of the moments that it will hold."""
    if not state.process_group.is_main and state.plan.parallel != "fsdp2":
        return
    parameters = own(state, state.deltas.state())
    counter = {"step": torch.zeros((), device=state.device)} if state.process_group.is_main else {}
    optimizer = {
        f"{name}/{key}": one
        for key, value in parameters.items()
        for name, one in {**counter, **dict.fromkeys(MOMENTS, value)}.items()
    }
    average = own(state, state.average.weights) if state.average else {}
    state.saver.prepare({"weights": parameters, "optimizer": optimizer, "average": average})


def save(state: TrainState, reporter: Reporter) -> None:
    """Begin a checkpoint of this moment; the same on any number of devices. Every process must call it.

    None is made of weights that are no longer numbers: what is on disk is better. Nor is one if the disk is
    full. After the last step the optimiser has done its work; without it, and with nothing left to change,
    the closing need not wait.
    """
    began, over = state.clock.time(), state.schedule.state.progress >= 1.0
    state.read_results()
    if not is_finite(state):
        reporter.message(f"the weights of step {state.step} are not finite: they are not saved")
        state.schedule.save_begun(began, 0.0)
        return
    content = make_room(state, over=over)
    if content is CheckpointContent.NOTHING:
        state.schedule.save_begun(began, state.clock.time() - began)
        return
    extras, average = content is not CheckpointContent.WEIGHTS, state.average
    # The state inside must say that this save was made: a resumed run's next is due as if it never stopped.
    state.schedule.save_begun(began, 0.0)
    position = position_of(state, averaged=average.count if average and extras else 0)
    state.since_save = (0.0, 0)
    optimizer: dict[str, torch.Tensor] = {}
    if extras and not over:
        optimizer = dict(optimizer_tensors(state.optimizer, state.deltas.parameters))
    tensors = {
        "weights": own(state, state.deltas.state()),
        "optimizer": own(state, optimizer),
        "average": own(state, average.weights) if average and extras else {},
    }
    frozen: dict[str, Mapping[str, torch.Tensor]] = {}
    if extras and (state.process_group.is_main or state.plan.parallel == "fsdp2"):
        frozen = {snapshot_name(step): weights for step, weights in state.snapshots.items()}
        frozen["best"] = state.best
    begin = partial(state.saver.begin, position, tensors, content=content, still=over, frozen=frozen)
    if state.plan.parallel != "fsdp2":
        if state.process_group.is_main:
            begin()
    elif (writer := writer_for(state, position.step)) is not None:
        begin(writer=writer)
    state.schedule.save_begun(began, state.clock.time() - began)


def own(state: TrainState, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what this process writes of some tensors: its rows of sharded ones, of others rank 0 all."""
    main = state.process_group.is_main
    return {name: local(one) for name, one in tensors.items() if main or local(one) is not one}


def writer_for(state: TrainState, step: int) -> Writer | None:
    """Collective: this process's part in writing a checkpoint; None if it can't be begun."""
    group = state.process_group
    folder = group.broadcast_object(state.saver.open(step) if group.is_main else None)
    return None if folder is None else Writer(group.rank, group.world, folder)


def restore(state: TrainState, found: Checkpoint) -> None:
    """Continue where a checkpoint stopped: weights, optimiser, average, cursor and clock."""
    load_trained(state, found)
    position = found.manifest.position
    state.curve, state.best, state.health = position.curve, held_here(state, found, "best"), position.health
    points = [point.step for point in position.curve.points]
    snapshots = {step: held_here(state, found, snapshot_name(step)) for step in points}
    state.snapshots = {step: weights for step, weights in snapshots.items() if weights}
    state.step = position.step - position.steps_before
    state.tokens, state.train_s = position.tokens, position.train_s
    state.packs.epoch, state.packs.index = position.epoch, position.pack
    if position.capacity not in (0, state.plan.capacity):  # its packs were others: as in `shrink`
        state.packs.epoch, state.packs.index = position.epoch + (position.pack > 0), 0
    if isinstance(state.clock, TokenClock):
        state.clock.tokens = position.clock_tokens


def held_here(state: TrainState, found: Checkpoint, group: str) -> dict[str, torch.Tensor]:
    """Return what this process holds of a group of weights in a checkpoint; empty without."""
    parameters = state.deltas.parameters
    return {name: own_rows(blocks, parameters[name]) for name, blocks in found.pieces(group).items()}


def snapshot_name(step: int) -> str:
    """Return the group of tensors that holds a snapshot in a checkpoint."""
    return f"snapshot-{step:08d}"


def is_finite(state: TrainState) -> bool:
    """Return whether all trained weights are numbers, in every process."""
    sums = torch.stack([local(weight.detach()).sum() for weight in state.deltas.parameters.values()])
    return float(state.process_group.total((~sums.isfinite()).any().float())) == 0.0


def position_of(state: TrainState, *, averaged: int) -> Position:
    """Return where training is, for a checkpoint whose average is of `averaged` weights."""
    loss_sum, steps = state.since_save
    return Position(
        step=state.steps_before + state.step,
        trial=state.trial,
        steps_before=state.steps_before,
        epoch=state.packs.epoch,
        pack=state.packs.index,
        tokens=state.tokens,
        clock_tokens=state.clock.tokens if isinstance(state.clock, TokenClock) else 0,
        train_s=state.train_s,
        averaged=averaged,
        capacity=state.plan.capacity,
        curve=state.curve,
        schedule=replace(state.schedule.state),  # it is written while training goes on
        loss=loss_sum / steps if steps else None,
        health=state.health,
    )


def make_room(state: TrainState, *, over: bool) -> CheckpointContent:
    """Collective: what the next checkpoint holds, as rank 0's disk allows."""
    content = CheckpointContent.WHOLE
    if state.process_group.is_main:
        content = state.saver.make_room(sizes_of(state, over=over), export_bytes(state))
    return CheckpointContent(int(state.process_group.broadcast_floats(content)[0]))


def sizes_of(state: TrainState, *, over: bool) -> Sizes:
    """Return the bytes of a checkpoint's parts, all shards together; no moments after the last step."""
    weights = size_of(state.deltas.parameters)
    average = weights if state.average and state.average.count else 0
    best = sum(map(size_of, (state.best, *state.snapshots.values())))
    if state.plan.parallel == "fsdp2":
        best *= state.process_group.world  # no process has more rows than rank 0
    return Sizes(weights=weights, moments=0 if over else len(MOMENTS) * weights, extras=average + best)


def export_bytes(state: TrainState) -> int:
    """Return the most bytes that are exported: a whole model in 16 bits, or fp32 factors."""
    restored = restores_frozen(state.plan.repair, set(state.deltas.parameters))
    if restored or any(module.method == "dense" for module in state.plan.modules):
        return 2 * sum(value.numel() for value in state.deltas.model.parameters())
    return 4 * sum(value.numel() for value in state.deltas.parameters.values())
