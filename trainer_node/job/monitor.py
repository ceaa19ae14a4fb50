"""Follow a job's worker: tell others where it stands, and see when it hangs or is too late."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from shared import subjects
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages import Job, Phase, Progress, encode
from trainer_node.context import NodeContext
from trainer_node.fault_injection import FaultPoint, fault_point
from trainer_node.progress import ProgressTail, worth_telling
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.supervisor import Worker

FOLLOW_S: Final = 0.5  # between two looks at the worker: progress reaches watchers twice a second
LATE_HANG_S: Final = 20.0  # silence of a worker that should have been ready: an export of 6 GB is no stall
FINISHING: Final = frozenset({Phase.CHOOSE, Phase.EXPORT, Phase.VERIFY, Phase.DONE})

log = get_logger()


def must_stop(
    *,
    now: float,
    silent_s: float,
    hang_s: float,
    started_at: float,
    ready_by: float,
    deadline_at: float,
    phase: Phase | None,
) -> str | None:
    """Why a running worker has to be killed and started again, or None.

    A worker that should have been ready, but is stalled, or at the deadline is not even about to finish, is
    replaced by one that submits what is on disk at once: the finished export or the newest checkpoint. The
    margin before upstream's own deadline is there for that. One that was started when the time was already
    over is doing just that.
    """
    late = started_at < ready_by <= now
    if silent_s >= (min(hang_s, LATE_HANG_S) if late else hang_s):
        return f"no progress for {silent_s:.0f} s"
    if now >= deadline_at and late and phase not in FINISHING:
        return "the deadline passed"
    return None


class WorkerMonitor:
    """Watches the worker's side of a run; needs no broker."""

    def __init__(self, context: NodeContext, job: Job, run: RunFolder, ready_by: float) -> None:
        self.context = context
        self.job = job
        self.run = run
        self.ready_by = ready_by
        self.latest: Progress | None = None
        self.condemned: str | None = None  # why a worker was killed when no time was left for free starts
        self._tail: ProgressTail | None = None

    async def follow(self) -> None:
        """Publish the worker's progress, kill it if it must be, and wake the loop for its outcome."""
        seen: Worker | None = None
        heard_at = time.monotonic()
        while True:
            worker = self.context.worker_of(self.job.task)
            if await self.publish() or worker is not seen:
                seen, heard_at = worker, time.monotonic()
            if worker is not None and worker.alive:
                spoken = await asyncio.to_thread(self.run.outcome_file.exists)
                if spoken:
                    self.context.wake.set()
                await self._judge(worker, time.monotonic() - heard_at, spoken)
            await asyncio.sleep(FOLLOW_S)

    async def _judge(self, worker: Worker, silent_s: float, spoken: bool) -> None:
        started_at = worker.file.started_at
        why = must_stop(
            now=time.time(),
            silent_s=silent_s,
            hang_s=self.context.settings.hang_s,
            started_at=started_at,
            ready_by=self.ready_by,
            deadline_at=self.job.deadline_at,
            phase=Phase.DONE if spoken else self.latest.phase if self.latest else None,
        )
        if why is None:
            return
        await self.context.dismiss(why)
        if started_at >= self.ready_by:
            self.condemned = why

    async def publish(self) -> bool:
        """Pass on what the worker wrote since the last look; whether it wrote anything."""
        if self._tail is None:
            self._tail = ProgressTail(self.run.progress_file)
        lines = await asyncio.to_thread(self._tail.read)
        if not lines:
            return False
        self.latest = lines[-1]
        if any(line.phase is Phase.TRAIN for line in lines):
            fault_point(FaultPoint.TRAINING)  # the worker trains on, and the next life adopts it
        subject = subjects.progress(self.job.slot, self.job.task)
        try:
            for line in worth_telling(lines):
                await self.context.bus.publish(subject, encode(line))
        except BusError as error:  # only watchers miss it
            log.debug("progress not published", task=self.job.task, error=str(error))
        return True
