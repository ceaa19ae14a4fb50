"""One profile's run: the worker, started again when it dies, its early exports, and its own export."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Final

from shared.logs import get_logger
from shared.messages.runs import Outcome, OutcomeStatus, Phase, Progress, WorkerJob
from shared.settings import Settings
from trainer_node.contest.best_submission import BestSubmission
from trainer_node.contest.early_exports import EarlyExports
from trainer_node.contest.next_action import (
    Action,
    End,
    NextProfile,
    RunObservation,
    StartWorker,
    TakeExport,
    Wait,
    next_action,
)
from trainer_node.contest.worker_jobs import Times
from trainer_node.worker.crash import explain
from trainer_node.worker.progress import ProgressTail, stop_reason
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.slot_lock import StuckError
from trainer_node.worker.supervisor import Supervisor

POLL_S: Final = 0.25
RESTART_PAUSE_S: Final = 1.0  # so that a crash loop doesn't fill the log
STOP_S: Final = 5.0  # for a worker that has to end

log = get_logger()


class TrainingRun:
    """One profile's run: its worker, its early exports, its outcome."""

    def __init__(
        self, job: WorkerJob, times: Times, settings: Settings, best: BestSubmission, profiles_left: int
    ) -> None:
        self.job = job
        self.times = times
        self.settings = settings
        self.best = best
        self.profiles_left = profiles_left
        self.folder = RunFolder(settings.node, job.profile)
        self.supervisor = Supervisor(settings, job.threads or 1)
        self.early = EarlyExports(self.folder, times, dict(os.environ))
        self.log = log.bind(run=job.profile)
        self._tail = ProgressTail(self.folder.progress_file)
        self._phase: Phase | None = None
        self._active = time.monotonic()
        self._deaths = 0
        self._step = 0  # of the checkpoint that the newest worker began with
        self._counted = True  # that worker's end

    async def follow(self, stopping: asyncio.Event) -> bool:
        """Run to the end; return whether the next profile should have the rest of the time."""
        await asyncio.to_thread(self.folder.write_job, self.job)
        try:
            while not stopping.is_set():
                match await asyncio.to_thread(self._next):
                    case TakeExport():
                        await self._take_export()
                        return False
                    case StartWorker():
                        await self._start()
                    case NextProfile(reason):
                        self.log.error("this profile's run is given up", reason=reason)
                        return True
                    case End(reason):
                        self.log.error("training ends without a result of its own", reason=reason)
                        return False
                    case Wait():
                        await self._watch()
            self.log.warning("asked to stop")
            return False
        finally:
            try:
                await asyncio.to_thread(self.early.stop)
            finally:
                await self.supervisor.stop("its run is over", grace_s=STOP_S)
                self.supervisor.close()

    def _next(self) -> Action:
        alive = self.supervisor.alive  # first: a worker writes its outcome and then ends
        outcome = self.folder.outcome()
        if not alive and not self._counted:
            self._count_end(outcome)
        return next_action(
            RunObservation(
                worker_alive=alive,
                outcome=outcome,
                deaths=self._deaths,
                profiles_left=self.profiles_left,
                time_left=time.time() < self.times.killed_at,
            )
        )

    def _count_end(self, outcome: Outcome | None) -> None:
        """Take down the end of a worker that left no export; a new checkpoint makes it the first one."""
        self._counted = True
        worker, newest = self.supervisor.worker, self.folder.newest_step() or 0
        if worker is None or (outcome is not None and outcome.status is OutcomeStatus.READY):
            return
        self._deaths = 1 if newest > self._step else self._deaths + 1
        failure = explain(
            worker.manner(),
            self.folder.last_error(),
            out_of_memory=worker.out_of_memory,
            free_bytes=self.folder.free_bytes(),
        )
        text = outcome.error if outcome is not None and outcome.error else failure.text
        self.log.warning("the worker ended without a result", deaths=self._deaths, reason=text)

    async def _start(self) -> None:
        if self._deaths:
            await asyncio.sleep(RESTART_PAUSE_S)
        await asyncio.to_thread(self.folder.remove_parts)
        await asyncio.to_thread(self.folder.remove_outcome)
        step = await asyncio.to_thread(self.folder.newest_step)
        self._step = step or 0
        try:
            await self.supervisor.start(self.folder, self._deaths + 1, self._step)
        except StuckError:  # the supervisor has logged it; this is tried again
            return
        self._active, self._counted = time.monotonic(), False

    async def _watch(self) -> None:
        lines = await asyncio.to_thread(self._tail.read)
        if self._tail.is_active:
            self._active = time.monotonic()
        for line in lines:
            self._show(line)
        await self._stop_if_due()
        await asyncio.to_thread(self.early.start_if_due, self.best.loss)
        if outcome := await asyncio.to_thread(self.early.take):
            await asyncio.to_thread(self.best.offer, "early", self.job.profile, outcome, self.early.target)
        await asyncio.sleep(POLL_S)

    def _show(self, line: Progress) -> None:
        self.best.note_base_loss(line.base_loss)
        if line.phase is not self._phase:
            self._phase = line.phase
            self.log.info("phase", phase=line.phase.value, step=line.step, base=line.base_loss)
        if line.message:
            self.log.info(line.message)

    async def _stop_if_due(self) -> None:
        worker, times = self.supervisor.worker, self.times
        if worker is None or not worker.alive:
            return
        why = stop_reason(
            now=time.time(),
            silent_s=time.monotonic() - self._active,
            hang_s=self.settings.hang_s,
            started_at=worker.file.started_at,
            ready_by=times.ready_by,
            deadline_at=times.killed_at,
            phase=self._phase,
        )
        if why is not None:
            await self.supervisor.stop(why, grace_s=STOP_S)

    async def _take_export(self) -> None:
        await asyncio.to_thread(self.early.stop)
        outcome = await asyncio.to_thread(self.folder.outcome)
        assert outcome is not None
        export = self.folder.export(outcome)
        await asyncio.to_thread(self.best.offer, "final", self.job.profile, outcome, export)
