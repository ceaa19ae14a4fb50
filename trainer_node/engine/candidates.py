"""Which weights to submit: the last ones, or their average over the run's tail, by the development metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trainer_node.engine.parallel import local
from trainer_node.engine.score import Score

TAIL = (
    0.8  # of progress: from here on the average runs; before, it would cost memory and save time for nothing
)


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
        self.count += 1
        if not self.weights:
            self.weights = {name: value.detach().float().clone() for name, value in self.parameters.items()}
            return
        averages = [local(value) for value in self.weights.values()]
        present = [local(value.detach()).float() for value in self.parameters.values()]
        torch._foreach_lerp_(averages, present, 1.0 / self.count)

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


@dataclass(frozen=True)
class Candidate:
    """One set of weights that could be submitted; `score` is None if there was no time to measure it."""

    name: str  # "last" or "average"
    score: Score | None

    @property
    def loss(self) -> float:
        """The development metric, infinite if not measured."""
        return self.score.loss if self.score else float("inf")


def rank(average: TailAverage | None, measure: Callable[[], Score] | None) -> list[Candidate]:
    """The candidates, best first; without `measure` only the last weights, unmeasured.

    A measurement may have been cut short by the clock: they are compared on the rows that both have seen.
    """
    if measure is None:
        return [Candidate("last", None)]
    last = measure()
    if average is None or average.count < 2:
        return [Candidate("last", last)]
    with average.applied():
        other = measure()
    rows = min(len(last.per_example), len(other.per_example))
    pair = [Candidate("last", last), Candidate("average", other)]
    return sorted(pair, key=lambda c: float(c.score.per_example[:rows].mean()) if c.score else 0.0)
