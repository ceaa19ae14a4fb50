"""Read traces of offers: JSON lines from a simulator or a gateway (`decisions.jsonl`).

    {"at": 12.0, "offer": {"task_id": ..., "task_type": ..., "model": ..., "hours_to_complete": ...},
     "start_after_s": 40.0}

`start_after_s` null = accepted, but never started; omitted = started at once. A line may also have the
recorded outcome of the task: `ran_s`, `delivered`, `score`. Unknown fields are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from shared.errors import PodiumError
from shared.messages.encoding import decoder
from shared.messages.offers import BareOffer, Decision

Seconds = Annotated[float, Meta(ge=0)]


class TraceLine(Struct, frozen=True, kw_only=True):
    """One offer, its time, and the known outcome."""

    at: float  # seconds since any fixed moment
    offer: BareOffer
    start_after_s: Seconds | None = 0.0
    ran_s: Seconds | None = None  # how long it held its slot, once started
    delivered: bool | None = None
    score: float | None = None  # upstream's


class Trace(Struct, frozen=True):
    """Offers in order of time; `skipped` counts lines without an offer."""

    lines: list[TraceLine]
    skipped: int


class _Kind(Struct, frozen=True):
    at: float | None = None
    decided_at: float | None = None


_kind = decoder(_Kind)
_line = decoder(TraceLine)
_decision = decoder(Decision)


def read_trace(path: Path) -> Trace:
    """Read a trace or a gateway's decisions. Raises PodiumError that names the bad line."""
    lines, skipped = list[TraceLine](), 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                line = _read(text, f"{path}, line {number}")
                skipped += line is None
                lines += [line] if line is not None else []
    except OSError as error:
        raise PodiumError(f"{path} can't be read: {error.strerror}") from error
    if not lines:
        raise PodiumError(
            f"{path} holds no offers" + (f"; {skipped} decisions without one" if skipped else "")
        )
    return Trace(sorted(lines, key=lambda line: line.at), skipped)


def _read(text: bytes, where: str) -> TraceLine | None:
    """Parse one line; return None for a decision of a version that didn't write the offer."""
    try:
        kind = _kind(text)
        if kind.at is None and kind.decided_at is not None:
            offer = _decision(text).offer
            return TraceLine(at=kind.decided_at, offer=offer) if offer is not None else None
        return _line(text)
    except ValueError as error:
        raise PodiumError(
            f"{where}: {error}; a line is an object with at (seconds) and offer, or a gateway's decision"
        ) from error
