"""The average of the weights over the tail of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from trainer_node.engine.distributed.sharding import local

TAIL = 0.8  # of progress: from here on the average runs; before, it would cost memory and time for nothing
# Steps from one update of the average to the next. An update makes a step a third longer on a CPU
# (SmolLM2-135M: 2.2 s in place of 1.6 s), and the weights of neighbouring steps are much the same.
EVERY = 4


class TailAverage:
    """The equal-weight mean of the trainable weights after each fourth step of the tail, in fp32.

    Runs of fewer than 40 steps may have none. Costs one copy of the trainable weights, only in the tail. Part
    of the checkpoint, so that a resumed run has the same candidates.
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
        self.count += 1  # last: if memory ran out, this step was not added

    def reset(self) -> None:
        """Forget all weights: the run went back to earlier ones."""
        self.weights, self.count = {}, 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap in the averaged weights, tensor by tensor to save memory; swap back on exit."""
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
