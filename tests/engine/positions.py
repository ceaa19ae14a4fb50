"""Where a run stands, for tests of its checkpoints."""

from __future__ import annotations

from typing import Any

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
        "pulse": ScheduleState(begun_at=0.0),
    }
    return Position(**{**known, **changes})
