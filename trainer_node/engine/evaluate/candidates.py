"""Which weights to submit, by the development metric.

The last ones, or their average over the run's tail; if these are worse than the base model's, an earlier
checkpoint's, or in the end the base model's own (see closing.choose).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec import Struct

from trainer_node.engine.distributed.sharding import local, placed
from trainer_node.engine.evaluate.metric import Score
from trainer_node.engine.model.loading import Deltas

TAIL = 0.8  # of progress: from here on the average runs; before, it would cost memory and time for nothing
ENOUGH_ROWS = 32  # to compare candidates on the same rows


class TailAverage:
    """The equal-weight mean of the trainable weights over the steps of the tail, in fp32.

    Costs one copy of the trainable weights, only in the tail. Part of the checkpoint, so that a resumed run
    has the same candidates.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.parameters = parameters
        self.weights: dict[str, torch.Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        if not self.weights:
            self.weights = {name: value.detach().float().clone() for name, value in self.parameters.items()}
        else:
            averages = [local(value) for value in self.weights.values()]
            present = [local(value.detach()).float() for value in self.parameters.values()]
            torch._foreach_lerp_(averages, present, 1.0 / (self.count + 1))
        self.count += 1  # last: if memory ran out, it was not taken in

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside: exchanged, one tensor at a time, for want of memory."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap contents, not tensors: the memory of sharded weights is not ours to replace."""
        for name, parameter in self.parameters.items():
            present, mine = local(parameter.detach()), local(self.weights[name])
            before = present.clone()
            present.copy_(mine)
            mine.copy_(before)


@contextmanager
def loaded(deltas: Deltas, weights: Callable[[], Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """The model has other weights inside; then again those it had, of which a copy is kept meanwhile."""
    before = {name: value.clone() for name, value in deltas.state().items()}
    deltas.load_state({name: placed(value, deltas.parameters[name]) for name, value in weights().items()})
    try:
        yield
    finally:
        deltas.load_state(before)


class Reached(Struct, frozen=True):
    """How far training had come."""

    step: int
    tokens: int
    train_s: float


@dataclass(frozen=True)
class Candidate:
    """One set of weights that could be submitted; inside `worn()` the model has them."""

    name: str
    reached: Reached
    score: Score | None = None  # None = there was no time to measure it
    worn: Callable[[], AbstractContextManager[None]] = nullcontext

    def measured(self, measure: Callable[[], Score]) -> Candidate:
        """With its score."""
        with self.worn():
            return replace(self, score=measure())


def excess(candidate: Candidate, base_losses: Sequence[float], most: int | None = None) -> float:
    """How much worse than the base model it is on the rows that it was measured on, or the first of them.

    Infinite if it was not measured, or gives no number.
    """
    if candidate.score is None:
        return math.inf
    losses = candidate.score.per_example[:most]
    difference = float(losses.mean()) - float(np.mean(base_losses[: len(losses)]))
    return difference if math.isfinite(difference) else math.inf


def ranked(candidates: Sequence[Candidate], base_losses: Sequence[float]) -> list[Candidate]:
    """Best first, ties as they come.

    A measurement may have been cut short by the clock: they are compared on the rows that all have seen, or
    if those are too few by what each gained on its own.
    """
    common = min((len(c.score.per_example) for c in candidates if c.score), default=0)
    return sorted(candidates, key=lambda c: excess(c, base_losses, max(common, ENOUGH_ROWS)))
