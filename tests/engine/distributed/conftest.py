"""Processes that save a checkpoint together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.positions import position
from trainer_node.engine.distributed.checkpoint_parts import Writer
from trainer_node.engine.distributed.weight_slices import rows_of
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint

WHOLE = torch.arange(35, dtype=torch.float32).view(7, 5)
WORLD = 3  # of 7 rows they have 3, 3 and 1


def groups(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return what one process saves: its rows of the weights and of their moments."""
    first, end = rows_of(len(WHOLE), rank, WORLD)
    moments = {"exp_avg/w": WHOLE[first:end] / 2}
    if rank == 0:
        moments["step/w"] = torch.tensor(4.0)
    return {"weights": {"w": WHOLE[first:end]}, "optimizer": moments}


@pytest.fixture
def savers(tmp_path: Path) -> list[Saver]:
    """The savers of three processes."""
    return [
        Saver(tmp_path, "rows", {}, most_bytes=1e9, timer=lambda: 0.0, report=lambda text: None)
        for _ in range(WORLD)
    ]


def save(savers: list[Saver], step: int, only: int = WORLD) -> None:
    """Let the first processes begin a checkpoint."""
    folder = savers[0].open(step)
    assert folder is not None
    for rank, saver in enumerate(savers[:only]):
        saver.begin(position(step), groups(rank), writer=Writer(rank, WORLD, folder))


def newest(folder: Path) -> Checkpoint:
    """Return the newest checkpoint, which must be whole."""
    found = checkpoint.newest(folder, pytest.fail)
    assert found is not None
    return found
