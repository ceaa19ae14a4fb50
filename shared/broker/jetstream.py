"""Stored messages, and the errors of JetStream when it stores none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from shared.errors import (
    BusError,
    BusUnavailableError,
    ConflictError,
    NobodyAnswersError,
    StoreFullError,
)
from shared.messages.encoding import decoder

if TYPE_CHECKING:
    from nats.aio.msg import Msg

WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})  # the second form names no sequence
STREAM_FULL: Final = frozenset({10047, 10077, 10122})

EXPECTED_STREAM: Final = "Nats-Expected-Stream"
EXPECTED_LAST: Final = "Nats-Expected-Last-Sequence"
EXPECTED_LAST_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_LAST_SUBJECT_PATTERN: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
TTL: Final = "Nats-TTL"


_decode_answer = decoder(dict[str, Any])


class Record(Struct, frozen=True):
    """One stored message. `data` is empty for a deleted key."""

    sequence: int
    subject: str
    data: bytes
    stored: str = ""  # when, by the broker's clock; RFC 3339


def answer_of(message: Msg, what: str) -> dict[str, Any]:
    """Return the fields of JetStream's answer. Raises BusUnavailableError if it can't be read."""
    try:
        return _decode_answer(message.data)
    except ValueError as error:
        raise BusUnavailableError(f"{what}: the answer can't be read: {error}") from error


def refused(error: dict[str, Any], subject: str) -> BusError:
    """Return the error to raise for an append that JetStream refused."""
    code, text = error.get("err_code"), error.get("description", "")
    if code in WRONG_LAST_SEQUENCE:
        return ConflictError(f"{subject}: {text}")
    if code in STREAM_FULL:
        return StoreFullError(f"{subject} is full ({text}): raise log_max_bytes, or archive")
    if error.get("code") == 503:
        return BusUnavailableError(f"{subject}: JetStream can't store now: {text}")
    return BusError(f"{subject} was refused: {text} (code {code})")


def record_of(message: Msg, stream: str) -> Record | None:
    """Return the stored message of a direct get; None = there is none, or no more. Raises BusError."""
    headers = message.headers or {}
    status = headers.get("Status")
    if status in ("404", "204"):
        return None
    if status == "503":
        raise NobodyAnswersError(f"reading {stream} failed: 503, no such stream, or JetStream is starting")
    if status is not None:
        raise BusError(f"reading {stream} failed: {status} {headers.get('Description', '')}")
    stored = headers.get("Nats-Time-Stamp", "")
    return Record(int(headers["Nats-Sequence"]), headers["Nats-Subject"], message.data, stored)
