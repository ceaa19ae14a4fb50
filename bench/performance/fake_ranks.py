"""One process that believes to be one of several, so that DDP and FSDP2 take the memory that they take there.

Torch's fake process group exchanges nothing; the buffers of an exchange are made all the same. Three things
need values, which fake tensors don't have, and have stand-ins: the check that all processes have the same
weights, DDP's second order of its buckets (as large in all; the old ones are freed before), and its notes of
the weights that were used. What one stream frees and another can't take again is not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench.performance.storage_counter import StorageCounter
from trainer_node.engine.distributed import sharding
from trainer_node.engine.distributed.weight_slices import Rows
from trainer_node.engine.model.adapters import Deltas, stable_name


class _FakeDDP(DistributedDataParallel):  # type: ignore[misc]
    """DDP whose exchange is over at once: the fake group's answer is empty, where DDP expects the bucket."""

    __signature__ = signature(DistributedDataParallel)  # the engine looks at its arguments' names

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda _, bucket: _at_once(bucket))  # DDP looks at the names


def _at_once(bucket: Any) -> Any:
    answer: Any = torch.futures.Future()
    answer.set_result(bucket.buffer())
    return answer


class EveryWeightIsUsed(TorchDispatchMode):  # type: ignore[misc]
    """Answers DDP's question how often a weight was used, the one number that it reads from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or answer."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.int32:
            return 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_ranks(world: int, counter: StorageCounter) -> Iterator[DeviceMesh | None]:
    """Let this process be rank 0 of `world`, and give their mesh; enter it before the fake tensors' mode."""
    if world == 1:
        yield None
        return
    excepthook = sys.excepthook
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = init_device_mesh("cpu", (world,))
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (sharding, "init_device_mesh", lambda *_: mesh),
        (sharding, "check_sharded", lambda _: None),  # compares what a model computes
        (sharding, "DistributedDataParallel", _FakeDDP),
        (ddp, "_verify_param_shape_across_processes", lambda *_, **__: None),
        (dist.Reducer, "_rebuild_buckets", lambda _: False),
        (ShardingPropagator, _SIZES, _uncounted(getattr(ShardingPropagator, _SIZES), counter)),
    )
    try:
        with ExitStack() as stack:
            for place, name, stand_in in stand_ins:
                stack.enter_context(patch.object(place, name, stand_in))
            yield mesh
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook  # the group had put one of its own there


_SIZES = "_propagate_tensor_meta_non_cached"  # DTensor learns an answer's size from fake tensors of its own


def _uncounted(method: Callable[..., Any], counter: StorageCounter) -> Callable[..., Any]:
    def found(*args: Any, **kwargs: Any) -> Any:
        with counter.paused():
            return method(*args, **kwargs)

    return found


def empty_slices(deltas: Deltas) -> dict[str, Rows]:
    """Return what gives rows of each weight that a sharded model is filled with: without values."""

    def rows(weight: Tensor) -> Rows:
        shape, dtype = weight.shape[1:], weight.dtype
        return lambda first, end: torch.empty((end - first, *shape), dtype=dtype)

    return {stable_name(name): rows(weight) for name, weight in deltas.network.named_parameters()}
