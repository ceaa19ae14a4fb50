"""How fast this node uploads: measured by its submissions, kept in its work folder. Blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from shared.files import write_atomically
from shared.logs import get_logger

FILE: Final = "upload_rate.json"
LEAST_BYTES: Final = 100_000_000  # of less, starting takes longer than sending
NEWEST: Final = 0.5  # weight of the newest upload

log = get_logger()


class UploadRate(Struct, frozen=True):
    """What is kept."""

    bytes_per_s: float


def measured(node: Path) -> float | None:
    """Return the measured bytes a second; None if nothing was uploaded yet."""
    try:
        kept = msgspec.json.decode((node / FILE).read_bytes(), type=UploadRate)
    except (OSError, ValueError):
        return None
    return kept.bytes_per_s if kept.bytes_per_s > 0 else None


def note(node: Path, size: int, seconds: float) -> None:
    """Count an upload of that many bytes; a small one tells nothing."""
    if size < LEAST_BYTES or seconds <= 0:
        return
    newest, known = size / seconds, measured(node)
    rate = newest if known is None else NEWEST * newest + (1 - NEWEST) * known
    try:
        write_atomically(node / FILE, msgspec.json.encode(UploadRate(rate)))
    except OSError as error:  # a full disk must not keep a submission from being reported
        log.warning("can't keep the upload's rate", error=str(error))
