"""Upstream's statistics of a task's data and base model: hints from outside, never needed, never trusted."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from msgspec import Struct

MOST_BYTES = 1 << 20


class RowCounts(Struct, frozen=True):
    """What upstream counted in the training rows."""

    num_records: float | None = None
    total_tokens: float | None = None


class StartStats(Struct, frozen=True):
    """What upstream measured on the base model."""

    init_loss: float | None = None
    masked_completion_loss: float | None = None


class BaselineStats(Struct, frozen=True):
    """The part of the statistics that the log shows."""

    dataset: RowCounts | None = None
    training: StartStats | None = None

    def summary(self) -> dict[str, float]:
        """Return the numbers that are there and are numbers."""
        found = {
            "records": self.dataset.num_records if self.dataset else None,
            "tokens": self.dataset.total_tokens if self.dataset else None,
            "base_loss": self.training.init_loss if self.training else None,
            "completion_loss": self.training.masked_completion_loss if self.training else None,
        }
        return {name: value for name, value in found.items() if value and math.isfinite(value)}


def read_stats(path: Path) -> BaselineStats | str:
    """Return the statistics in a file, or why they can't be used."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return f"more than {MOST_BYTES} bytes"
        return msgspec.json.decode(path.read_bytes(), type=BaselineStats)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        return str(error)
