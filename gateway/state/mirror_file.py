"""The mirror's file: one JSON line per stored record of JOBS and STATE, after a line that names the format.

    {"mirror": 1, "gateway": "..."}
    {"stream": "JOBS", "sequence": 1, "subject": "podium.jobs.a.t1", "stored": "2026-...", "data": {...}}

A record that is not JSON on one line is kept as `base64`. A kill can only cut the last line short.
"""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
from msgspec import Struct

from shared import subjects
from shared.broker.jetstream import Record
from shared.errors import PodiumError

LOGS = (subjects.STATE_STREAM, subjects.JOBS_STREAM)


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

    def last(self, stream: str) -> int:
        """Sequence of the newest record of a stream; 0 if there is none."""
        records = self.records[stream]
        return records[-1].sequence if records else 0

    def missing(self, stream: str) -> int:
        """Return how many sequences are missing between the file's first and last record."""
        records = self.records[stream]
        return records[-1].sequence - records[0].sequence + 1 - len(records) if records else 0


_header = msgspec.json.Decoder(Header)
_line = msgspec.json.Decoder(Line)


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
    records: dict[str, list[Record]] = {stream: [] for stream in LOGS}
    for number, text in enumerate(lines, 1):
        try:
            if number == 1:
                _header.decode(text)
                continue
            line = _line.decode(text)
            known = records[line.stream]
            if known and line.sequence <= known[-1].sequence:
                raise ValueError(f"sequence {line.sequence} comes after {known[-1].sequence}")
            known.append(Record(line.sequence, line.subject, line.content, line.stored))
        except (ValueError, KeyError) as error:
            raise DamagedMirrorError(f"{path}, line {number}, is damaged: {error}") from error
    return Content(records, end, len(data))


def _fits_a_line(data: bytes) -> bool:
    """Return whether the bytes are one JSON value that survives a line unchanged."""
    if b"\n" in data or b"\r" in data or data != data.strip():
        return False
    try:
        msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return False
    return bool(data)
