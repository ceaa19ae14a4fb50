"""Assemble a training run: weights, optimiser, packs, schedule, saver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace

from shared.files import write_atomically
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.runs import Phase, WorkerJob
from shared.planning.architectures import Batching
from shared.planning.hardware import usable_memory
from shared.planning.plan import Plan
from shared.planning.throughput import Costs
from trainer_node.engine import context
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.damage.repair import undo_scaling, unscaled
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Packs
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.distributed.sharding import spread, untrained
from trainer_node.engine.distributed.turns import first_then_others, weighed
from trainer_node.engine.distributed.weight_slices import slices_of, without_weights
from trainer_node.engine.memory import main_memory
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.attention import choose_kernels, max_documents, slower_because
from trainer_node.engine.model.compile import missing_compiler
from trainer_node.engine.model.hub_weights import fetch_weights
from trainer_node.engine.model.loading import load_model, load_unread
from trainer_node.engine.model.recorded_pass import recorded_pass_for
from trainer_node.engine.model.shape import heads_of
from trainer_node.engine.objectives import loss_for
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.cpu_threads import cpu_threads_for
from trainer_node.engine.train.optimizer import make_optimizer
from trainer_node.engine.train.saved_state import restore
from trainer_node.engine.train.schedule import Schedule, ScheduleState, Shape
from trainer_node.engine.train.state import TrainState
from trainer_node.engine.train.weight_average import TailAverage

AVERAGE_SHARE = 0.1  # of a device's memory: the running average is kept if it takes no more


@dataclass(frozen=True)
class Adapted:
    """A model with what the plan trains added to it."""

    plan: Plan  # as it is carried out here
    deltas: Deltas
    forward: torch.nn.Module | None  # the model, wrapped if several processes train
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Place:
    """Position of a training run among the trials of a job; a job without a search has one."""

    trial: int = 0
    steps_before: int = 0
    tokens_before: int = 0
    seed: int = 0  # added to the job's
    search_at: float | None = None  # when the search began
    saves: bool = True  # whether checkpoints are made
    keeps_losses: bool = False  # of every step, to judge the trial by
    leaves_s: float = 0.0  # of the job's time, for what comes after it
    curve: bool = True  # the development rows are measured during training: they are not trained on


ONLY = Place()


def load_base(run: RunContext, plan: Plan, *, whole: bool = False) -> torch.nn.Module:
    """Collective: the base model in the plan's dtype, repaired, on its device.

    One that will be sharded has no weights yet, only where they are read (`weight_slices.without_weights`).
    `whole`: this process alone loads it, with all weights, in main memory.
    """
    run.reporter.phase(Phase.LOADING)
    path, dtype = run.job.model_path, getattr(torch, plan.dtype)
    group = SINGLE_PROCESS if whole else run.process_group

    def fetch() -> None:
        if not group.is_main or (download := fetch_weights(path)) is None:
            return
        file = run.folder / "download.json"
        try:
            write_atomically(file, encode(download))
        except OSError as error:  # only gateways plan with it: the run needs no such file
            what = f"{file} can't be written ({error.strerror}): gateways don't learn how fast the model came"
            run.reporter.message(f"{what}; free or repair that disk, which checkpoints need, too")

    def load() -> tuple[torch.nn.Module, int]:
        if plan.parallel != "fsdp2" or whole:
            model, size = weighed(lambda: load_model(path, dtype))
            undo_scaling(model, plan.repair)
            return model.to(group.device), size
        model, size = weighed(lambda: load_unread(path, dtype))
        return without_weights(model, path, group.rank, group.world, dtype), size

    with run.patience():
        fetch()
        model = first_then_others(group, load)
        if slower := slower_because(choose_kernels(model.config, group.device)):
            run.reporter.message(slower)
    return model


def adapt(run: RunContext, plan: Plan, model: torch.nn.Module, *, fixed_steps: bool = True) -> Adapted:
    """Add what the plan trains to the model, which must be on its device; one to be sharded has no weights.

    Without `fixed_steps`, later plans may have another number of packs per step.
    """
    if plan.compile and (missing := missing_compiler(run.process_group.device)):
        plan = replace(plan, compile=False)
        run.reporter.message(f"layers are not compiled: that needs {missing}, which is not installed here")
    if plan.parallel == "fsdp2" and slices_of(model) is None:
        group = run.process_group
        without_weights(model, run.job.model_path, group.rank, group.world, getattr(torch, plan.dtype))
    heads, head_dim = heads_of(model.config)
    deltas = add_deltas(model, plan, run.job.seed)
    if deltas.model.batching is Batching.PADDED:
        run.reporter.message("this model's documents can't share a row: each has one of its own, padded")
        plan = replace(plan, compile=False)  # each batch has another shape, and each would be compiled
    deltas, forward = spread(
        deltas,
        plan,
        run.process_group,
        seed=run.job.seed,
        slices=unscaled(slices_of(model), plan.repair, getattr(torch, plan.dtype)),
        fixed_steps=fixed_steps,
    )
    return Adapted(plan, deltas, forward, heads, head_dim)


def assemble(
    run: RunContext,
    record: RunRecord,
    plan: Plan,
    model: torch.nn.Module,
    data: JobData,
    found: Checkpoint | None,
) -> TrainState:
    """Return all parts of training, new or as in the checkpoint."""
    adapted = adapt(run, plan, model)
    return make_state(run, record, adapted, data, found, make_saver(run, record, [plan]))


def make_packs(adapted: Adapted, train: Examples, seed: int) -> Packs:
    """Return the packs of all epochs, none with more documents than attention can take or the plan wants."""
    plan = adapted.plan
    most = max(1, max_documents(plan.capacity, adapted.heads, adapted.head_dim) // train.group)
    return Packs(train.lengths.tolist(), plan.capacity, seed, min(most, plan.pack_examples or most))


def make_state(
    run: RunContext,
    record: RunRecord,
    adapted: Adapted,
    data: JobData,
    found: Checkpoint | None,
    saver: Saver,
    place: Place = ONLY,
) -> TrainState:
    """Return the state of a training run whose weights are in the model, or in the checkpoint."""
    plan, deltas, job, group = adapted.plan, adapted.deltas, run.job, run.process_group
    dev = curve_rows(plan, record, data) if place.curve else None
    packs = make_packs(adapted, data.train, job.seed + place.seed)
    objective = loss_for(job.task_type)
    state = TrainState(
        plan=plan,
        seed=job.seed + place.seed,
        deltas=deltas,
        optimizer=make_optimizer(deltas, plan),
        objective=objective,
        examples=data.train,
        packs=packs,
        schedule=make_schedule(run, record, plan, found, place),
        clock=run.own_clock,
        average=make_average(run, plan, deltas),
        saver=saver,
        device=group.device,
        process_group=group,
        forward=adapted.forward,
        cpu_threads=cpu_threads_for(plan, deltas, torch.get_num_threads()),
        recorded=recorded_pass_for(plan, deltas, objective, data.train, packs),
        alive=run.reporter.alive,
        lag=1 if group.device.type == "cuda" and not run.simulated else 0,
        dev=dev or None,
        dev_s=record.costs.score_s * len(dev or ()) / len(record.base_losses),
        most_best_bytes=main_memory.most_for_copy(job) / group.sharers,
        cores=0 if run.simulated or group.device.type != "cpu" else torch.get_num_threads(),
        trial=place.trial,
        steps_before=place.steps_before,
        tokens_before=place.tokens_before,
        search_at=place.search_at,
        saves=place.saves,
        step_losses=[] if place.keeps_losses else None,
        untrained=partial(untrained_weights, run, plan, deltas),
    )
    if found:
        restore(state, found)
    return state


def untrained_weights(run: RunContext, plan: Plan, deltas: Deltas) -> dict[str, torch.Tensor]:
    """Return what the plan trains as it is before the first step, read from the base model again."""
    if plan.parallel == "fsdp2":
        slices = unscaled(slices_of(deltas.model.base), plan.repair, getattr(torch, plan.dtype))
        assert slices is not None
        return untrained(deltas, run.process_group, slices, run.job.seed)
    model = load_model(run.job.model_path, getattr(torch, plan.dtype))
    undo_scaling(model, plan.repair)
    return add_deltas(model, plan, run.job.seed).state()


def make_schedule(
    run: RunContext, record: RunRecord, plan: Plan, found: Checkpoint | None, place: Place
) -> Schedule:
    """Make the schedule of a training run, new or as in the checkpoint."""
    begun_at = run.clock.time()
    # A later trial has the earlier ones on disk: its first save may wait for the usual interval.
    state = ScheduleState(begun_at=begun_at, saved_at=begun_at if place.trial else None)
    if found:
        state = found.manifest.position.schedule
    # After a search the best trial's weights are read again.
    reading_s = 0.0 if place.search_at is None else record.costs.load_s
    ending = replace(run.job, ready_by=run.job.ready_by - reading_s - place.leaves_s)
    return schedule_for(ending, plan, state, record.costs, record.train_tokens)


def make_average(run: RunContext, plan: Plan, deltas: Deltas) -> TailAverage | None:
    """Make the running average of the weights; None, with a message, if it takes too much memory.

    Where snapshots are kept, these are averaged instead.
    """
    if plan.curve.snapshots > 1:
        return None
    trained = sum(value.numel() for value in deltas.parameters.values())
    if plan.parallel == "fsdp2":
        trained //= run.process_group.world
    if averages(plan, 4 * trained, run.job.hardware):
        return TailAverage(deltas.parameters)
    run.reporter.message("no average of the weights is kept: it would take too much memory")
    return None


def make_saver(run: RunContext, record: RunRecord, plans: Iterable[Plan] = ()) -> Saver:
    """Collective: make the writer of the run's checkpoints, by one of these plans.

    Of a group rank 0 alone writes, unless the weights are sharded.
    """
    group = run.process_group
    sharers = 1 + group.others
    writers = group.world if any(plan.parallel == "fsdp2" for plan in plans) else 1
    (most,) = group.broadcast_floats(main_memory.most_for_checkpoints(run.job))  # other ranks find less free
    return Saver(
        run.checkpoints,
        record.fingerprint,
        context.versions(),
        most_bytes=most / sharers / writers,
        timer=(lambda: 0.0) if run.simulated else run.own_clock.time,
        report=run.reporter.message,
        sharers=sharers,
    )


def curve_rows(plan: Plan, record: RunRecord, data: JobData) -> Examples:
    """Return the development rows that are measured during training."""
    return data.dev.take(np.arange(min(plan.curve.rows, len(record.base_losses))))


def averages(plan: Plan, size: int, hardware: Hardware) -> bool:
    """Return whether a running average of `size` bytes fits in memory next to all that was planned."""
    fits = plan.memory_bytes + size <= usable_memory(hardware)
    return fits and size <= AVERAGE_SHARE * hardware.memory_bytes


def schedule_for(
    job: WorkerJob, plan: Plan, state: ScheduleState, costs: Costs, train_tokens: int
) -> Schedule:
    """Return the schedule of a job, which ends at its `ready_by`."""
    return Schedule(
        state,
        costs,
        start_at=job.start_at,
        ready_by=job.ready_by,
        max_tokens=plan.max_epochs * train_tokens,
        shape=Shape(plan.warmup, plan.decay, plan.rate_floor),
        expected_steps=plan.expected_steps,
        interval_s=job.checkpoint_interval_s,
        most_steps=plan.most_steps,
    )
