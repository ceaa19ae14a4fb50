"""What a worker's progress tells its supervisor: the lines it wrote, and whether it must be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from shared.logs import get_logger
from shared.messages.runs import Phase, Progress, decode_progress

LATE_HANG_S: Final = 20.0  # silence of a worker that should have been ready: an export of 6 GB is no stall
READ_BYTES: Final = 256 << 10  # read at once, so that a flood of lines can't hold the supervisor up
CATCH_UP_BYTES: Final = 8 << 10  # of an adopted run: enough for its newest line
FINISHING: Final = frozenset({Phase.CHOOSE, Phase.EXPORT, Phase.VERIFY, Phase.DONE})

log = get_logger()


def stop_reason(
    *,
    now: float,
    silent_s: float,
    hang_s: float,
    started_at: float,
    ready_by: float,
    deadline_at: float,
    phase: Phase | None,
) -> str | None:
    """Return why a running worker must be killed and restarted, or None.

    A worker that should have been ready is replaced when it stalls, or when it isn't finishing at the
    deadline. Its successor immediately submits what is on disk: the finished export or the newest checkpoint.
    The margin before upstream's own deadline is for that. A worker that started after the time was over is a
    successor, and continues.
    """
    late = started_at < ready_by <= now
    if silent_s >= (min(hang_s, LATE_HANG_S) if late else hang_s):
        return f"no progress for {silent_s:.0f} s"
    if now >= deadline_at and late and phase not in FINISHING:
        return "the deadline passed"
    return None


class ProgressTail:
    """Reads the whole lines that were appended to a worker's `progress.jsonl` since the last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of an adopted run only the newest line is new: an earlier node published the others.
        self._offset = max(0, _size(path) - CATCH_UP_BYTES)
        self._catching_up = self._offset > 0 or _size(path) > 0
        self._modified_ns = 0
        self.is_active = False  # the file was written, or on a full disk touched, since the read before

    def read(self) -> list[Progress]:
        """Return the new lines, oldest first; a half-written line waits for the next read. Blocks briefly."""
        size, modified_ns = _size_and_time(self.path)
        self.is_active, self._modified_ns = modified_ns != self._modified_ns, modified_ns
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


def _decode(line: bytes) -> Progress | None:
    if not line.strip():
        return None
    try:
        return decode_progress(line)
    except ValueError as error:
        log.warning("a progress line can't be read", error=str(error))
        return None


def _size(path: Path) -> int:
    return _size_and_time(path)[0]


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return a file's bytes and when it was modified, in ns; zeros if there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
