"""Memory that ran out, in the words of torch, CUDA, NCCL and cuBLAS."""

from __future__ import annotations

import gc
import weakref

import torch

from trainer_node.engine.memory.oom import is_out_of_memory, release


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_what_was_alive_at_the_first_step_is_freed_too() -> None:
    """Compiled layers refer to themselves, and the first step takes all that lives out of collections."""
    layer = torch.nn.Linear(2, 2)
    layer.itself = [layer]
    gone = weakref.ref(layer)
    gc.freeze()
    try:
        del layer
        release()
        assert gone() is None
    finally:
        gc.unfreeze()
