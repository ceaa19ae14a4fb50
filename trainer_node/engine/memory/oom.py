"""Memory that ran out: telling it from everything else that can go wrong, and giving back what isn't used."""

from __future__ import annotations

import gc

import torch

# Of torch on a CPU; of CUDA and NCCL outside torch's allocator; of cuBLAS, whose workspace comes late.
SIGNS = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: CUDA's class, Python's, or a text of torch's."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)


def is_broken_device(error: BaseException) -> bool:
    """Return whether nothing works on this process's device any more, so that all must start again."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def release() -> None:
    """Free what nothing refers to any more; sharded modules and compiled layers refer to themselves.

    So it needs a collection, also of what was taken out of them at the first step.
    """
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_pinned()


def release_pinned() -> None:
    """Give the system back the pinned main memory that nothing refers to any more; torch keeps it."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)  # some versions of torch lack it
    if empty is not None and torch.cuda.is_available():
        empty()
