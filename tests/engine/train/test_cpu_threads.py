"""A pack on several threads has the gradients of a pack on one, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.messages.offers import TaskType
from shared.planning.plan import Plan
from tests.engine.step_state import step_state
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.metric import reference_logprobs
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import loss_for
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop
from trainer_node.engine.train.cpu_threads import CpuThreads, cpu_threads_for

LENGTHS = [9, 30, 4, 17, 12, 25, 7, 14, 11, 6, 22, 8, 19, 5, 10, 16]
Gradients = tuple[float, list[Tensor]]


@pytest.fixture
def make_deltas(tiny_model: Path, make_plan: Callable[..., Plan]) -> Callable[..., Deltas]:
    def _deltas(method: str = "lora", dtype: str = "float32") -> Deltas:
        deltas = add_deltas(load_model(str(tiny_model), dtype), make_plan(method, dtype=dtype), seed=3)
        random = torch.Generator().manual_seed(1)
        for parameter in deltas.parameters.values():
            parameter.data.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=random))
        deltas.model.train()
        return deltas

    return _deltas


@pytest.fixture
def threads() -> Iterator[int]:
    """Two in OpenMP and MKL, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def _step(
    deltas: Deltas,
    rows: Examples,
    task_type: TaskType,
    plan: Plan,
    cpu_threads: CpuThreads | None,
    packs: int = 1,
) -> Gradients:
    """The loop's own gradients of a step of `packs` packs."""
    run = step_state(plan, deltas, rows, objective=loss_for(task_type), cpu_threads=cpu_threads)
    size = len(rows) // packs
    found = loop.gradients(run, [list(range(i * size, (i + 1) * size)) for i in range(packs)], Stop())
    assert found is not None
    gradients = [parameter.grad for parameter in deltas.parameters.values()]
    for parameter in deltas.parameters.values():
        parameter.grad = None
    return float(found[0]), gradients


@pytest.mark.parametrize("task_type", [TaskType.INSTRUCT, TaskType.DPO])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_gradients_are_those_of_one_thread(
    dtype: str,
    tolerance: float,
    task_type: TaskType,
    make_deltas: Callable[..., Deltas],
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    tiny_model: Path,
    threads: int,
) -> None:
    rows = make_examples(LENGTHS, group=2 if task_type is TaskType.DPO else 1)
    if rows.group == 2:
        rows = rows.with_reference(reference_logprobs(load_model(str(tiny_model), "float32"), rows))
    deltas, plan = make_deltas(dtype=dtype), make_plan(dtype=dtype, capacity=256)
    loss, wanted = _step(deltas, rows, task_type, plan, None, packs=2)
    for count in (2, 3):
        found = _step(deltas, rows, task_type, plan, CpuThreads(count, count), packs=2)
        assert found[0] == pytest.approx(loss, rel=tolerance)
        for gradient, exact in zip(found[1], wanted, strict=True):
            assert float((gradient - exact).norm()) <= tolerance * float(exact.norm()) > 0


def test_every_run_has_the_same_bits(
    make_deltas: Callable[..., Deltas],
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    threads: int,
) -> None:
    deltas, rows, plan = make_deltas(), make_examples(LENGTHS), make_plan(capacity=256)
    cpu_threads = CpuThreads(2, threads)
    loss, gradients = _step(deltas, rows, TaskType.INSTRUCT, plan, cpu_threads, packs=4)
    for _ in range(20):
        again = _step(deltas, rows, TaskType.INSTRUCT, plan, cpu_threads, packs=4)
        assert again[0] == loss
        assert all(torch.equal(a, b) for a, b in zip(again[1], gradients, strict=True))


def test_a_pack_is_shared_out_evenly_or_not_at_all() -> None:
    cpu_threads = CpuThreads(2, 2)
    parts = cpu_threads.split(LENGTHS)
    assert parts is not None
    assert sorted(place for part in parts for place in part) == list(range(len(LENGTHS)))
    sizes = [sum(LENGTHS[place] for place in part) for part in parts]
    assert abs(sizes[0] - sizes[1]) <= 2
    assert cpu_threads.split(LENGTHS) == parts
    assert cpu_threads.split([500, 20, 30]) is None
    assert cpu_threads.split([500]) is None


def test_a_pack_that_cannot_be_shared_out_is_computed_whole(
    make_deltas: Callable[..., Deltas],
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    threads: int,
) -> None:
    deltas, rows, plan = make_deltas(), make_examples([60, 5]), make_plan(capacity=80)
    wanted = _step(deltas, rows, TaskType.INSTRUCT, plan, None)
    found = _step(deltas, rows, TaskType.INSTRUCT, plan, CpuThreads(2, threads))
    assert found[0] == wanted[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


def test_a_lane_that_fails_fails_the_step_when_all_have_ended(
    make_deltas: Callable[..., Deltas], make_examples: Callable[..., Examples], threads: int
) -> None:
    deltas, rows, cpu_threads, ended = make_deltas(), make_examples(LENGTHS), CpuThreads(2, threads), []

    def objective(model: torch.nn.Module, batch: object) -> Tensor:
        first = rows.lengths[0] in batch.document_lengths  # type: ignore[attr-defined]
        if first:
            raise RuntimeError("out of memory")
        loss = loss_for(TaskType.INSTRUCT)(model, batch)  # type: ignore[arg-type]
        ended.append(True)
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        cpu_threads.backward(deltas, objective, rows, list(range(len(rows))), len(rows))
    assert ended
    assert all(parameter.grad is None for parameter in deltas.parameters.values())
    assert torch.get_num_threads() == threads


def test_lanes_are_only_where_they_are_exact(
    make_deltas: Callable[..., Deltas], make_plan: Callable[..., Plan]
) -> None:
    lora = make_deltas()

    def count(plan: Plan, threads: int, deltas: Deltas = lora) -> int:
        cpu_threads = cpu_threads_for(plan, deltas, threads)
        return cpu_threads.count if cpu_threads else 1

    wide = make_plan(capacity=1024)
    assert [count(wide, threads) for threads in (1, 2, 3, 4, 7, 8, 10)] == [1, 2, 3, 4, 1, 4, 5]
    assert count(make_plan(capacity=256), 2) == 1  # too small for two
    assert count(make_plan(capacity=1024, dropout=0.1), 2) == 1
    assert count(make_plan(capacity=1024, compile=True), 2) == 1
    assert count(make_plan(capacity=1024, activation_checkpointing=True), 2) == 1
    assert count(make_plan(capacity=1024, parallel="ddp"), 2) == 1
    assert count(make_plan("mixed", capacity=1024), 2, make_deltas("mixed")) == 1
