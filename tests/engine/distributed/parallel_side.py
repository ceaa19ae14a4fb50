"""One process of test_sharding: a few steps of every kind of plan, weights and losses into a file."""

from __future__ import annotations

import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from shared.messages.hardware import Hardware
from shared.planning.model_shape import Extras
from shared.planning.throughput import Costs
from tests.engine import conftest
from tests.engine.distributed.export_side import exports_alike
from tests.engine.distributed.sharded_run import run_context
from trainer_node.engine.__main__ import leave
from trainer_node.engine.assemble import assemble
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.packing import Batch
from trainer_node.engine.distributed.process_group import destroy, join
from trainer_node.engine.distributed.sharding import fitted, gathered, load_rows, local, shard_frozen
from trainer_node.engine.distributed.weight_slices import without_weights
from trainer_node.engine.evaluate.candidates import Candidate
from trainer_node.engine.evaluate.metric import score
from trainer_node.engine.evaluate.moved_weights import moving, scaled
from trainer_node.engine.finish import lowest_point, reached_by
from trainer_node.engine.memory.oom import release
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.held_copies import copy_of
from trainer_node.engine.search.scoring import factor_of, scorer
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import checkpoint, loop, saved_state
from trainer_node.engine.train.development import cool_down, keep_lowest
from trainer_node.engine.train.optimizer import optimizer_tensors
from trainer_node.engine.train.rollback import go_back
from trainer_node.engine.train.state import TrainState

STEPS = 3
METHODS = {
    "bf16": ("bfloat16", "mixed"),
    "bf16-norms": ("bfloat16", "dense"),
    "bf16-everything": ("bfloat16", "dense"),
    "norms": ("float32", "dense"),
    "everything": ("float32", "dense"),
}


def main() -> None:
    """`parallel_side.py MODEL FILE`, as a rank."""
    torch.set_num_threads(1)
    process_group = join(Hardware(device="cpu", count=2, memory_bytes=2**34), 100.0)
    ways = ["single"] if process_group.is_single else ["ddp", "fsdp2"]
    kinds = ["lora", "dense", "mixed", "norms", "everything"] + (
        [] if process_group.is_single else ["bf16", "bf16-norms", "bf16-everything"]
    )
    examples = conftest._examples([9, 20, 33, 12, 40, 25, 7, 50, 31, 18])
    found = {}
    for way in ways:
        for kind in kinds:
            dtype, method = METHODS.get(kind, ("float32", kind))
            # Three packs for two processes: one has nothing to do in the second round.
            changes: dict[str, Any] = {
                "packs_per_step": 3,
                "max_epochs": 100.0,
                "dtype": dtype,
                "dropout": 0.1,
            }
            # Adam divides by a gradient's size: where that is next to nothing, rounding alone decides a step.
            changes |= {"lr_lora": 1e-5, "lr_dense": 1e-5} if dtype == "float32" else {}
            extras = Extras(
                norms=kind.endswith(("norms", "everything")),
                embeddings=kind.endswith("everything"),
                parameters=1,
            )
            changes |= {"extras": extras, "lr_norms": 1e-5, "lr_embeddings": 1e-5} if extras.norms else {}
            plan = fitted(conftest._plan(method, parallel=way, clip=0.5, **changes), process_group)
            folder = Path(tempfile.mkdtemp())
            record = RunRecord(
                fingerprint="",
                base_losses=[1.0],
                train_examples=len(examples),
                train_tokens=int(examples.lengths.sum()),
                dropped={},
                costs=Costs(),
            )
            run = run_context(sys.argv[1], folder, process_group)
            data = JobData(examples, examples, {}, 256)
            model = load_model(sys.argv[1], plan.dtype)
            training = assemble(run, record, plan, model, data, None)
            scores = torch.from_numpy(
                score(
                    training.deltas.model, examples, batch_tokens=60, process_group=process_group
                ).per_example
            )
            training.deltas.model.train()
            losses, start = list[torch.Tensor](), copy_of(training.deltas)
            buckets = gradient_memory(training)
            assert way != "ddp" or len(buckets) < len(training.deltas.parameters)
            for _ in range(STEPS):
                assert loop.one_step(training, 1.0, Stop())
                losses.append(torch.tensor(training.last_loss))
            assert way != "ddp" or gradients_are_in_buckets(training)
            assert way != "ddp" or gradient_memory(training) == buckets  # none was made next to them
            moved = moved_along(run, record, training, start)
            skip_and_go_back(training, run.reporter)
            if way == "fsdp2":
                shared = Path(process_group.broadcast_object(str(folder)))
                exports_alike(training.deltas, plan, run, shared)
            tensors = {
                **training.deltas.state(),
                **dict(optimizer_tensors(training.optimizer, training.deltas.parameters)),
            }
            found[f"{way}-{kind}"] = {
                **{name: value.clone() for name, value in gathered(tensors, process_group).items()},
                **moved,
                "losses": torch.stack(losses),
                "scores": scores,
                "tokens": torch.tensor(training.tokens),
                "skipped": torch.tensor(training.health.skipped),
            }
            return_to_lowest(training, run.reporter)
    if not process_group.is_single:
        group, empty = process_group, load_model(sys.argv[1], "float32")
        frozen = shard_frozen(without_weights(empty, "", group.rank, group.world), group)
        del empty
        score(frozen, examples, batch_tokens=60, process_group=process_group)
        gone = weakref.ref(frozen)
        del frozen
        release()  # it refers to itself: without this it stays in memory with the next one
        assert gone() is None
    if process_group.is_main:
        torch.save(found, sys.argv[2])
    destroy(process_group)


