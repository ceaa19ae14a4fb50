"""The mirror's file: one JSON line per stored record of all logs, after a line that names the format.

    {"mirror": 1, "gateway": "..."}
    {"stream": "JOBS", "sequence": 1, "subject": "podium.jobs.a.t1", "stored": "2026-...", "data": {...}}

A record that is not JSON on one line is kept as `base64`. A kill can only cut the last line short. Lines of
STATE, once the log of all slots, are read as lines of their slot's log, which has the same sequences.
"""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from shared import subjects
from shared.broker.jetstream import Record
from shared.errors import PodiumError
from shared.messages.encoding import decode, decoder


class DamagedMirrorError(PodiumError):
    """A line before the last one can't be read, or the lines are out of order."""


class Header(Struct, frozen=True):
    """The first line."""

    mirror: int  # version of the format
    gateway: str


NOTHING = msgspec.Raw()


class Line(Struct, frozen=True, omit_defaults=True):
    """One record."""

    stream: str
    sequence: int
    subject: str
    stored: str = ""
    data: msgspec.Raw = NOTHING
    base64: str | None = None

    @property
    def content(self) -> bytes:
        """Return the record's data, byte for byte."""
        return bytes(self.data) if self.base64 is None else base64.b64decode(self.base64)


class Content(Struct, frozen=True):
    """The content of a mirror. `end` is where the last whole line ends; `size` is the file's."""

    records: dict[str, list[Record]]  # by stream, oldest first
    end: int
    size: int

    @property
    def states(self) -> list[str]:
        """Return the names of the slots' logs; also of slots that only have jobs."""
        named = [subjects.slot_in(record.subject) for record in self.records.get(subjects.JOBS_STREAM, ())]
        logs = {subjects.state_stream(slot) for slot in named if slot is not None}
        return sorted(logs | self.records.keys() - {subjects.JOBS_STREAM})

    def of(self, stream: str) -> list[Record]:
        """Return the records of a stream, oldest first."""
        return self.records.get(stream, [])

    def last(self, stream: str) -> int:
        """Sequence of the newest record of a stream; 0 if there is none."""
        records = self.of(stream)
        return records[-1].sequence if records else 0

    def missing(self, stream: str) -> int:
        """Return how many sequences are missing between the file's first and last record of a stream.

        A log that was split from STATE keeps STATE's sequences. Gaps that other slots' records fill don't
        count; from the first sequence on that two logs share, each log counts alone.
        """
        records = self.of(stream)
        if not records:
            return 0
        first, last = records[0].sequence, records[-1].sequence
        found = {record.sequence for record in records}
        if stream != subjects.JOBS_STREAM:
            logs = Counter(record.sequence for log in self.states for record in self.of(log))
            end = min((sequence for sequence, count in logs.items() if count > 1), default=last)
            found |= {sequence for sequence in logs if first < sequence < end}
        return last - first + 1 - sum(sequence <= last for sequence in found)


_header = decoder(Header)
_line = decoder(Line)


def encode_line(stream: str, record: Record) -> bytes:
    """Return one line, with its line break."""
    data, text = msgspec.Raw(record.data), None
    if not _fits_a_line(record.data):
        data, text = NOTHING, base64.b64encode(record.data).decode()
    line = Line(stream, record.sequence, record.subject, record.stored, data, text)
    return msgspec.json.encode(line) + b"\n"


def read_mirror(path: Path) -> Content:
    """Read a whole mirror. Raises DamagedMirrorError naming the line, and OSError."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    records: dict[str, list[Record]] = {}
    for number, text in enumerate(lines, 1):
        try:
            if number == 1:
                _header(text)
                continue
            line = _line(text)
            stream = _log_of(line)
            if stream is None:
                continue
            known = records.setdefault(stream, [])
            if known and line.sequence <= known[-1].sequence:
                raise ValueError(f"sequence {line.sequence} comes after {known[-1].sequence}")
            known.append(Record(line.sequence, line.subject, line.content, line.stored))
        except ValueError as error:
            raise DamagedMirrorError(f"{path}, line {number}, is damaged: {error}") from error
    return Content(records, end, len(data))


def _log_of(line: Line) -> str | None:
    """Return the stream that has a line's record; None for one of the old STATE that was of no slot.

    Raises ValueError for a stream that is no log.
    """
    slot = subjects.slot_in(line.subject)
    if line.stream == subjects.OLD_STATE_STREAM:
        return None if slot is None else subjects.state_stream(slot)
    if line.stream != subjects.JOBS_STREAM and (slot is None or line.stream != subjects.state_stream(slot)):
        raise ValueError(f"{line.stream} is no log of {line.subject}")
    return line.stream


def _fits_a_line(data: bytes) -> bool:
    """Return whether the bytes are one JSON value that survives a line unchanged."""
    if b"\n" in data or b"\r" in data or data != data.strip():
        return False
    try:
        decode(data, Any)
    except ValueError:
        return False
    return bool(data)
