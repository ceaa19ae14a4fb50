"""Losses and gradient norms on their way from the device: nobody waits for the step that computes them.

A GPU is given its next step while it still computes this one. So what a step found is read one step later
(`TrainState.lag`), and at once where something is decided by it: before a save, at the end. On a CPU there is
nothing to wait for, and each step is read at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one step, being copied to the host."""

    step: int
    values: Tensor  # two fp32 numbers in main memory
    copied: torch.cuda.Event | None  # None: they are there

    def read(self) -> tuple[float, float]:
        """Return loss and norm; waits for the device if it is not that far."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.values.tolist()
        return loss, norm


def begin_copy(step: int, loss: Tensor, norm: Tensor) -> StepResult:
    """Begin to copy a step's loss and norm to the host."""
    values = torch.stack([loss.float(), norm.float()])
    if values.device.type != "cuda":
        return StepResult(step, values, None)
    on_host = torch.empty(2, dtype=torch.float32, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return StepResult(step, on_host, copied)
