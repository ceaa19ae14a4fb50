"""Monitor a job's worker: publish its progress, and stop it when it hangs or is too late."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

import msgspec

from shared import subjects
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages import Job, Phase, Progress, decode_progress, encode
from trainer_node.context import NodeContext
from trainer_node.fault_injection import FaultPoint, fault_point
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.supervisor import Worker

FOLLOW_S: Final = 0.5  # between two reads of the worker's progress: watchers see it twice a second
LATE_HANG_S: Final = 20.0  # silence of a worker that should have been ready: an export of 6 GB is no stall
READ_BYTES: Final = 256 << 10  # read at once, so that a flood of lines can't hold the node up
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

    def read(self) -> list[Progress]:
        """Return the new lines, oldest first; a half-written line waits for the next read. Blocks briefly."""
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


def worth_publishing(lines: list[Progress]) -> list[Progress]:
    """Return the newest of the lines, and every other one that carries a message."""
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


class WorkerMonitor:
    """Watch a run's worker; a broker that is down stops nothing but the publishing."""

    def __init__(self, context: NodeContext, job: Job, run: RunFolder, ready_by: float) -> None:
        self.context = context
        self.job = job
        self.run = run
        self.ready_by = ready_by
        self.latest: Progress | None = None
        self.late_kill: str | None = None  # why a worker that started after `ready_by` was killed
        self._tail: ProgressTail | None = None

    async def follow(self) -> None:
        """Publish the worker's progress, kill it when it must stop, and wake the loop for its outcome."""
        seen: Worker | None = None
        last_active = time.monotonic()
        while True:
            worker = self.context.worker_of(self.job.task)
            if await self.publish() or worker is not seen:
                seen, last_active = worker, time.monotonic()
            if worker is not None and worker.alive:
                has_outcome = await asyncio.to_thread(self.run.outcome_file.exists)
                if has_outcome:
                    self.context.wake.set()
                await self._stop_if_due(worker, time.monotonic() - last_active, has_outcome)
            await asyncio.sleep(FOLLOW_S)

    async def _stop_if_due(self, worker: Worker, silent_s: float, has_outcome: bool) -> None:
        started_at = worker.file.started_at
        why = stop_reason(
            now=time.time(),
            silent_s=silent_s,
            hang_s=self.context.settings.hang_s,
            started_at=started_at,
            ready_by=self.ready_by,
            deadline_at=self.job.deadline_at,
            phase=Phase.DONE if has_outcome else self.latest.phase if self.latest else None,
        )
        if why is None:
            return
        await self.context.dismiss(why)
        if started_at >= self.ready_by:
            self.late_kill = why

    async def publish(self) -> bool:
        """Publish what the worker wrote since the last call; return whether it wrote anything."""
        if self._tail is None:
            self._tail = ProgressTail(self.run.progress_file)
        lines = await asyncio.to_thread(self._tail.read)
        if not lines:
            return False
        self.latest = lines[-1]
        if any(line.phase is Phase.TRAIN for line in lines):
            fault_point(FaultPoint.TRAINING)  # the worker trains on, and the next node adopts it
        subject = subjects.progress(self.job.slot, self.job.task)
        try:
            for line in worth_publishing(lines):
                await self.context.bus.publish(subject, encode(line))
        except BusError as error:  # only watchers miss it
            log.debug("progress not published", task=self.job.task, error=str(error))
        return True
