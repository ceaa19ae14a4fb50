"""Follow a worker's progress.jsonl."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.logs import get_logger
from shared.messages import Progress, decode_progress

READ_BYTES = 256 << 10  # at most so much per look, so that a flood can't hold the node up
CATCH_UP_BYTES = 8 << 10

log = get_logger()


class ProgressTail:
    """Reads whole lines that were appended since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of a run that is taken on, only where it stands is news: its past was published already.
        self._offset = max(0, _size(path) - CATCH_UP_BYTES)
        self._catching_up = self._offset > 0 or _size(path) > 0

    def read(self) -> list[Progress]:
        """New lines, oldest first; a half-written last line waits for the next look. Blocks briefly."""
        size = _size(self.path)
        if size < self._offset:  # a new file
            self._offset = 0
        if size == self._offset:
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(READ_BYTES)
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) < READ_BYTES:
            return []
        end = end or len(data)  # a line longer than a whole read is no progress line: skip it
        self._offset += end
        lines = data[:end].splitlines()
        if self._catching_up:
            lines, self._catching_up = lines[-1:], False
        return [progress for line in lines if (progress := _decode(line)) is not None]


def worth_telling(lines: list[Progress]) -> list[Progress]:
    """Of the lines of one look: where the run stands, and whatever says something in words."""
    return [line for number, line in enumerate(lines, 1) if line.message or number == len(lines)]


def _decode(line: bytes) -> Progress | None:
    if not line.strip():
        return None
    try:
        return decode_progress(line)
    except msgspec.DecodeError as error:
        log.warning("a progress line can't be read", error=str(error))
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
