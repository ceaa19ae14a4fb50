"""Monitor a job's worker: publish its progress, and stop it when it hangs or is too late."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from shared import subjects
from shared.errors import BusError
from shared.logs import TroubleLog, get_logger
from shared.messages.encoding import encode
from shared.messages.jobs import Job
from shared.messages.runs import Phase, Progress
from trainer_node.context import NodeContext
from trainer_node.fault_injection import FaultPoint, fault_point
from trainer_node.transfer_rates import Direction, note
from trainer_node.worker.progress import ProgressTail, stop_reason
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.supervisor import Worker

FOLLOW_S: Final = 0.5  # between two reads of the worker's progress: watchers see it twice a second

log = get_logger()


def worth_publishing(lines: list[Progress]) -> list[Progress]:
    """Return the newest of the lines, and every other one that carries a message."""
    return [line for number, line in enumerate(lines, 1) if line.message or number == len(lines)]


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
        self._has_outcome = False
        self._trouble = TroubleLog()

    async def follow(self) -> None:
        """Publish the worker's progress, kill it when it must stop, and wake the loop for its outcome."""
        seen: Worker | None = None
        last_active = time.monotonic()
        while True:
            worker = self.context.worker_of(self.job.task)
            if await self.publish() or worker is not seen:
                seen, last_active = worker, time.monotonic()
            if worker is not None and worker.alive:
                if self._has_outcome:
                    self.context.wake.set()
                await self._stop_if_due(worker, time.monotonic() - last_active)
            await asyncio.sleep(FOLLOW_S)

    async def _stop_if_due(self, worker: Worker, silent_s: float) -> None:
        started_at = worker.file.started_at
        why = stop_reason(
            now=time.time(),
            silent_s=silent_s,
            hang_s=self.context.settings.hang_s,
            started_at=started_at,
            ready_by=self.ready_by,
            deadline_at=self.job.deadline_at,
            phase=Phase.DONE if self._has_outcome else self.latest.phase if self.latest else None,
        )
        if why is None:
            return
        await self.context.dismiss(why)
        if started_at >= self.ready_by:
            self.late_kill = why

    async def publish(self) -> bool:
        """Publish what the worker wrote since the last call; return whether it wrote or touched the file.

        A file that can't be read shows no silence: the worker may train on, and its outcome be readable.
        """
        try:
            lines, self._has_outcome, is_active = await asyncio.to_thread(self._read)
            self._trouble.over()
        except OSError as error:
            if self._trouble.is_new(error):
                log.warning("the worker's progress can't be read", task=self.job.task, error=str(error))
            return True
        if not lines:
            return is_active
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

    def _read(self) -> tuple[list[Progress], bool, bool]:
        """Return the worker's new lines, whether it has an outcome, and whether it is active.

        Count the model's download.
        """
        if self._tail is None:
            self._tail = ProgressTail(self.run.progress_file)
        lines = self._tail.read()
        if lines:
            self._note_download()
        return lines, self.run.outcome_file.exists(), self._tail.is_active

    def _note_download(self) -> None:
        """Count the download of the run's model, if it had one."""
        try:
            found = self.run.take_download()
        except OSError as error:  # it tells nothing about this job
            log.debug("the model's download can't be read", task=self.job.task, error=str(error))
            return
        if found is not None:
            note(self.context.settings.node, Direction.DOWNLOAD, found.size, found.seconds)
