"""A run whose memory runs out: rung by rung to a plan that fits, each written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from shared.planning.architectures import Batching
from shared.planning.plan import Deviation, Plan
from trainer_node.engine import context
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.train import loop
from trainer_node.engine.train.oom_fallback import (
    OUT_OF_MEMORY,
    SmallerPlan,
    descend,
    step_down,
    was_too_large,
)

FULL = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
CHECKPOINTING = Deviation("activation checkpointing", "off", "on", OUT_OF_MEMORY)
HALF_PACKS = Deviation("pack capacity", "128", "64", OUT_OF_MEMORY)


class FakeRun:
    """A run whose training ends as `ends` says, one for each call: None is success."""

    def __init__(self, state: Any, ends: list[Exception | None], process_group: ProcessGroup) -> None:
        self.state = state
        self.ends = ends
        self.folder = Path("run")
        self.reporter = self
        self.stop = None
        self.process_group = process_group
        self.messages: list[str] = []
        self.written: list[Plan] = []
        self.shrunk = 0

    def message(self, text: str) -> None:
        self.messages.append(text)

    def train(self, *_: Any) -> None:
        if end := self.ends.pop(0):
            raise end

    def shrink(self, state: Any) -> None:
        assert state is self.state
        self.shrunk += 1
        state.recorded = None


@pytest.fixture
def start(
    make_plan: Callable[..., Plan], make_examples: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., FakeRun]:
    """Makes a run of packs of 128 with rows of up to 60 tokens; `known` is whether it has a `run.json`."""

    def start(
        *ends: Exception | None,
        known: bool = True,
        group: ProcessGroup | None = None,
        batching: Batching = Batching.PACKED,
        **changes: Any,
    ) -> FakeRun:
        plan = make_plan("lora", capacity=128, **changes)
        deltas = SimpleNamespace(model=SimpleNamespace(batching=batching))
        examples = make_examples([9, 60, 20])
        state = SimpleNamespace(plan=plan, examples=examples, deltas=deltas, recorded=None)
        run = FakeRun(state, list(ends), group or ProcessGroup())
        monkeypatch.setattr(loop, "train", run.train)
        monkeypatch.setattr(loop, "shrink", run.shrink)
        monkeypatch.setattr(context, "read_record", lambda folder: ("record", plan) if known else None)
        monkeypatch.setattr(context, "write_plan", lambda folder, smaller: run.written.append(smaller))
        return run

    return start


def go(run: Any) -> None:
    descend(run, run.state)


def test_a_run_that_fits_keeps_its_plan(start: Callable[..., FakeRun]) -> None:
    run = start(None)
    before = run.state.plan
    go(run)
    assert run.state.plan is before
    assert (run.shrunk, run.written, run.messages) == (0, [], [])
    assert not was_too_large(before)


def test_each_time_memory_runs_out_is_one_rung_written_down_before_it_goes_on(
    start: Callable[..., FakeRun],
) -> None:
    run = start(FULL, MemoryError(), None)
    go(run)
    plan = run.state.plan
    assert plan.activation_checkpointing
    assert (plan.capacity, plan.packs_per_step) == (64, 2)
    assert plan.deviations == [CHECKPOINTING, HALF_PACKS]
    assert [smaller.deviations for smaller in run.written] == [[CHECKPOINTING], [CHECKPOINTING, HALF_PACKS]]
    assert run.shrunk == 2
    assert run.messages == [
        "out of memory, going on with a smaller step: CUDA out of memory.",
        "out of memory, going on with a smaller step: out of memory",
    ]
    assert was_too_large(plan)


def test_recorded_passes_are_given_up_before_the_plan_is_changed(start: Callable[..., FakeRun]) -> None:
    run = start(FULL, None)
    before, run.state.recorded = run.state.plan, object()
    go(run)
    assert run.state.plan is before
    assert (run.shrunk, run.written) == (1, [])
    assert run.messages == ["out of memory, going on without recorded passes: CUDA out of memory."]


def test_before_the_run_is_known_nothing_is_written(start: Callable[..., FakeRun]) -> None:
    run = start(FULL, None, known=False)
    go(run)
    assert run.state.plan.deviations == [CHECKPOINTING]
    assert (run.shrunk, run.written) == (1, [])


def test_beside_others_that_train_something_else_nothing_is_written(start: Callable[..., FakeRun]) -> None:
    run = start(FULL, None, group=ProcessGroup(others=1))
    go(run)
    assert run.state.plan.deviations == [CHECKPOINTING]
    assert (run.shrunk, run.written) == (1, [])


def test_one_of_several_processes_writes_the_smaller_plan_and_ends(start: Callable[..., FakeRun]) -> None:
    run = start(FULL, None, group=ProcessGroup(world=2), parallel="ddp", devices=2)
    with pytest.raises(SmallerPlan):
        go(run)
    assert [smaller.deviations for smaller in run.written] == [[CHECKPOINTING]]
    assert run.shrunk == 0


def test_sharded_weights_are_the_last_rung(start: Callable[..., FakeRun]) -> None:
    run = start(FULL, FULL, FULL, None, known=False, parallel="ddp", devices=2)
    go(run)
    assert run.state.plan.parallel == "fsdp2"
    assert run.state.plan.deviations[-1] == Deviation("parallel", "ddp", "fsdp2", OUT_OF_MEMORY)


def test_a_model_in_padded_rows_is_never_sharded(start: Callable[..., FakeRun]) -> None:
    """The engine can't train it so: what ends the run is that memory ran out."""
    run = start(FULL, FULL, FULL, None, known=False, parallel="ddp", devices=2, batching=Batching.PADDED)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        go(run)
    assert run.state.plan.parallel == "ddp"
    assert run.state.plan.deviations == [CHECKPOINTING, HALF_PACKS]


def test_below_the_last_rung_the_error_ends_the_run(start: Callable[..., FakeRun]) -> None:
    run = start(FULL, FULL, FULL)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        go(run)
    assert run.state.plan.deviations == [CHECKPOINTING, HALF_PACKS]


def test_any_other_error_changes_no_plan(start: Callable[..., FakeRun]) -> None:
    run = start(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        go(run)
    assert run.state.plan.deviations == []
    assert not was_too_large(replace(run.state.plan, deviations=[Deviation("dtype", "a", "b", "no bf16")]))


def test_memory_ladder_recomputes_first_and_then_halves_the_packs(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("dense", capacity=256, packs_per_step=2)
    first = step_down(plan, 60)
    assert first is not None
    assert (first.activation_checkpointing, first.capacity) == (True, 256)
    second = step_down(first, 60)
    assert second is not None
    assert (second.capacity, second.packs_per_step) == (128, 4)
    assert second.pack_examples is None
    assert step_down(replace(first, pack_examples=4), 60) is None  # packs with a limit are the smallest
    third = step_down(second, 60)
    assert third is not None
    assert step_down(third, 65) is None
    assert step_down(third, 64) is None
    cut = step_down(replace(third, parallel="ddp", devices=2), 65)
    assert cut is not None
    assert (cut.parallel, cut.capacity) == ("fsdp2", 64)
    assert step_down(cut, 65) is None
    assert step_down(replace(third, parallel="ddp", devices=2), 65, shards=False) is None
