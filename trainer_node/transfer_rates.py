"""How fast this node downloads models and uploads submissions: kept in its work folder. Blocks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from shared.files import write_atomically
from shared.logs import get_logger
from shared.messages.encoding import decode

LEAST_BYTES: Final = 100_000_000  # of less, starting takes longer than sending
NEWEST: Final = 0.5  # weight of the newest transfer

log = get_logger()


class Direction(StrEnum):
    """Where the bytes go."""

    DOWNLOAD = "download"
    UPLOAD = "upload"


class TransferRate(Struct, frozen=True):
    """What is kept."""

    bytes_per_s: float


def rate_file(node: Path, direction: Direction) -> Path:
    """Return where a rate is kept."""
    return node / f"{direction}_rate.json"


def measured(node: Path, direction: Direction) -> float | None:
    """Return the measured bytes a second; None if nothing large was moved that way yet."""
    try:
        kept = decode(rate_file(node, direction).read_bytes(), TransferRate)
    except (OSError, ValueError):
        return None
    return kept.bytes_per_s if kept.bytes_per_s > 0 else None


def note(node: Path, direction: Direction, size: int, seconds: float) -> None:
    """Count a transfer of that many bytes; a small one tells nothing."""
    if size < LEAST_BYTES or seconds <= 0:
        return
    newest, known = size / seconds, measured(node, direction)
    rate = newest if known is None else NEWEST * newest + (1 - NEWEST) * known
    try:
        write_atomically(rate_file(node, direction), msgspec.json.encode(TransferRate(rate)))
    except OSError as error:  # a full disk must not keep a submission from being reported
        log.warning("can't keep the rate of transfers", direction=direction.value, error=str(error))
