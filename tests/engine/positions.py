"""Where a run stands, and its checkpoint, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position
from trainer_node.engine.train.schedule import ScheduleState


def position(step: int, **changes: Any) -> Position:
    """Return that of a run that has made so many steps."""
    known: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "pack": 0,
        "tokens": 1,
        "clock_tokens": 1,
        "train_s": 0.0,
        "averaged": 0,
        "schedule": ScheduleState(begun_at=0.0),
    }
    return Position(**{**known, **changes})


def save_step(folder: Path, step: int, **tensors: torch.Tensor) -> Path:
    """Write the checkpoint of a step, of these weights or of some."""
    schedule = ScheduleState(begun_at=3.25, progress=1 / 3, step_s=[0.1])
    place = position(step, epoch=1, pack=7, tokens=99, train_s=1.5, schedule=schedule)
    group = tensors or {"w": torch.full((4, 3), float(step))}
    return checkpoint.save(folder, place, "rows", {"weights": group, "average": {}}, {"torch": "x"})
