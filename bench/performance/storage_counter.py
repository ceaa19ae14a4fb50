"""Counts the bytes of all tensors' storages while they live, as a GPU's allocator would hand them out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU_ALIGNMENT = 512  # bytes: what CUDA's allocator rounds up to


class StorageCounter(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of all storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.present = self.peak = 0
        self._alive: dict[int, int] = {}
        self._paused = False
        self._patch: Any = None

    def __enter__(self) -> StorageCounter:
        """Count from now on, and also what becomes of storages that FSDP2 empties and fills again."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            found = original(storage, size)
            self._set(storage)
            return found

        self._patch = patch.object(torch.UntypedStorage, "resize_", resize_)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Count no longer."""
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made; a sharded tensor's is run, and counted, on its shard."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.count(one)
        return found

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive and not self._paused:
            self._set(storage)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing new inside: tensors that have no values on a real device either."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _set(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = 0
            weakref.finalize(storage, self._freed, key)
        size = -(-storage.nbytes() // GPU_ALIGNMENT) * GPU_ALIGNMENT
        self.present += size - self._alive[key]
        self._alive[key] = size
        self.peak = max(self.peak, self.present)

    def _freed(self, key: int) -> None:
        self.present -= self._alive.pop(key)
