"""What the next checkpoint holds, by the free disk: everything, less, or nothing. Training goes on anyway.

Dense deltas of 8 billion weights: 84 GB with AdamW's moments in fp32, 56 GB with moments in 16 bits, 28 GB
without; and the export of 16 GB must still fit at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from msgspec import Struct

SPARE_BYTES = 2**30  # kept free next to the export: for the progress file, logs and the node


class CheckpointContent(IntEnum):
    """What a checkpoint holds, the most first."""

    WHOLE = 0
    NARROW_MOMENTS = 1  # a resume is not exact, but close: AdamW's moments have 8 significant bits
    WEIGHTS = 2  # a resume starts with new moments
    NOTHING = 3


DESCRIPTIONS = {
    CheckpointContent.WHOLE: "checkpoints hold everything again",
    CheckpointContent.NARROW_MOMENTS: "checkpoints hold the optimizer's moments in 16 bits",
    CheckpointContent.WEIGHTS: "checkpoints hold only the weights",
    CheckpointContent.NOTHING: "no checkpoint is written",
}


class Sizes(Struct, frozen=True, kw_only=True):
    """Bytes of what a checkpoint may hold."""

    weights: int
    moments: int  # in fp32
    extras: int  # average, and the weights at the development curve's lowest point

    def of(self, content: CheckpointContent) -> int:
        """Return the bytes of a checkpoint with this content."""
        if content is CheckpointContent.NOTHING:
            return 0
        if content is CheckpointContent.WEIGHTS:
            return self.weights
        moments = self.moments if content is CheckpointContent.WHOLE else self.moments // 2
        return self.weights + moments + self.extras


class DiskChoice(Struct, frozen=True):
    """What to write, and how many of the older checkpoints must go first."""

    content: CheckpointContent
    deleted: int = 0


def choose(
    sizes: Sizes, free: int, reserved: int, older: Sequence[int], most: CheckpointContent
) -> DiskChoice:
    """Choose the fullest content that fits, and delete as few older checkpoints for it as possible.

    `older` are the bytes that deleting each would free, the least valuable first. `reserved` bytes stay free.
    """
    for content in CheckpointContent:
        if content < most or content is CheckpointContent.NOTHING:
            continue
        room = free - reserved
        for deleted, freed in enumerate((0, *older)):
            room += freed
            if sizes.of(content) <= room:
                return DiskChoice(content, deleted)
    return DiskChoice(CheckpointContent.NOTHING)


def share_of(free: int, reserved: int, sharers: int) -> int:
    """Return the free bytes that one of several writers may count on; the reserve is there once for all."""
    return reserved + (free - reserved) // sharers


def after_failure(content: CheckpointContent) -> CheckpointContent:
    """Return the most that is tried after a checkpoint with this content could not be written.

    The free disk doesn't tell everything: a quota doesn't show in it.
    """
    return CheckpointContent(min(content + 1, CheckpointContent.WEIGHTS))
