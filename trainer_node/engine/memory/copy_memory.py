"""Main memory for copies of tensors; of a GPU's in pinned blocks, which are five times as fast (55 GB/s)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from trainer_node.engine.memory.oom import is_out_of_memory, release_pinned

BLOCK = 2**30  # bytes
ALIGNED = 512  # where a tensor may begin in a block
K = TypeVar("K")


class BlockPlan:
    """Places for tensors in blocks of pinned memory.

    Torch rounds pinned memory up to powers of two, and keeps for good what is freed. One piece for each
    tensor would take half as much again: of a 14B model over four GPUs most are 85 MiB, and take 128. Blocks
    that are full lose nothing, and fit whatever comes next.
    """

    def __init__(self) -> None:
        self._used: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Return the block and the offset in it where `size` bytes more go."""
        size = -(-size // ALIGNED) * ALIGNED
        for block, used in enumerate(self._used):
            if used + size <= BLOCK:
                self._used[block] += size
                return block, used
        self._used.append(size)
        return len(self._used) - 1, 0

    @property
    def blocks(self) -> list[int]:
        """Return the bytes of each block, as torch rounds them."""
        return [1 << max(0, used - 1).bit_length() for used in self._used]


class CopyMemory:
    """Gives memory for copies.

    The system may allow less pinned memory than there is, and CUDA says then that it is out of memory. That
    is not the GPU's: from then on memory isn't pinned, which is reported once.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self._pins = True

    def sizes(self, tensors: Collection[torch.Tensor]) -> Iterator[int]:
        """Yield the bytes that copies of the first tensor take, of the first two, and so on."""
        layout, plain, pinned = BlockPlan(), 0, self._is_pinned(tensors)
        for tensor in tensors:
            size = bytes_of_one(tensor)
            plain += size
            if pinned:
                layout.place(size)
            yield sum(layout.blocks) if pinned else plain

    def size_of(self, tensors: Collection[torch.Tensor]) -> int:
        """Return the bytes that copies of the tensors take."""
        return max(self.sizes(tensors), default=0)

    def like(self, tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
        """Return memory for copies of the tensors."""
        if self._is_pinned(tensors.values()):
            try:
                return pinned_like(tensors)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).partition("\n")[0][:200]
            self._pins = False
            release_pinned()  # the blocks that were pinned before the one that wasn't
            self.report(f"main memory can't be pinned ({cause}): weights are copied to it more slowly")
        return {key: torch.empty_like(tensor, device="cpu") for key, tensor in tensors.items()}

    def _is_pinned(self, tensors: Iterable[torch.Tensor]) -> bool:
        return self._pins and any(tensor.is_cuda for tensor in tensors)


def pinned_like(tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """Return pinned memory for copies of the tensors, in blocks that they share."""
    layout = BlockPlan()
    places = {key: layout.place(bytes_of_one(tensor)) for key, tensor in tensors.items()}
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in layout.blocks]
    return {
        key: blocks[block][offset : offset + bytes_of_one(tensors[key])]
        .view(tensors[key].dtype)
        .view(tensors[key].shape)
        for key, (block, offset) in places.items()
    }


def bytes_of_one(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()
