"""Share a pack's documents out to a CPU's cores: each thread computes on its own documents.

A step spends about two thirds of its time in matrix products, which several cores share well, and one third
in what they don't: short documents' attention, small tensors, Python. So instead of each product the pack is
shared out. Each thread keeps its gradients until all are done; they are added in the threads' order: the
same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.data.token_noise import Noise
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.objectives import Loss

LEAST_TOKENS = 192  # of a thread: below, a pass's fixed cost outweighs what its core gives
UNEVEN = 1.25  # largest part over the mean part: beyond, the other cores would wait too long


class CpuThreads:
    """`count` threads that compute gradients at once, each with an equal share of `threads` cores."""

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self.threads = threads
        share = (threads // count,)
        self._pool = ThreadPoolExecutor(
            count, "cpu-thread", initializer=torch.set_num_threads, initargs=share
        )

    def split(self, lengths: Sequence[int]) -> list[list[int]] | None:
        """Places of a pack's examples, one list for each thread, by the largest first; None if too uneven."""
        parts: list[list[int]] = [[] for _ in range(self.count)]
        sizes = [0] * self.count
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            thread = sizes.index(min(sizes))
            parts[thread].append(place)
            sizes[thread] += lengths[place]
        if max(sizes) * self.count > UNEVEN * sum(sizes):
            return None
        return [sorted(part) for part in parts]

    def backward(
        self,
        deltas: Deltas,
        objective: Loss,
        examples: Examples,
        indices: Sequence[int],
        divisor: int,
        noise: Noise | None = None,
    ) -> Tensor | None:
        """Add a pack's gradients to the parameters'; its loss, or None if it is too uneven to share out."""
        lengths = examples.lengths[indices].tolist()
        parts = self.split(lengths)
        if parts is None:
            return None
        parameters = list(deltas.parameters.values())

        def work(part: list[int]) -> tuple[Tensor, Sequence[Tensor]]:
            # No padding: that keeps shapes the same for compiled layers, and these aren't compiled.
            size = sum(lengths[place] for place in part)
            batch = collate(examples, [indices[place] for place in part], size, noise=noise)
            loss = objective(deltas.model, batch) / divisor
            return loss.detach(), torch.autograd.grad(loss, parameters, materialize_grads=True)

        # How many cores a product takes is a thread's own setting in OpenMP, but the process's in MKL.
        torch.set_num_threads(self.threads // self.count)
        try:
            running = [self._pool.submit(work, part) for part in parts]
            wait(running)  # for all of them, also where one has failed: none may outlive its step
        finally:
            torch.set_num_threads(self.threads)
        found = [thread.result() for thread in running]
        for _, gradients in found:
            _accumulate(parameters, gradients)
        return torch.stack([loss for loss, _ in found]).sum()


def cpu_threads_for(plan: Plan, deltas: Deltas, threads: int) -> CpuThreads | None:
    """Return threads where they are exact and faster: LoRA without dropout on several CPU cores; else None.

    Dropout draws from the process's one generator; recomputed activations and compiled layers are not made
    for several threads; and with dense deltas every thread would hold whole gradients.
    """
    single = plan.parallel == "single" and not plan.compile and not plan.activation_checkpointing
    if not single or plan.dropout or deltas.dense:
        return None
    if any(parameter.device.type != "cpu" for parameter in deltas.parameters.values()):
        return None
    most = min(threads, plan.capacity // LEAST_TOKENS)
    count = max((count for count in range(1, most + 1) if threads % count == 0), default=1)
    return CpuThreads(count, threads) if count > 1 else None


def _accumulate(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[Tensor]) -> None:
    if parameters[0].grad is None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    else:
        torch._foreach_add_([parameter.grad for parameter in parameters], list(gradients))
