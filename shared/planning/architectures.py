"""What the engine can train: one list of architectures, which the gateway asks before it accepts."""

from __future__ import annotations

from enum import StrEnum


class Batching(StrEnum):
    """How documents are put together for one pass of a model."""

    PACKED = "packed"  # one after the other in a row, attention kept within each
    PADDED = "padded"  # one in each row, filled up to the longest: slower, and right for any causal model
