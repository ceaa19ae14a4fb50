"""Runs whose gradients or losses go wrong: no weight is lost, and the run goes on from where it was right."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.train.conftest import Build, StopAfter
from trainer_node.engine.train import checkpoint, loop, saved_state
from trainer_node.engine.train.checkpoint import Position
from trainer_node.engine.train.health import IN_A_ROW, MOST_RETURNS
from trainer_node.engine.train.rollback import go_back
from trainer_node.engine.train.state import TrainState


def spoil(state: TrainState, steps: Iterable[int], factor: float = math.nan) -> None:
    """Multiply the losses of these steps (the first is 0)."""
    objective, spoilt = state.objective, frozenset(steps)

    def objective_(*arguments: Any) -> torch.Tensor:
        return objective(*arguments) * (factor if state.step in spoilt else 1.0)

    state.objective = objective_


def copied(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.deltas.state().items()}


@pytest.mark.parametrize("method", ["lora", "dense", "mixed"])
def test_a_step_without_a_finite_gradient_changes_nothing(method: str, build: Build) -> None:
    state, _, stop = build("run", method)
    loop.one_step(state, 1.0, stop)
    spoil(state, [1])
    before = copied(state)
    moments = [value.clone() for kept in state.optimizer.state.values() for value in kept.values()]
    assert loop.one_step(state, 1.0, stop)
    assert math.isnan(state.last_loss)
    assert (state.step, state.health.skipped) == (2, 1)
    assert all(torch.equal(value, before[name]) for name, value in state.deltas.state().items())
    kept = [value for kept in state.optimizer.state.values() for value in kept.values()]
    assert all(torch.equal(one, other) for one, other in zip(kept, moments, strict=True))
    loop.one_step(state, 1.0, stop)
    assert not all(torch.equal(value, before[name]) for name, value in state.deltas.state().items())
    assert saved_state.is_finite(state)


def test_a_gradient_that_overflows_under_a_finite_loss_is_seen(build: Build) -> None:
    state, _, stop = build("run")
    parameter = next(iter(state.deltas.parameters.values()))
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    before = copied(state)
    assert loop.one_step(state, 1.0, stop)
    handle.remove()
    assert math.isfinite(state.last_loss)
    assert state.health.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in state.deltas.state().items())


def test_a_run_goes_on_over_single_bad_steps(build: Build, tmp_path: Path) -> None:
    state, reporter, stop = build("run")
    spoil(state, [0, 5, 6, 11])
    loop.train(state, reporter, stop)
    assert (state.health.skipped, state.health.returns) == (4, 0)
    assert saved_state.is_finite(state)
    assert reporter.last.skipped_steps == 4
    assert reporter.last.loss is not None
    assert math.isfinite(reporter.last.loss)
    said = (tmp_path / "run" / "progress.jsonl").read_text()
    assert said.count("its gradient is not finite") == 3  # the first, second and fourth
    found = checkpoint.newest(state.saver.folder, pytest.fail)
    assert found is not None
    assert found.manifest.position.health.skipped == 4


@pytest.mark.parametrize("factor", [math.nan, 4.0])
def test_several_bad_steps_send_it_back_to_the_checkpoint_at_half_the_rate(
    factor: float,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer_node.engine.train.health.SETTLED", 5)
    state, reporter, stop = build("run", "dense")
    steps: list[tuple[int, dict[str, torch.Tensor], float]] = []
    taken = loop.one_step

    def noted(state: TrainState, rate: float, stop: Any) -> bool:
        steps.append((state.step, copied(state), rate))
        return taken(state, rate, stop)

    monkeypatch.setattr(loop, "one_step", noted)
    bad = range(10, 10 + IN_A_ROW)
    spoil(state, bad, factor)
    saved: list[int] = []
    begin = state.saver.begin

    def begin_(position: Position, *arguments: Any, **options: Any) -> None:
        saved.append(position.step)
        begin(position, *arguments, **options)

    monkeypatch.setattr(state.saver, "begin", begin_)
    loop.train(state, reporter, stop)
    assert state.health.returns == 1
    assert not set(bad[1:]) & set(saved)  # nothing is saved while training goes wrong
    newest = max(step for step in saved if step <= bad[0])
    before = next(weights for step, weights, _ in steps if step == newest)
    number, after, rate = next(one for one in steps if one[0] == bad[-1] + 1)
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert rate < 0.6 * next(rate for step, _, rate in steps if step == bad[0])
    assert number == 10 + IN_A_ROW


def test_before_the_first_checkpoint_it_goes_back_to_untrained_weights(
    build: Build,
) -> None:
    state, reporter, stop = build("run", "dense")
    untrained = copied(state)
    state.untrained = lambda: untrained
    loop.one_step(state, 1.0, stop)
    spoil(state, range(1, 1 + IN_A_ROW))
    for _ in range(IN_A_ROW):
        loop.one_step(state, 1.0, stop)
    go_back(state, reporter)
    assert all(torch.equal(value, untrained[name]) for name, value in state.deltas.state().items())
    assert not state.optimizer.state
    assert (state.step, state.health.returns, state.health.seen) == (1 + IN_A_ROW, 1, 0)


def test_a_run_that_only_goes_wrong_ends_early_with_sound_weights(build: Build) -> None:
    state, reporter, stop = build("run", "dense")
    untrained = copied(state)
    state.untrained = lambda: untrained
    spoil(state, range(10**6))
    loop.train(state, reporter, stop)
    assert state.step == (MOST_RETURNS + 1) * IN_A_ROW
    assert state.health.is_hopeless
    assert all(torch.equal(value, untrained[name]) for name, value in state.deltas.state().items())


@pytest.mark.parametrize("method", ["lora", "dense"])
def test_a_resumed_run_skips_and_returns_at_the_same_steps(
    method: str,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer_node.engine.train.health.SETTLED", 5)
    bad = [3, *range(12, 12 + IN_A_ROW), 20]
    calm, reporter, stop = build("calm", method)
    spoil(calm, bad)
    loop.train(calm, reporter, stop)
    assert (calm.health.returns, calm.health.skipped) == (1, IN_A_ROW + 2)
    for looks in (7, 11, 23, 5, 4, 10**9):
        rough, reporter, stop = build("rough", method, resume=True, stop=StopAfter(looks))
        spoil(rough, bad)
        loop.train(rough, reporter, stop)
    rough.saver.wait()
    assert rough.health == calm.health
    assert rough.step == calm.step
    wanted, found = calm.deltas.state(), rough.deltas.state()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
