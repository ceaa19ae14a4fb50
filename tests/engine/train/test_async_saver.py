"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from tests.engine.memory.test_copy_memory import OnGpu
from tests.engine.positions import position
from trainer_node.engine.safetensors_file import write_tensors
from trainer_node.engine.train import async_saver, checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.disk_plan import CheckpointContent, Sizes

WAIT_S = 60.0


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


@pytest.mark.parametrize("most", [0, 11, 12, 24, 35, 48])
def test_what_has_no_copy_is_on_its_way_before_training_goes_on(tmp_path: Path, most: int) -> None:
    saver = _saver(tmp_path, most_bytes=most)
    groups = {
        "weights": {"w": torch.ones(3), "v": torch.ones(1)},
        "optimizer": {"exp_avg/w": torch.ones(3), "exp_avg/v": torch.ones(1)},
        "average": {"w": torch.ones(3)},
    }
    for step in (1, 2):
        saver.begin(position(step), groups)
        for group in groups.values():
            for tensor in group.values():
                tensor.add_(1.0)  # training goes on
        saver.wait()
        found = checkpoint.newest(tmp_path, pytest.fail)
        assert found is not None
        for name, group in groups.items():
            written = found.tensors(name)
            assert written.keys() == group.keys()
            assert all(torch.equal(written[key], group[key] - 1.0) for key in group)
        assert sum(copy.nbytes for copy in saver._copies.values()) <= most


def test_training_waits_for_no_more_than_what_has_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, order, real = Event(), list[str](), write_tensors

    def write(path: Path, tensors: checkpoint.Tensors, **options: Any) -> Any:
        order.extend(f"{path.stem} {name}" for name in tensors)
        if path.stem == "weights":
            assert gate.wait(WAIT_S)
        return real(path, tensors, **options)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    saver = _saver(tmp_path, most_bytes=16)  # of 24
    moments = {"exp_avg/w": torch.ones(1), "exp_avg_sq/w": torch.ones(2)}
    saver.begin(position(1), {"weights": {"w": torch.ones(3)}, "optimizer": moments})
    assert saver.is_writing
    gate.set()
    saver.wait()
    assert order == ["optimizer exp_avg_sq/w", "optimizer exp_avg/w", "weights w"]


def test_a_save_that_fails_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Path:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(checkpoint, "save", fails)
    saver = _saver(tmp_path, most_bytes=0)
    saver.begin(position(1), {"weights": {"w": torch.ones(3)}})
    with pytest.raises(RuntimeError, match="the device is gone"):
        saver.wait()


def test_what_a_checkpoint_took_is_told_once(tmp_path: Path) -> None:
    saver = _saver(tmp_path)
    saver.begin(position(1), {"weights": {"w": torch.ones(3)}})
    saver._pool.submit(lambda: None).result(WAIT_S)
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
    small = _saver(tmp_path, most_bytes=12.0)  # the moments would be written while the run waits
    small.prepare({"weights": {"w": weight}, "optimizer": {"exp_avg/w": weight}})
    small._pool.submit(lambda: None).result(WAIT_S)
    assert small._copies.keys() == {("weights", "w")}


def test_memory_that_is_not_pinned_is_touched_before_the_first_save(tmp_path: Path) -> None:
    """Also of a GPU's tensors, if memory can't be pinned."""
    saver, made = _saver(tmp_path), torch.full((3,), 7.0)
    saver.memory.like = lambda tensors: dict.fromkeys(tensors, made)  # type: ignore[method-assign]
    saver.prepare({"weights": {"w": OnGpu(torch.ones(3))}})
    saver._pool.submit(lambda: None).result(WAIT_S)
    assert made.tolist() == [0.0, 0.0, 0.0]


def test_where_main_memory_runs_out_training_waits_for_the_disk(tmp_path: Path) -> None:
    said: list[str] = []
    saver, weight = _saver(tmp_path, report=said.append), torch.ones(3)

    def refused(_: object) -> dict[object, torch.Tensor]:
        raise RuntimeError("can't allocate memory: you tried to allocate 12 bytes")

    saver.memory.like = refused  # type: ignore[assignment, method-assign]
    for step in (1, 2):
        saver.begin(position(step), {"weights": {"w": weight}})
        weight.add_(1.0)  # training goes on
        saver.wait()
        assert torch.equal(_weights(tmp_path), torch.full((3,), float(step)))
    assert len(said) == 1
    assert "main memory ran out" in said[0]


def test_a_trial_keeps_no_memory_for_copies_of_another_ones_weights(tmp_path: Path) -> None:
    saver = _saver(tmp_path, most_bytes=24)
    saver.prepare({"weights": {"w": torch.ones(3), "lora_a": torch.ones(2)}})
    saver.prepare({"weights": {"v": torch.ones(3)}, "average": {}})
    saver.prepare({"weights": {"v": torch.ones(3)}, "average": {"v": torch.ones(3)}})
    saver._pool.submit(lambda: None).result(WAIT_S)
    assert saver._copies.keys() == {("weights", "v"), ("average", "v")}
    kept = saver._copies["average", "v"].data_ptr()
    saver.prepare({"weights": {"v": torch.ones(3)}, "average": {}})  # the next trial has no average yet
    saver._pool.submit(lambda: None).result(WAIT_S)
    assert saver._copies["average", "v"].data_ptr() == kept


def test_after_training_no_memory_is_held(
    tmp_path: Path, gate: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    monkeypatch.setattr(async_saver, "release", lambda: released.append(True))
    saver = _saver(tmp_path, most_bytes=12)
    saver.prepare({"weights": {"w": torch.zeros(3)}})
    saver.begin(position(1), {"weights": {"w": torch.ones(3)}}, frozen={"best": {"w": torch.ones(3)}})
    gate.set()
    saver.free()
    assert (saver._copies, saver._frozen, released) == ({}, {}, [True])
    assert torch.equal(_weights(tmp_path), torch.ones(3))
    saver.begin(position(2), {"weights": {"w": torch.ones(3)}})  # there is room again
    assert len(saver._copies) == 1
    saver.wait()
