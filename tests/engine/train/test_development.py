"""Weights of the development curve's lowest points: where they are kept, and what that takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.planning.recipe import CurveRule
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.memory.copy_memory import CopyMemory
from trainer_node.engine.train import development
from trainer_node.engine.train.dev_curve import DevCurve

SIZE = 12  # bytes of the weights


def state_of(most_bytes: float = 1e9, snapshots: int = 1) -> Any:
    """A run's state at its start, with one weight of three numbers."""
    weight = torch.zeros(3)
    return SimpleNamespace(
        step=0,
        curve=DevCurve(),
        plan=SimpleNamespace(parallel="single", curve=CurveRule(snapshots=snapshots)),
        deltas=SimpleNamespace(state=lambda: {"w": weight}, model=None),
        most_best_bytes=most_bytes,
        process_group=SINGLE_PROCESS,
        saver=SimpleNamespace(is_writing=False, memory=CopyMemory(pytest.fail)),
        best={},
        snapshots={},
        copies=[],
        weight=weight,
    )


def reach(state: Any, loss: float) -> dict[str, torch.Tensor]:
    """Go one step on, to weights that are the step's number, and keep them if they are the lowest."""
    state.step += 1
    state.weight.fill_(float(state.step))
    state.curve = state.curve.extended(state.step, 10 * state.step, [loss], 0.0)
    development.keep_lowest(state)
    assert torch.equal(state.best["w"], torch.full((3,), float(state.curve.best.step)))
    kept: dict[str, torch.Tensor] = state.best
    return kept


def test_copies_of_the_lowest_weights_take_turns_in_the_same_memory() -> None:
    state = state_of()
    first, second = reach(state, 3.0), reach(state, 2.5)
    assert first["w"].data_ptr() != second["w"].data_ptr()
    reach(state, 2.8)  # not the lowest
    third = reach(state, 2.0)
    assert third["w"].data_ptr() == first["w"].data_ptr()
    assert third is not first  # it would be taken for what a checkpoint has already
    assert reach(state, 1.0)["w"].data_ptr() == second["w"].data_ptr()


def test_what_is_on_its_way_to_the_disk_does_not_change() -> None:
    state = state_of()
    first = reach(state, 3.0)
    reach(state, 2.5)
    state.saver.is_writing = True
    reach(state, 2.0)
    assert torch.equal(first["w"], torch.ones(3))
    assert len(state.copies) == 2


def test_no_more_copies_are_kept_than_there_is_room_for() -> None:
    state = state_of(most_bytes=1.5 * SIZE)
    for loss in (3.0, 2.5, 2.0):
        reach(state, loss)
    assert state.copies == []


def test_no_process_keeps_a_copy_if_one_of_them_has_no_room() -> None:
    """Or some would go back to the lowest point, and others not."""
    state = state_of(most_bytes=1.5 * SIZE)
    state.process_group = SimpleNamespace(gather_objects=lambda size: [size, 2 * size])
    state.step = 1
    state.curve = state.curve.extended(1, 10, [3.0], 0.0)
    development.keep_lowest(state)
    assert state.best == {}


def test_no_snapshot_that_is_kept_changes() -> None:
    state = state_of(snapshots=2)
    for loss in (3.0, 2.5, 2.8, 2.0, 2.2, 1.0):
        reach(state, loss)
        for step, kept in state.snapshots.items():
            assert torch.equal(kept["w"], torch.full((3,), float(step)))
    assert len(state.copies) == 3


def test_a_point_takes_as_long_as_its_copy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    state, times = state_of(), [100.0]
    state.clock = SimpleNamespace(time=lambda: times[0])
    state.process_group, state.alive, state.tokens = SINGLE_PROCESS, lambda: None, 10
    state.schedule, state.dev = SimpleNamespace(end_at=1e6), [0]

    def measure(*_: Any, **__: Any) -> tuple[Evaluation, float]:
        times[0] += 2.0
        return Evaluation(3.0, np.array([3.0])), 2.0

    def keep_lowest(state: Any) -> None:
        times[0] += 5.0

    monkeypatch.setattr(development, "measure", measure)
    monkeypatch.setattr(development, "keep_lowest", keep_lowest)
    reporter: Any = SimpleNamespace(losses=lambda **_: None)
    development.measure_dev(state, reporter)
    assert state.dev_s == state.curve.spent_s == 7.0