def gradients_are_in_buckets(training: TrainState) -> bool:
    """Return whether before each pack of a step all gradients are parts of DDP's buckets.

    What is next to them is 4 bytes a weight more.
    """
    found: list[bool] = []
    objective = training.objective
    cursor = training.packs.epoch, training.packs.index

    def looked(forward: torch.nn.Module, batch: Batch) -> torch.Tensor:
        gradients = [parameter.grad for parameter in training.deltas.parameters.values()]
        places = {None if one is None else one.untyped_storage().data_ptr() for one in gradients}
        found.append(None not in places and len(places) < len(gradients))
        return objective(forward, batch)

    training.objective = looked
    packs = training.packs.take(training.plan.packs_per_step)
    assert loop.gradients(training, packs, Stop()) is not None
    loop.free_gradients(training)
    training.objective = objective
    training.packs.epoch, training.packs.index = cursor
    return all(found)


def gradient_memory(training: TrainState) -> set[int]:
    """The memory that gradients are parts of."""
    gradients = [parameter.grad for parameter in training.deltas.parameters.values()]
    return {one.untyped_storage().data_ptr() for one in gradients if one is not None}


def moved_along(
    run: RunContext, record: RunRecord, training: TrainState, start: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Losses half of the way from the start, and the best factor; the weights are afterwards as before."""
    rows, deltas = training.examples, training.deltas
    measured = scorer(run, record, rows, training)
    last = Candidate("weights", reached_by(training)).measured(measured)
    before = {name: value.clone() for name, value in deltas.state().items()}
    half = scaled(before, start, 0.5, deltas.parameters)
    with moving(deltas, start) as move:
        move(0.5)
        assert all(torch.equal(local(value), local(half[name])) for name, value in deltas.state().items())
        losses = torch.from_numpy(measured().per_example)
    factor = factor_of(run, record, rows, training, start, last, len(rows))
    assert all(torch.equal(local(value), local(before[name])) for name, value in deltas.state().items())
    load_rows(deltas, start)
    assert all(torch.equal(local(value), start[name]) for name, value in deltas.state().items())
    deltas.load_state(before)
    assert factor is not None
    return {"half": losses, "factor": torch.tensor(factor)}


def skip_and_go_back(training: TrainState, reporter: Reporter) -> None:
    """One process has a gradient that is not finite: no weight changes in any, nor when all go back."""
    parameters, group, objective = training.deltas.parameters, training.process_group, training.objective
    before = {name: local(value.detach()).clone() for name, value in parameters.items()}
    saved_state.save(training, reporter)
    factor = float("nan") if group.rank == group.world - 1 else 1.0
    training.objective = lambda forward, batch: objective(forward, batch) * factor
    assert loop.one_step(training, 1.0, Stop())
    assert all(torch.equal(local(value.detach()), before[name]) for name, value in parameters.items())
    go_back(training, reporter)
    assert all(torch.equal(local(value.detach()), before[name]) for name, value in parameters.items())
    training.objective = objective


def return_to_lowest(training: TrainState, reporter: Reporter) -> None:
    """Go back from worse weights to those of the curve's lowest point, which a checkpoint has, too."""
    parameters = training.deltas.parameters

    def reach(loss: float) -> None:
        assert loop.one_step(training, 1.0, Stop())
        training.curve = training.curve.extended(training.step, training.tokens, [loss, loss], 0.0)
        keep_lowest(training)

    reach(1.0)
    lowest = copy_of(training.deltas)
    reach(2.0)
    assert not all(torch.equal(local(value.detach()), lowest[name]) for name, value in parameters.items())
    saved_state.save(training, reporter)
    training.saver.wait()
    folder = training.process_group.broadcast_object(training.saver.folder)  # rank 0 has waited for all parts
    found = checkpoint.load(folder / f"step-{training.step:08d}")
    cool_down(training, reporter)
    assert all(torch.equal(local(value.detach()), lowest[name]) for name, value in parameters.items())
    training.best = {}
    saved_state.restore(training, found)
    assert training.best.keys() == lowest.keys()
    assert all(torch.equal(value, lowest[name]) for name, value in training.best.items())
    point = lowest_point(training, None)
    assert point is not None
    with point.weights_applied():
        assert all(torch.equal(local(value.detach()), lowest[name]) for name, value in parameters.items())


if __name__ == "__main__":
    main()
    leave(0)
