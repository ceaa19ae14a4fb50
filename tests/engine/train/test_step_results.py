"""A step does not wait for the device: its loss is read one step later, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from shared.clock import TokenClock
from tests.engine.train.conftest import Build
from tests.engine.train.test_rollback import spoil
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop, saved_state
from trainer_node.engine.train.health import IN_A_ROW
from trainer_node.engine.train.state import TrainState
from trainer_node.engine.train.step_results import StepResult


def test_a_late_look_changes_no_weight_and_loses_no_loss(build: Build) -> None:
    prompt, reporter, stop = build("prompt", "dense")
    loop.train(prompt, reporter, stop)
    late, reporter, stop = build("late", "dense")
    late.lag = 1
    late.step_losses, seen = [], prompt.health.seen
    loop.train(late, reporter, stop)
    wanted, found = prompt.deltas.state(), late.deltas.state()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert late.health == prompt.health
    assert late.step == prompt.step == len(late.step_losses) == seen
    assert late.last_loss == prompt.last_loss
    assert not late.results


def test_the_device_has_its_next_step_before_its_last_is_looked_at(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, _, stop = build("run")
    state.lag = 1
    seen: list[tuple[int, int]] = []  # steps that were begun, the step whose result was read then
    read, begun = StepResult.read, [0]
    gradients = loop.gradients

    def noted(result: StepResult) -> tuple[float, float]:
        seen.append((begun[0], result.step))
        return read(result)

    def counted(*arguments: object) -> object:
        begun[0] += 1
        return gradients(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StepResult, "read", noted)
    monkeypatch.setattr(loop, "gradients", counted)
    for _ in range(4):
        assert loop.one_step(state, 1.0, stop)
    assert seen == [(1, 1), (3, 2), (4, 3)]  # the first is timed: what follows is planned by it
    assert [result.step for result in state.results] == [4]


def test_nothing_is_saved_or_kept_of_steps_that_went_wrong_unseen(build: Build) -> None:
    state, reporter, stop = build("run", "dense")
    state.lag = 1
    spoil(state, range(10, 10 + IN_A_ROW), math.nan)
    loop.train(state, reporter, stop)
    assert state.health.returns == 1
    assert state.health.skipped >= IN_A_ROW
    assert saved_state.is_finite(state)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_whose_last_steps_go_wrong_goes_back_before_it_ends(lag: int, build: Build) -> None:
    calm, reporter, stop = build("calm", "dense")
    loop.train(calm, reporter, stop)
    state, reporter, stop = build("run", "dense")
    state.lag = lag
    spoil(state, range(calm.step - IN_A_ROW, calm.step))
    loop.train(state, reporter, stop)
    assert state.step == calm.step
    assert (state.health.skipped, state.health.returns) == (IN_A_ROW, 1)
    assert reporter.last.skipped_steps == IN_A_ROW


def test_the_warm_up_begins_after_the_step_in_which_layers_are_compiled(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first step took 14 s on an H100: 3% of a run of 8 minutes, all of its warm-up."""
    assert max(rates_of(build, monkeypatch, compiled=False)) < 0.8  # half of the clock was over: no peak
    rates = rates_of(build, monkeypatch, compiled=True)
    assert rates[1] < 0.6
    assert max(rates) > 0.9


def rates_of(build: Build, monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> list[float]:
    """The rates of a run whose first step takes 5 of its 30 seconds longer than the others."""
    state, reporter, stop = build(f"run-{compiled}", warmup=0.2)
    state.plan = replace(state.plan, compile=compiled)
    objective, clock, taken = state.objective, state.clock, loop.one_step
    assert isinstance(clock, TokenClock)
    rates: list[float] = []

    def slow_at_first(*arguments: Any) -> torch.Tensor:
        if state.step == 0:
            clock.tokens += 250  # 2.5 s for each of two packs
        return objective(*arguments)

    def noted(state: TrainState, rate: float, stop: Stop) -> bool:
        rates.append(rate)
        return taken(state, rate, stop)

    state.objective = slow_at_first
    with monkeypatch.context() as patch:
        patch.setattr(loop, "one_step", noted)
        loop.train(state, reporter, stop)
    return rates
