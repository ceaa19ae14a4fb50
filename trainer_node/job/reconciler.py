"""Drive one job to its result on this node: observe, decide, act, and again.

Every round starts from what is stored (the chain, the run folder, the artifact store). So a kill between
any two lines loses nothing: the restarted node observes the same and decides the same.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

from msgspec.structs import replace

from shared.aio import cancel_all, pause
from shared.errors import BusError, EngineError
from shared.logs import TroubleLog, get_logger
from shared.messages.jobs import Job, Moved, Result, ResultStatus
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus, WorkerJob
from trainer_node.artifacts.disk import DamagedExportError
from trainer_node.artifacts.interface import Stored, StoreError
from trainer_node.artifacts.publisher import Export, Submissions
from trainer_node.context import NodeContext
from trainer_node.fault_injection import FaultPoint, fault_point
from trainer_node.job.actions import (
    Action,
    Claim,
    Deliver,
    Done,
    FindSubmission,
    Finish,
    JobObservation,
    Leave,
    Start,
    StartOver,
    Submit,
    Watch,
    next_action,
)
from trainer_node.job.inputs import worker_job
from trainer_node.job.monitor import WorkerMonitor
from trainer_node.job.state_chain import Chain, FencedError
from trainer_node.lease import RETRY_S, LeaseLostError
from trainer_node.worker.crash import Failure, explain
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.supervisor import Worker

EXIT_S: Final = 3.0  # for a worker that is done to exit by itself; freeing a large model takes a while
RESTART_PAUSE_S: Final = 1.0  # least time between two starts, so that a crash loop doesn't eat the machine
AGAIN_S: Final = 10.0  # before tasks are cancelled again: the end of an upload must not be cut short
OVER: Final = "the task ended, or its node stopped"

log = get_logger()


class JobReconciler:
    """One job while this node works on it. Making one blocks: it reads the run folder and finds the model."""

    def __init__(self, context: NodeContext, job: Job) -> None:
        self.context = context
        self.job = job
        self.run = RunFolder(context.settings.node, job.task)
        self.chain = Chain(context.bus, context.lease, job.task)
        self.submissions = Submissions(context)
        self.log = log.bind(task=job.task)
        self._failure: Failure | None = None  # of the newest worker, if it counts as an attempt
        self._counted = False  # that failure is in the chain already, as a claim of the next attempt
        self._trouble = TroubleLog()
        self._started = float("-inf")
        self._requeue: asyncio.Future[str | None] | None = None  # an operator who waits for the answer
        self._over = False
        self._unread: OSError | None = None  # why it isn't known what has begun
        self._worker_job, self._refusal = self._prepare()
        ready_by = self._worker_job.ready_by if self._worker_job else job.deadline_at
        self.monitor = WorkerMonitor(context, job, self.run, ready_by)

    async def reconcile(self) -> None:
        """Work until the task has a result, another node holds the slot, or the node drains.

        Raises OSError if the run folder can't be used: the node makes another reconciler, and tries again.
        """
        try:
            if self._unread is not None:
                raise self._unread
            await self._remove_older_run()
            await self._follow_and_act()
        except OSError as error:
            await self.chain.read()
            await self._give_up(error)
            raise

    async def _follow_and_act(self) -> None:
        tasks = [asyncio.create_task(self.monitor.follow()), asyncio.create_task(self._rounds())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all(tasks, AGAIN_S)
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            self._over = True
            self._answer(OVER)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        await self.monitor.publish()

    async def requeue(self) -> str | None:
        """Restart with the attempts counted from 1: None once that is in the chain, else why not."""
        if self._over:
            return OVER
        if self._requeue is None:
            self._requeue = asyncio.get_running_loop().create_future()
            self.context.wake.set()
        return await asyncio.shield(self._requeue)

    async def _remove_older_run(self) -> None:
        """Remove the run folder of an older job with the same key."""
        if await asyncio.to_thread(self.run.begun, self.job) is not None:
            return
        if self.context.worker_of(self.job.task) is not None:
            await self.context.dismiss("its job is another one now")
        await asyncio.to_thread(self.run.remove)

    async def _rounds(self) -> None:
        context = self.context
        while not context.draining.is_set():
            context.wake.clear()
            if context.lease.holder is not None:
                return
            seconds, wake = RETRY_S, context.wake
            try:
                if context.lease.may_write():
                    action = await self.act()
                    self._trouble.over()
                    if isinstance(action, Done | Leave):
                        return
                    if not isinstance(action, Watch):
                        continue
                    seconds = context.settings.poll_s
            except (BusError, LeaseLostError, FencedError) as error:
                self._log_once(error)
            except StoreError as error:
                self._log_once(error)
                await self._give_up(error)
                seconds, wake = self.submissions.pause_s(), context.draining  # no wake shortens it
            except OSError as error:
                self._log_once(error)
                await self._give_up(error)
                seconds = context.settings.poll_s
            await pause(seconds, wake)

    async def act(self) -> Action:
        """Observe, decide and act once; return the action."""
        last = await self.chain.read()
        observation = await asyncio.to_thread(self._observe)
        action = next_action(self.job, last, observation, self.context.settings.max_attempts)
        if isinstance(action, FindSubmission):
            observation = replace(observation, stored=await self.submissions.is_there(self.job))
            action = next_action(self.job, last, observation, self.context.settings.max_attempts)
        match action:
            case Done(result):
                await self._clean_up(result)
            case Leave():
                await self._leave()
            case Claim(attempt):
                await self._claim(attempt)
            case Start(attempt):
                await self._start(attempt)
            case StartOver():
                await self._start_over()
            case Submit(digest):
                await self._submit(digest)
            case Deliver():
                await self._deliver(observation)
            case Finish(status, reason, code):
                await self.chain.end(self.job, status, reason, code=code)
        if observation.requeue and not isinstance(action, StartOver):
            self._answer("it has a result, or is about to get one")
        return action

    def _observe(self) -> JobObservation:
        worker, outcome = self.context.worker_of(self.job.task), self.run.outcome()
        alive = worker is not None and worker.alive
        if self._refusal is not None and not alive and not _is_ready(outcome):
            outcome = self._refusal
        newest = self.run.newest_step()
        last = self.context.supervisor.last_file()
        known = last if last is not None and last.task == self.job.task else None
        progressed = (newest or 0) > (known.step if known else 0)
        if not (alive or progressed or self._counted) and self._failure is None:
            self._failure = self._failure_of(worker, outcome)
        return JobObservation(
            node=self.context.node,
            epoch=self.context.lease.epoch,
            now=time.time(),
            attempt=known.attempt if known else 0,
            worker_alive=alive,
            failure=self._failure.text if self._failure else self.monitor.late_kill,
            failure_code=self._failure.code if self._failure else None,
            outcome=outcome,
            has_checkpoint=newest is not None,
            requeue=self._requeue is not None,
        )

    def _failure_of(self, worker: Worker | None, outcome: Outcome | None) -> Failure | None:
        """Return why a worker died by itself; None if the node stopped it or did not see it end."""
        if outcome is not None:
            if outcome.status is not OutcomeStatus.FAILED:
                return None
            return Failure(outcome.error or "the worker failed", outcome.code or ErrorCode.INTERNAL)
        if worker is None or worker.stopped:
            return None
        return explain(
            worker.manner(),
            self.run.last_error(),
            out_of_memory=worker.out_of_memory,
            free_bytes=self.run.free_bytes(),
        )

    async def _claim(self, attempt: int) -> None:
        step = await asyncio.to_thread(self.run.newest_step) or 0
        if self._counted and self.chain.is_claimed(attempt, step):
            # No worker could be started since, and a log forgets nothing.
            self.context.lease.must_hold()
            return
        await self.chain.claim(attempt, step)
        self.log.info("claimed", attempt=attempt, epoch=self.context.lease.epoch, step=step)

    async def _start(self, attempt: int) -> None:
        assert self._worker_job is not None  # else the refusal had ended the task
        await asyncio.sleep(max(0.0, self._started + RESTART_PAUSE_S - time.monotonic()))
        await asyncio.to_thread(self.run.remove_parts)
        await asyncio.to_thread(self.run.write_job, self._worker_job)  # a full disk must claim nothing
        await self._claim(attempt)
        self._failure = self.monitor.late_kill = None
        self._counted = True  # if no worker starts, the next try is of the same attempt
        fault_point(FaultPoint.CLAIMED)  # a restarted node has a new epoch, so it claims again
        await asyncio.to_thread(self.run.remove_outcome)
        step = await asyncio.to_thread(self.run.newest_step)
        self._started = time.monotonic()
        must_hold = self.context.lease.must_hold
        await self.context.supervisor.start(self.run, attempt, step or 0, must_hold=must_hold)
        self._counted = False

    async def _start_over(self) -> None:
        await self.context.dismiss("an operator requeued its job")
        if _is_ready(await asyncio.to_thread(self.run.outcome)):  # it finished meanwhile
            return
        await self._start(1)
        self._answer(None)

    def _answer(self, refusal: str | None) -> None:
        if self._requeue is not None:
            self._requeue.set_result(refusal)
            self._requeue = None

    async def _submit(self, digest: str) -> None:
        fault_point(FaultPoint.READY)  # a restarted node finds the export and announces it
        await self.chain.announce(digest)
        self.log.info("submitting", digest=digest)
        fault_point(FaultPoint.ANNOUNCED)  # the next holder finds the name free and announces its own

    async def _deliver(self, observation: JobObservation) -> None:
        outcome, export = observation.outcome, None
        if outcome is not None and outcome.digest and _is_ready(outcome):
            export = Export(self.run.export(outcome), outcome.digest)
        try:
            stored = await self.submissions.put(self.job, export)
        except DamagedExportError as error:
            self._failure = Failure(str(error))
            await asyncio.to_thread(self.run.remove_outcome)
            return
        fault_point(FaultPoint.STORED)  # the next holder finds the name taken and names what is there
        model_hash = await self.submissions.model_hash(self.job, stored.digest)
        await self.chain.end_submitted(self.job, stored, outcome, model_hash)

    async def _give_up(self, error: OSError | StoreError) -> None:
        """End the job if its disk or store stays unusable: it must not hold the slot forever."""
        if isinstance(self.chain.last, Result | Moved) or not self.context.lease.may_write():
            return  # only the cleanup is left, and that may fail
        try:
            match await self.submissions.lost(self.job, error):
                case Failure(text, code):
                    await self.chain.end(self.job, ResultStatus.FAILED, text, code=code)
                case Stored() as stored:  # a kill came between it and the result, or another node stored it
                    await self._end_as_stored(stored)
        except (BusError, LeaseLostError, FencedError) as refused:
            self._log_once(refused)

    async def _end_as_stored(self, stored: Stored) -> None:
        """Name a submission with what can still be read of its run."""
        outcome = model_hash = None
        with suppress(OSError):
            outcome = await asyncio.to_thread(self.run.outcome)
        with suppress(OSError):
            model_hash = await self.submissions.model_hash(self.job, stored.digest)
        await self.chain.end_submitted(self.job, stored, outcome, model_hash)

    async def _clean_up(self, result: Result) -> None:
        fault_point(FaultPoint.ENDED)  # a restarted node finds no work and stops what still runs
        self.log.info(
            "task ended", status=result.status, reason=result.reason, margin_s=result.deadline_margin_s
        )
        worker = self.context.worker_of(self.job.task)
        if worker is not None:
            if result.status is ResultStatus.SUBMITTED:  # it has written its outcome and is about to exit
                await pause(EXIT_S, worker.ended)
            await self.context.dismiss("its task has a result")
        try:
            await asyncio.to_thread(self.run.clean)
        except OSError as error:  # the result stands, and the next job must not wait for this folder
            self.log.warning("run folder not cleaned", error=str(error))

    async def _leave(self) -> None:
        """Forget a job that was moved before this node claimed it."""
        self.log.warning("the job was moved to another slot")
        if self.context.worker_of(self.job.task) is not None:
            await self.context.dismiss("its job was moved to another slot")
        await asyncio.to_thread(self.run.discard)

    def _prepare(self) -> tuple[WorkerJob | None, Outcome | None]:
        context = self.context
        try:
            self.submissions.check(self.job)
            return worker_job(context.settings, self.job, context.hardware, context.supervisor.threads), None
        except EngineError as error:
            try:
                if begun := self.run.begun(self.job):  # continue it, if only to submit what it has
                    return begun, None
            except OSError as unread:
                self._unread = unread
            return None, _refusal(error.code, str(error))
        except Exception as error:  # one odd job must not crash the node at every start until it expires
            self.log.exception("the job can't be prepared")
            return None, _refusal(ErrorCode.UNSUPPORTED, f"this node can't prepare the job: {error!r}")

    def _log_once(self, error: Exception) -> None:
        """Log trouble once, not at every retry."""
        if self._trouble.is_new(error):
            self.log.warning("job action failed, will retry", error=str(error))


def _refusal(code: ErrorCode, error: str) -> Outcome:
    return Outcome(status=OutcomeStatus.FAILED, code=code, error=error)


def _is_ready(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.status is OutcomeStatus.READY
