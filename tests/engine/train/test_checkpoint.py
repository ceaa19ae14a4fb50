"""Checkpoints: whole or not there, and exact."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
import torch

from tests.engine.positions import position, save_step
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 7),
        "b.c/d": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3.0),
        "transposed": torch.randn(4, 6).T,
        "empty": torch.empty(0, 2),
        "counts": torch.arange(4),
    }
    save_step(tmp_path, 12, **tensors)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    loaded = found.tensors("weights")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert found.tensors("average") == {}
    place = found.manifest.position
    assert (place.step, place.epoch, place.pack, place.tokens) == (12, 1, 7, 99)
    assert place.schedule.progress == 1 / 3


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 20, 300):
        save_step(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000300"]


def test_checkpoints_of_a_failed_trial_make_room_for_the_next_ones(tmp_path: Path) -> None:
    for step in (5, 300, 400):
        save_step(tmp_path, step)
    checkpoint.drop_later(tmp_path, 5)
    for step in (7, 20):
        save_step(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007", "step-00000020"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    save_step(tmp_path, 5, w=torch.zeros(2))
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert torch.equal(found.tensors("weights")["w"], torch.zeros(2))


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "no manifest", "bad manifest", "bad text", "nested", "missing file"]
)
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path: Path, damage: str) -> None:
    save_step(tmp_path, 1)
    folder = save_step(tmp_path, 2)
    weights, manifest = folder / "weights.safetensors", folder / "manifest.json"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:-8])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    elif damage == "bad text":
        manifest.write_bytes(manifest.read_bytes().replace(b".safetensors", b".safeten\xff\xff\xff\xff"))
    elif damage == "nested":
        manifest.write_bytes(b'{"more": ' + b"[" * 100_000)
    else:
        weights.unlink()
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found.manifest.position.step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_of_a_checkpoint_that_is_only_scored_the_rest_is_not_read(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["optimizer.safetensors"] = {"bytes": 5, "sha256": "of what is lost"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    assert next(checkpoint.whole(tmp_path, said.append), None) is None
    assert len(said) == 1
    (found,) = checkpoint.whole(tmp_path, pytest.fail, only="weights")
    assert found.manifest.position.step == 1


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none", pytest.fail) is None
    folder = save_step(tmp_path, 1)
    (folder / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path, lambda text: None) is None


def test_a_failed_save_leaves_the_old_one_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        save_step(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_clean_removes_what_a_killed_save_left(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    (tmp_path / ".tmp-00000002-17").mkdir()
    (tmp_path / ".tmp-00000002-17" / "weights.safetensors").write_bytes(b"half")
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_an_earlier_version_is_read() -> None:
    """Its name on disk stays: a box is upgraded while jobs run."""
    place = position(3)
    assert b'"pulse":' in msgspec.json.encode(place)
    assert msgspec.json.decode(msgspec.json.encode(place), type=Position) == place
