"""Memory for copies: pinned in blocks for a GPU's tensors, and counted as it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer_node.engine.memory import copy_memory
from trainer_node.engine.memory.copy_memory import BLOCK, BlockPlan, CopyMemory

MIB = 2**20
# The rows that each of four processes has of a layer's matrices, in fp32.
LAYERS = {
    "Llama 8B": [16 * MIB, 4 * MIB, 4 * MIB, 16 * MIB, *[56 * MIB] * 3] * 32,
    "Qwen3 14B": [25 * MIB, 5 * MIB, 5 * MIB, 25 * MIB, *[85 * MIB] * 3] * 40,
}


class OnGpu(torch.Tensor):  # type: ignore[misc]
    """A tensor that says that it is a GPU's."""

    @property
    def is_cuda(self) -> bool:
        return True


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor: torch.Tensor = torch.ones(shape, dtype=dtype).as_subclass(OnGpu)
    return tensor


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each pinned block that was made; here it is memory as any other."""
    made: list[int] = []
    real: Callable[..., torch.Tensor] = torch.empty

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(size)
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    return made


@pytest.mark.parametrize("model", LAYERS)
def test_blocks_lose_little_where_single_pieces_are_rounded_up(model: str) -> None:
    sizes, layout = [size for size in LAYERS[model] for _ in range(3)], BlockPlan()
    places = [layout.place(size) for size in sizes]
    assert sum(layout.blocks) < 1.01 * sum(sizes) + BLOCK
    assert all(block & (block - 1) == 0 for block in layout.blocks)
    ends: dict[int, int] = {}
    for (block, offset), size in zip(places, sizes, strict=True):
        assert offset >= ends.get(block, 0)  # no two share a byte
        ends[block] = offset + size
        assert ends[block] <= layout.blocks[block]


def test_a_tensor_larger_than_a_block_has_its_own() -> None:
    layout = BlockPlan()
    assert [layout.place(size) for size in (5, BLOCK + 1, 7, 0)] == [(0, 0), (1, 0), (0, 512), (0, 1024)]
    assert layout.blocks == [1024, 2 * BLOCK]


def test_copies_of_a_gpus_tensors_share_pinned_blocks(
    pinned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_memory, "BLOCK", 2048)
    tensors = {
        "a": on_gpu(200),
        "b": on_gpu(3, 100, dtype=torch.bfloat16),
        "step": on_gpu(),
        "none": on_gpu(0, 7),
        "long": on_gpu(700),
    }
    memory = CopyMemory(pytest.fail)
    copies = memory.like(tensors)
    assert pinned == [2048, 512, 4096]
    assert memory.size_of(tensors.values()) == sum(pinned)
    for number, (name, copy) in enumerate(copies.items()):
        assert (copy.shape, copy.dtype) == (tensors[name].shape, tensors[name].dtype)
        copy.fill_(number)
    assert all((copy == number).all() for number, copy in enumerate(copies.values()))


def test_what_copies_take_is_told_one_by_one() -> None:
    memory = CopyMemory(pytest.fail)
    assert list(memory.sizes([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])) == [12, 16]
    assert list(memory.sizes([on_gpu(3), on_gpu(500), on_gpu(1)])) == [512, 4096, 4096]
    assert memory.size_of([]) == 0


def test_without_pinned_memory_copies_are_slower_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bool] = []

    released: list[bool] = []  # torch keeps blocks that were pinned before
    monkeypatch.setattr(copy_memory, "release_pinned", lambda: released.append(True))

    def refuse(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        tries.append(pin_memory)
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch, "empty", refuse)
    said: list[str] = []
    memory = CopyMemory(said.append)
    for _ in range(2):
        assert memory.like({"w": on_gpu(3)})["w"].shape == (3,)
    assert tries == released == [True]
    assert len(said) == 1
    assert "can't be pinned (CUDA error: out of memory)" in said[0]
    assert memory.size_of([on_gpu(3)]) == 12


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        CopyMemory(pytest.fail).like({"w": on_gpu(3)})


def test_a_cpus_tensors_are_not_pinned() -> None:
    assert not CopyMemory(pytest.fail).like({"w": torch.ones(3)})["w"].is_pinned()
