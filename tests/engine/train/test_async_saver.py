"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.positions import position
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import CopyMemory, Saver
from trainer_node.engine.train.disk_plan import CheckpointContent, Sizes

WAIT_S = 60.0
ON_A_GPU: Any = SimpleNamespace(is_cuda=True)


def _saver(folder: Path, most_bytes: float = 1e9, report: Callable[[str], None] = lambda text: None) -> Saver:
    return Saver(folder, "rows", {}, most_bytes=most_bytes, timer=lambda: 0.0, report=report)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Opened, it lets the save go on."""
    gate, real = Event(), checkpoint.save

    def save(*args: object) -> Path:
        assert gate.wait(WAIT_S)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", save)
    return gate


def _weights(folder: Path) -> torch.Tensor:
    found = checkpoint.newest(folder, pytest.fail)
    assert found is not None
    return found.tensors("weights")["w"]


def test_what_is_written_is_the_moment_of_its_beginning(tmp_path: Path, gate: Event) -> None:
    saver, weight = _saver(tmp_path), torch.ones(3)
    saver.begin(position(1), {"weights": {"w": weight}})
    weight.add_(1.0)  # training goes on
    assert saver.written() is None
    gate.set()
    saver.wait()
    assert torch.equal(_weights(tmp_path), torch.ones(3))
    saver.begin(position(2), {"weights": {"w": weight}})  # the copy's memory is used again
    saver.wait()
    assert torch.equal(_weights(tmp_path), torch.full((3,), 2.0))


def test_without_memory_for_a_copy_training_waits(tmp_path: Path) -> None:
    saver = _saver(tmp_path, most_bytes=11)
    saver.begin(position(1), {"weights": {"w": torch.ones(3)}})
    assert torch.equal(_weights(tmp_path), torch.ones(3))
    assert saver.written() is not None
    assert saver.written() is None


def test_a_full_disk_is_reported_and_the_next_checkpoint_is_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    said: list[str] = []
    saver = _saver(tmp_path / "checkpoints", report=said.append)
    sizes = Sizes(weights=4, moments=8, extras=0)
    assert saver.make_room(sizes, 0) is CheckpointContent.WHOLE
    saver.begin(position(1), {"weights": {"w": torch.ones(3)}})
    assert saver.make_room(sizes, 0) is CheckpointContent.NARROW_MOMENTS
    assert "the checkpoint of step 1 could not be written" in said[0]
    assert "No space left on device" in said[0]
    assert saver.written() is None


def test_the_best_stretch_of_training_is_kept(tmp_path: Path) -> None:
    saver = _saver(tmp_path)
    for step, loss in enumerate([3.0, 2.0, 2.5, None, 9.0, 8.0], 1):
        saver.begin(position(step, loss=loss), {"weights": {"w": torch.ones(1)}})
    saver.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]


def test_memory_that_is_made_ready_is_what_the_first_save_copies_to(tmp_path: Path) -> None:
    saver, weight = _saver(tmp_path), torch.ones(3)
    saver.prepare({"weights": {"w": weight}})
    saver._pool.submit(lambda: None).result(WAIT_S)
    ready = saver._copies["weights", "w"].data_ptr()
    saver.begin(position(1), {"weights": {"w": weight}})
    saver.wait()
    assert saver._copies["weights", "w"].data_ptr() == ready
    assert torch.equal(_weights(tmp_path), weight)
    small = _saver(tmp_path, most_bytes=1.0)  # it would write while the run waits, without a copy
    small.prepare({"weights": {"w": weight}})
    small._pool.submit(lambda: None).result(WAIT_S)
    assert small._copies == {}


def test_a_trial_keeps_no_memory_for_copies_of_another_ones_weights(tmp_path: Path) -> None:
    saver = _saver(tmp_path)
    saver.prepare({"weights": {"w": torch.ones(3), "lora_a": torch.ones(2)}})
    saver._pool.submit(lambda: None).result(WAIT_S)
    kept = saver._copies["weights", "w"].data_ptr()
    saver.prepare({"weights": {"w": torch.ones(3)}})
    saver._pool.submit(lambda: None).result(WAIT_S)
    assert saver._copies.keys() == {("weights", "w")}
    assert saver._copies["weights", "w"].data_ptr() == kept


def test_without_pinned_memory_copies_are_slower_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bool] = []

    def allocate(tensor: Any, *, device: str, pin_memory: bool = False) -> torch.Tensor:
        tries.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return torch.zeros(3, device=device)

    monkeypatch.setattr(torch, "empty_like", allocate)
    said: list[str] = []
    memory = CopyMemory(said.append)
    for _ in range(2):
        assert memory.like(ON_A_GPU).shape == (3,)
    assert tries == [True, False, False]
    assert len(said) == 1
    assert "can't be pinned (CUDA error: out of memory)" in said[0]


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: Any, **_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty_like", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        CopyMemory(pytest.fail).like(ON_A_GPU)


def test_a_cpus_tensors_are_not_pinned() -> None:
    assert not CopyMemory(pytest.fail).like(torch.ones(3)).is_pinned()
