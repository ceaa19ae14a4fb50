"""The loop on the token clock: exact resume, exact stop, exact accumulation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from shared.messages.hardware import Hardware
from shared.planning.hardware import usable_memory
from shared.planning.plan import Plan
from tests.engine.train.conftest import Build, StopAfter
from trainer_node.engine.assemble import averages
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import checkpoint, loop, saved_state
from trainer_node.engine.train.async_saver import Key, by_key
from trainer_node.engine.train.oom_fallback import step_down
from trainer_node.engine.train.weight_average import TAIL


def test_the_average_is_of_some_steps_of_the_tail(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVERY", 2)  # the tail of such a short run has few steps
    calm, reporter, stop = build("calm", "dense")
    assert calm.average is not None
    taken, update = list[tuple[int, float]](), calm.average.update

    def note_and_update() -> None:
        taken.append((calm.step, calm.schedule.state.progress))
        update()

    monkeypatch.setattr(calm.average, "update", note_and_update)
    loop.train(calm, reporter, stop)
    assert calm.average.count == len(taken) > 0
    assert all(step % 2 == 0 and progress >= TAIL for step, progress in taken)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dense", "mixed"])
def test_resumed_weights_are_bit_equal(
    method: str, dtype: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY", 1)  # the tail of such a short run has few steps
    calm, reporter, stop = build("calm", method, dtype=dtype)
    loop.train(calm, reporter, stop)
    assert calm.step > 8
    assert calm.average is not None
    assert calm.average.count > 1
    starts = 0
    for looks in (7, 11, 10**9):  # a step looks three times: stopped between steps and between packs
        rough, reporter, stop = build("rough", method, dtype=dtype, resume=True, stop=StopAfter(looks))
        loop.train(rough, reporter, stop)
        starts += 1
    assert starts == 3
    assert rough.step == calm.step
    assert rough.tokens == calm.tokens
    wanted, found = calm.deltas.state(), rough.deltas.state()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert rough.average is not None
    assert all(torch.equal(rough.average.weights[name], calm.average.weights[name]) for name in wanted)


def test_stop_between_packs_undoes_the_step(build: Build) -> None:
    training, _, _ = build("run")
    before = {name: value.clone() for name, value in training.deltas.state().items()}
    cursor = training.packs.epoch, training.packs.index
    assert not loop.one_step(training, 1.0, StopAfter(1))
    assert (training.packs.epoch, training.packs.index, training.step) == (*cursor, 0)
    assert all(torch.equal(value, before[name]) for name, value in training.deltas.state().items())
    assert all(parameter.grad is None for parameter in training.deltas.parameters.values())


def test_training_lowers_the_loss_and_ends_with_a_checkpoint(build: Build) -> None:
    training, reporter, stop = build("run")
    loop.one_step(training, 1.0, stop)
    first = training.last_loss
    loop.train(training, reporter, stop)
    training.saver.wait()
    assert training.schedule.state.progress == 1.0
    assert reporter.last.progress == 1.0
    assert reporter.last.loss is not None
    assert reporter.last.loss < first
    found = checkpoint.newest(training.saver.folder, pytest.fail)
    assert found is not None
    assert found.manifest.position.step == training.step


def test_a_resumed_run_without_time_leaves_its_checkpoint_alone(build: Build) -> None:
    """Rewriting it would remove it for a moment, in which a kill would lose it."""
    training, reporter, stop = build("run")
    loop.train(training, reporter, stop)
    training.saver.wait()
    (newest, *_) = sorted(training.saver.folder.glob("step-*"), reverse=True)
    before = newest.stat().st_ino
    again, reporter, stop = build("run", resume=True)
    loop.train(again, reporter, stop)
    assert again.step == training.step
    assert newest.stat().st_ino == before


def test_gradient_is_the_mean_over_the_step_s_examples(build: Build) -> None:
    """Two packs of one step give what one pack with all of their examples gives."""
    small, _, stop = build("small", capacity=256, rank=4)
    small.plan = replace(small.plan, dropout=0.0)
    small.deltas.model.eval()
    halves = [[0, 1, 2], [3, 4, 5, 6]]
    small.packs.take = lambda count: halves  # type: ignore[method-assign]
    assert loop.one_step(small, 0.0, stop)
    whole, _, stop = build("whole", capacity=256, rank=4)
    whole.deltas.model.eval()
    whole.packs.take = lambda count: [halves[0] + halves[1]]  # type: ignore[method-assign]
    assert loop.one_step(whole, 0.0, stop)
    assert small.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
    for name, parameter in small.deltas.parameters.items():
        mine = small.optimizer.state[parameter]["exp_avg"]
        theirs = whole.optimizer.state[whole.deltas.parameters[name]]["exp_avg"]
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)


def test_training_goes_on_with_smaller_packs(build: Build) -> None:
    training, reporter, stop = build("run", "dense", capacity=128)
    loop.one_step(training, 1.0, stop)
    training.packs.take(1)
    epoch = training.packs.epoch
    smaller = step_down(replace(training.plan, activation_checkpointing=True), 50)
    assert smaller is not None
    training.plan = smaller
    loop.shrink(training)
    assert (training.packs.capacity, training.packs.epoch, training.packs.index) == (64, epoch + 1, 0)
    loop.train(training, reporter, stop)
    training.saver.wait()
    assert training.schedule.state.progress == 1.0


def test_an_average_is_kept_only_beside_all_that_was_planned(make_plan: Callable[..., Plan]) -> None:
    gpu = Hardware(device="H100", count=1, memory_bytes=80 * 2**30)
    free = usable_memory(gpu) - 4 * 2**30
    assert averages(make_plan("dense", memory_bytes=free), 4 * 2**30, gpu)
    assert not averages(make_plan("dense", memory_bytes=free + 1), 4 * 2**30, gpu)
    assert not averages(make_plan("dense", memory_bytes=0), 9 * 2**30, gpu)


def test_all_that_a_checkpoint_copies_has_its_memory_before(build: Build) -> None:
    """The moments, too, which come later: the first use of memory is slow. On a CPU the average has none."""
    training, reporter, stop = build("run")
    saver, ready, copied = training.saver, list[set[Key]](), list[set[Key]]()
    prepare, begin = saver.prepare, saver.begin

    def prepared(tensors: Any) -> None:
        ready.append(set(by_key(tensors)))
        prepare(tensors)

    def begun(position: Any, tensors: Any, *, still: bool = False, **options: Any) -> None:
        if not still:
            copied.append(set(by_key(tensors)))
            assert {key for key in copied[-1] if key[0] != "average"} <= ready[-1]
        begin(position, tensors, still=still, **options)

    saver.prepare, saver.begin = prepared, begun  # type: ignore[method-assign]
    loop.train(training, reporter, stop)
    saver.wait()
    assert {group for group, _ in copied[-1]} == {"weights", "optimizer", "average"}


def test_a_cursor_into_packs_of_another_capacity_goes_on_with_the_next_epoch(
    build: Build, tmp_path: Path
) -> None:
    """A process that is killed after it shrank restores what was saved before."""
    training, reporter, stop = build("run", capacity=80)
    loop.one_step(training, 1.0, stop)
    saved_state.save(training, reporter)
    training.saver.wait()
    found = checkpoint.newest(training.saver.folder, pytest.fail)
    assert found is not None
    assert (found.manifest.position.epoch, found.manifest.position.pack) == (0, 2)
    for capacity, place in ((80, (0, 2)), (60, (1, 0))):
        again, _, _ = build("again", capacity=capacity)
        saved_state.restore(again, found)
        assert again.step == 1
        assert (again.packs.epoch, again.packs.index) == place


@pytest.mark.parametrize(("lag", "seconds"), [(0, [30.0, 1.0, 1.0, 1.0]), (1, [30.0, 0.1, 1.0, 1.0])])
@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("resumed", [0, 500])
def test_a_first_step_that_compiles_counts_as_a_later_one(
    resumed: int, compiles: bool, lag: int, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a step is waited for in the next one: the second is timed as shorter than it is."""
    now = [0.0]
    state: Any = SimpleNamespace(
        step=resumed,
        lag=lag,
        train_s=0.0,
        first_step=0,
        first_s=0.0,
        clock=SimpleNamespace(time=lambda: now[0]),
    )
    state.plan = SimpleNamespace(compile=compiles)
    state.schedule = SimpleNamespace(stepped=lambda seconds: None, begin_again=lambda now: None)

    def one_step(state: Any, rate: float, stop: Stop) -> bool:
        now[0] += seconds[state.step - resumed]
        state.step += 1
        return True

    monkeypatch.setattr(loop, "one_step", one_step)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    try:
        for _ in seconds:
            loop.timed_step(state, 1.0, Stop())
    finally:
        gc.unfreeze()
    assert state.train_s == pytest.approx(sum(seconds) - (29.0 if compiles else 0.0))


def test_a_process_that_has_read_no_result_yet_reports_nothing(build: Build) -> None:
    """Rank 0 decides that all report: another rank may have read none since the last time."""
    state, reporter, _ = build("run")
    state.since_report = (0.0, 0)
    loop.report(state, reporter)
    assert b"loss" not in (state.saver.folder.parent / "progress.jsonl").read_bytes()
