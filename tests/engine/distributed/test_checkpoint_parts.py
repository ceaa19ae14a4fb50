"""Checkpoints that several processes write together: all of it appears, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.engine.distributed.conftest import WHOLE, WORLD, groups, newest, save
from tests.engine.positions import position
from trainer_node.engine.distributed.checkpoint_parts import Writer
from trainer_node.engine.distributed.weight_slices import cut, rows_of
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver


def test_every_process_writes_its_rows_and_any_number_reads_them(savers: list[Saver], tmp_path: Path) -> None:
    save(savers, 7)
    for saver in savers:
        saver.wait()
    found = newest(tmp_path)
    parts = {f"{group}.{rank:05d}-of-00003.safetensors" for group in groups(0) for rank in range(WORLD)}
    assert found.manifest.files.keys() == parts
    assert {path.name for path in found.folder.iterdir()} == {*parts, "manifest.json"}
    assert checkpoint.groups(found.folder) == {"weights", "optimizer"}
    assert found.has_moments
    assert torch.equal(found.tensors("weights")["w"], WHOLE)
    assert torch.equal(found.tensors("optimizer")["step/w"], torch.tensor(4.0))
    for world in (1, 2, 3, 8):
        for rank in range(world):
            first, end = rows_of(len(WHOLE), rank, world)
            assert torch.equal(cut(found.pieces("weights")["w"], first, end), WHOLE[first:end])


def test_what_has_not_changed_is_linked_by_every_process(savers: list[Saver], tmp_path: Path) -> None:
    best = [{"w": WHOLE[slice(*rows_of(len(WHOLE), rank, WORLD))] / 3} for rank in range(WORLD)]
    for step in (7, 9):
        folder = savers[0].open(step)
        assert folder is not None
        for rank, saver in enumerate(savers):
            writer = Writer(rank, WORLD, folder)
            saver.begin(position(step), groups(rank), frozen={"best": best[rank]}, writer=writer)
        for saver in savers:
            saver.wait()
    for rank in range(WORLD):
        name = f"best.{rank:05d}-of-00003.safetensors"
        assert (tmp_path / "step-00000009" / name).samefile(tmp_path / "step-00000007" / name)
    assert torch.equal(newest(tmp_path).tensors("best")["w"], WHOLE / 3)


def test_a_step_that_is_saved_again_and_fails_is_not_linked(savers: list[Saver], tmp_path: Path) -> None:
    """Its folder is that of the save before, which holds other weights."""

    def begin(step: int, values: torch.Tensor, ranks: Sequence[int]) -> None:
        folder = savers[0].open(step)
        assert folder is not None
        for rank in ranks:
            rows = values[slice(*rows_of(len(values), rank, WORLD))]
            best = held.setdefault((rank, id(values)), {"w": rows})
            writer = Writer(rank, WORLD, folder)
            savers[rank].begin(position(step), groups(rank), frozen={"best": best}, writer=writer)
        for rank in ranks:
            savers[rank].wait()

    held: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    new = WHOLE / 5
    begin(7, WHOLE / 3, range(WORLD))
    begin(7, new, range(1, WORLD))  # the first process fails
    begin(9, new, range(WORLD))
    assert torch.equal(newest(tmp_path).tensors("best")["w"], new)


def test_it_appears_when_the_last_process_is_done(savers: list[Saver], tmp_path: Path) -> None:
    save(savers, 7)
    for saver in savers:
        saver.wait()
    save(savers, 9, only=2)  # the third is slow, or about to be killed
    savers[1].wait()
    assert savers[0].written() is None
    assert newest(tmp_path).manifest.position.step == 7
    (folder,) = tmp_path.glob(".tmp-*")
    savers[2].begin(position(9), groups(2), writer=Writer(2, WORLD, folder))
    for saver in savers:
        saver.wait()
    assert newest(tmp_path).manifest.position.step == 9
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_a_kill_leaves_of_it_is_deleted_and_the_older_one_is_whole(
    savers: list[Saver], tmp_path: Path
) -> None:
    save(savers, 7)
    for saver in savers:
        saver.wait()
    folder = checkpoint.open_temporary(tmp_path, 9)  # and all are killed before rank 0 is done
    checkpoint.save(tmp_path, position(9), "rows", groups(1), {}, writer=Writer(1, WORLD, folder))
    assert len(list(folder.iterdir())) == 3
    checkpoint.clean(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
    assert torch.equal(newest(tmp_path).tensors("weights")["w"], WHOLE)


def test_kept_trials_have_all_parts(savers: list[Saver], tmp_path: Path) -> None:
    save(savers, 7)
    for saver in savers:
        saver.wait()
    checkpoint.link(newest(tmp_path).folder, tmp_path / "trials" / "000", {"weights"})
    kept = checkpoint.load(tmp_path / "trials" / "000", "weights")
    assert torch.equal(kept.tensors("weights")["w"], WHOLE)


@pytest.mark.parametrize("damage", ["one part", "no part"])
def test_a_damaged_part_damages_the_checkpoint(savers: list[Saver], tmp_path: Path, damage: str) -> None:
    for step in (7, 9):
        save(savers, step)
        for saver in savers:
            saver.wait()
    part = tmp_path / "step-00000009" / "weights.00001-of-00003.safetensors"
    content = part.read_bytes()
    part.unlink()
    if damage == "one part":
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found.manifest.position.step == 7
    assert len(said) == 1
