"""Which weights to submit, by the development metric.

The last ones, or their average over the run's tail; if these are worse than the base model's, an earlier
checkpoint's, or in the end the base model's own (see finish.choose).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec import Struct

from trainer_node.engine.distributed.sharding import placed
from trainer_node.engine.distributed.weight_slices import joined
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.model.adapters import Deltas

Weights = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]  # whole or in blocks of rows
ENOUGH_ROWS = 32  # to compare candidates on the same rows


def whole(weights: Weights) -> dict[str, torch.Tensor]:
    """Return weights with blocks of rows put together."""
    return {
        name: value if isinstance(value, torch.Tensor) else joined(value) for name, value in weights.items()
    }


@contextmanager
def loaded(deltas: Deltas, weights: Callable[[], Weights]) -> Iterator[None]:
    """Load other weights into the model, and put back on exit those it had, of which a copy is kept."""
    before = {name: value.clone() for name, value in deltas.state().items()}
    deltas.load_state({name: placed(value, deltas.parameters[name]) for name, value in weights().items()})
    try:
        yield
    finally:
        deltas.load_state(before)


class TrainProgress(Struct, frozen=True):
    """How far training had come."""

    step: int
    tokens: int
    train_s: float
    skipped: int = 0  # steps without a finite gradient


@dataclass(frozen=True)
class Candidate:
    """One set of weights that could be submitted; inside `weights_applied()` the model has them."""

    name: str
    reached: TrainProgress
    score: Evaluation | None = None  # None = there was no time to measure it
    weights_applied: Callable[[], AbstractContextManager[None]] = nullcontext
    held_out: Evaluation | None = None  # to be reported instead, if these weights were trained on its rows

    def measured(self, measure: Callable[[], Evaluation]) -> Candidate:
        """With its score."""
        with self.weights_applied():
            return replace(self, score=measure())


def loss_over_base(candidate: Candidate, base_losses: Sequence[float], most: int | None = None) -> float:
    """Return how much worse than the base model it is on the rows that it was measured on.

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
    return sorted(candidates, key=lambda c: loss_over_base(c, base_losses, max(common, ENOUGH_ROWS)))
