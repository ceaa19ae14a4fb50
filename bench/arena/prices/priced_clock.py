"""A clock on which the real engine's steps and scores take as long as they would on other hardware.

The engine takes it for the wall clock: it measures its own speed on it, plans by that, and ends in time.
Loading, saving and rounding take no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from bench.arena.prices.prices import Prices
from shared.planning.throughput import SAVE_BYTES_PER_S
from trainer_node.engine import assemble, pipeline, prepare
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate import metric
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.state import TrainState


class PricedClock:
    """Seconds since a job began, at `rate` units of its prices a second."""

    def __init__(self, prices: Prices, rate: float) -> None:
        self.prices, self.rate = prices, rate
        self.spent = 0.0

    def time(self) -> float:
        """Return the seconds that all steps and scores took so far."""
        return self.spent / self.rate

    def advance(self, tokens: int) -> None:
        """Do nothing: the step that trained the tokens was counted."""


def install(clock: PricedClock) -> None:
    """Let the engine of this process run on the clock, for good."""
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (pipeline, "WallClock", lambda: clock),
        (loop, "time", SimpleNamespace(monotonic=clock.time)),
        (loop, "one_step", _paid_step(clock, loop.one_step)),
        (metric, "_batches", _paid_batches(clock, metric._batches)),
        (prepare, "save_rate", lambda *_: SAVE_BYTES_PER_S),  # a real disk's differs from run to run
        (assemble, "Saver", _unhurried),
    )
    for module, name, value in replaced:
        setattr(module, name, value)


def _paid_step(clock: PricedClock, real: Callable[..., bool]) -> Callable[..., bool]:
    def one_step(state: TrainState, rate: float, stop: Stop) -> bool:
        before = state.tokens
        done = real(state, rate, stop)
        if done:
            clock.spent += clock.prices.of_step(state.plan, state.tokens - before)
        return done

    return one_step


def _paid_batches(clock: PricedClock, real: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def batches(model: torch.nn.Module, examples: Examples, *rest: Any, **options: Any) -> Iterator[Any]:
        for indices, *answer in real(model, examples, *rest, **options):
            clock.spent += clock.prices.scored * int(examples.lengths[indices].sum())
            yield indices, *answer

    return batches


def _unhurried(*args: Any, **options: Any) -> Saver:
    """Return a saver whose saves take no time: the thread that writes them isn't on this clock."""
    return Saver(*args, **{**options, "timer": lambda: 0.0})
