"""The development curve's lowest points: where their weights are kept, and how a run goes back to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.planning.recipe import CurveRule
from tests.engine.conftest import VOCAB
from tests.engine.train.conftest import JOB, LENGTHS, Build, StopAfter
from trainer_node.engine.data.examples import IGNORED, Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.evaluate.candidates import loaded
from trainer_node.engine.evaluate.metric import Evaluation, score
from trainer_node.engine.memory.copy_memory import CopyMemory
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.train import checkpoint, development, loop
from trainer_node.engine.train.dev_curve import DevCurve
from trainer_node.engine.train.development import measure_dev
from trainer_node.engine.train.state import TrainState

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


def contradicting(examples: Examples) -> Examples:
    """The same rows with other answers: the better the first are learned, the higher is the loss of these."""
    labels = np.where(examples.labels == IGNORED, IGNORED, (examples.labels + 7) % VOCAB)
    rows = np.tile(np.arange(len(examples)), 8)  # few rows prove little
    return dataclasses.replace(examples, labels=labels).take(rows)


@pytest.mark.parametrize("method", ["lora", "dense"])
def test_a_run_that_overfits_goes_back_to_its_best_weights_and_ends_early(
    method: str, build: Build, make_examples: Callable[..., Examples], tmp_path: Path
) -> None:
    other_rows = contradicting(make_examples(LENGTHS))
    state, reporter, stop = build("overfit", method, dev=other_rows, lr_lora=0.02, lr_dense=0.01)
    loop.train(state, reporter, stop)
    best = state.curve.best
    assert best is not None
    assert state.curve.turned()
    assert state.schedule.state.cooldown is not None
    assert state.clock.time() < JOB.ready_by / 2
    assert state.schedule.rate() < 0.05
    assert b"the held-out loss rose" in (tmp_path / "overfit" / "progress.jsonl").read_bytes()
    with loaded(state.deltas, lambda: state.best):
        losses = score(state.deltas.model, other_rows).per_example.tolist()
    assert losses == pytest.approx(state.curve.best_losses, abs=1e-6)


def test_a_run_that_resumes_turns_at_the_same_step(
    build: Build, make_examples: Callable[..., Examples]
) -> None:
    options = {"dev": contradicting(make_examples(LENGTHS)), "lr_dense": 0.01}
    calm, reporter, stop = build("calm", "dense", **options)
    loop.train(calm, reporter, stop)
    assert calm.schedule.state.cooldown is not None
    for looks in (9, 30, 45, 60, 10**9):
        rough, reporter, stop = build("rough", "dense", resume=True, stop=StopAfter(looks), **options)
        loop.train(rough, reporter, stop)
        rough.saver.wait()
    assert rough.schedule.state == calm.schedule.state
    assert rough.curve == calm.curve
    for name, value in calm.deltas.state().items():
        assert torch.equal(rough.deltas.state()[name], value), name
    for name, value in calm.best.items():
        assert torch.equal(rough.best[name], value), name


def test_the_last_checkpoint_has_the_weights_of_a_point_measured_after_a_save_of_the_same_step(
    build: Build, make_examples: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, reporter, stop = build("run", dev=make_examples(LENGTHS))

    def time_ends_in_it(state: TrainState, reporter: Reporter) -> None:
        measure_dev(state, reporter)
        state.schedule.state.progress = 1.0

    monkeypatch.setattr("trainer_node.engine.train.loop.measure_dev", time_ends_in_it)
    monkeypatch.setattr(state.schedule, "save_due", lambda now: True)
    loop.train(state, reporter, stop)
    state.saver.wait()
    found = checkpoint.newest(state.saver.folder, pytest.fail)
    assert found is not None
    assert [point.step for point in found.manifest.position.curve.points] == [state.step]
    for name, value in state.best.items():
        assert torch.equal(found.tensors("best")[name], value), name
