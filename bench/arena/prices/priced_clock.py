"""A clock on which the real engine's steps and scores take as long as they would on other hardware.

The engine takes it for the wall clock: it measures its own speed on it, plans by that, and ends in time.
Loading, saving and rounding take no time: in a real job they are a small part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from bench.arena.prices.prices import Prices
from shared.planning.throughput import SAVE_BYTES_PER_S
from trainer_node.engine import assemble, pipeline, prepare
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.evaluate import metric
from trainer_node.engine.evaluate.metric import Evaluation, score
from trainer_node.engine.export import rounding
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.state import TrainState


class PricedClock:
    """Seconds since a job began, at `rate` units of its prices a second."""

    def __init__(self, prices: Prices, rate: float) -> None:
        self.prices, self.rate = prices, rate
        self.spent = 0.0
        self.stands = False  # what is done now takes no time

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
        (metric, "collate", _paid_batch(clock, collate)),
        (prepare, "save_rate", lambda *_: SAVE_BYTES_PER_S),  # a real disk's differs from run to run
        (assemble, "Saver", _unhurried),
        (rounding, "score", _free(clock, score)),
    )
    for module, name, value in replaced:
        setattr(module, name, value)


def _paid_step(clock: PricedClock, real: Callable[..., bool]) -> Callable[..., bool]:
    def one_step(state: TrainState, rate: float, stop: Stop) -> bool:
        done = real(state, rate, stop)
        if done:
            clock.spent += clock.prices.of_step(state.plan)
        return done

    return one_step


def _paid_batch(clock: PricedClock, real: Callable[..., Batch]) -> Callable[..., Batch]:
    def paid(examples: Examples, indices: list[int], tokens: int, device: torch.device) -> Batch:
        if not clock.stands:
            clock.spent += clock.prices.scored * tokens  # the model is about to see them
        return real(examples, indices, tokens, device)

    return paid


def _free(clock: PricedClock, real: Callable[..., Evaluation]) -> Callable[..., Evaluation]:
    def free(model: torch.nn.Module, rows: Examples) -> Evaluation:
        clock.stands = True
        try:
            return real(model, rows)
        finally:
            clock.stands = False

    return free


def _unhurried(*args: Any, **options: Any) -> Saver:
    """Return a saver whose saves take no time: the thread that writes them isn't on this clock."""
    return Saver(*args, **{**options, "timer": lambda: 0.0})
