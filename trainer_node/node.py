"""One trainer node: hold the slot's lease, find the slot's work, see it through, drain when asked."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
import uuid
from pathlib import Path

from nats.aio.msg import Msg

from shared import subjects
from shared.aio import cancel_all, pause
from shared.broker.bus import Bus, Record
from shared.broker.connection import connect
from shared.broker.credentials import trainer
from shared.broker.streams import ready, when_usable
from shared.errors import BusError, PodiumError
from shared.files import write_atomically
from shared.logs import TroubleLog, get_logger, log_context
from shared.messages.hardware import Hardware
from shared.messages.jobs import Job, Moved, Result, decode_job_record
from shared.settings import Settings
from trainer_node import self_test
from trainer_node.context import NodeContext
from trainer_node.control import ControlHandler
from trainer_node.fault_injection import FaultPoint, fault_point
from trainer_node.hardware import detect, worker_threads
from trainer_node.heartbeat import Activity, HeartbeatPublisher
from trainer_node.job.reconciler import JobReconciler
from trainer_node.job.state_chain import Chain
from trainer_node.lease import RETRY_S, SlotLease
from trainer_node.worker.environment import remarks
from trainer_node.worker.supervisor import ENGINE, Supervisor

# The broker delivers a job to subscribers before it stores it. A node that polls in between, or reconnects
# too late for the message, finds nothing: so after a message or a reconnect it polls quickly for a while.
ALERT_S, LOOK_AGAIN_S = 2.0, 0.05
AGAIN_S = 30.0  # before tasks are cancelled again: the job at hand cancels its own first

log = get_logger()


class FolderInUseError(PodiumError):
    """Another process works in this node's folder."""


class Node:
    """The parts of a node, wired; `run` until drained."""

    def __init__(self, settings: Settings, bus: Bus, node: str, hardware: Hardware) -> None:
        self.settings = settings
        self.bus = bus
        self.wake = asyncio.Event()
        self.draining = asyncio.Event()
        self.lease = SlotLease(bus, settings, node, hardware, on_change=self._lease_changed)
        self.supervisor = Supervisor(
            settings,
            worker_threads(settings),
            worker_command=settings.worker_command or ENGINE,
            on_end=self.wake.set,
        )
        self.context = NodeContext(
            settings, bus, self.lease, self.supervisor, node, hardware, wake=self.wake, draining=self.draining
        )
        self.heartbeats = HeartbeatPublisher(bus, settings, node, hardware, self._activity)
        self.reconciler: JobReconciler | None = None
        self.control = ControlHandler(self.context, lambda: self.reconciler)
        self._trouble = TroubleLog()
        self._alerted_at = float("-inf")

    def drain(self) -> None:
        """Take no more work, let the worker write a checkpoint, give the slot back."""
        log.info("draining")
        self.draining.set()
        self.wake.set()

    async def run(self) -> None:
        """Work until drained. Raises BusUnavailableError if the connection is lost for good."""
        self.bus.on_reconnect(self._alert)
        self.bus.on_reconnect(self.lease.wake.set)
        self.bus.on_reconnect(self.heartbeats.wake.set)
        await self.supervisor.adopt()
        await self.bus.subscribe(subjects.jobs_of_slot(self.settings.slot), self._on_message)
        await self.control.open()
        work = asyncio.create_task(self._work(), name="work")
        closed = asyncio.create_task(self.bus.closed.wait(), name="bus")
        background = [
            asyncio.create_task(self.lease.keep(), name="lease"),
            asyncio.create_task(self.heartbeats.run(), name="heartbeat"),
        ]
        tasks = [work, closed, *background]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all(tasks, AGAIN_S)
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.control.close()
            self.supervisor.close()
        for task in done:
            task.result()
        if work not in done:
            raise self.bus.why_closed()
        await self._release()

    async def _work(self) -> None:
        while not self.draining.is_set():
            self.wake.clear()
            seconds = RETRY_S
            try:
                if self.lease.holder is not None:
                    await self.supervisor.stop("another node holds the slot")
                    seconds = self.settings.poll_s
                elif self.lease.may_write():
                    if await self._take_work():
                        continue
                    alert = time.monotonic() - self._alerted_at < ALERT_S
                    seconds = LOOK_AGAIN_S if alert else self.settings.poll_s
                self._trouble.over()
            except (BusError, OSError) as error:  # a restart would meet one of its disk again
                if self._trouble.is_new(error):
                    log.warning("can't work, will retry", error=str(error))
            await pause(seconds, self.wake)
        await self.supervisor.stop("draining")

    async def _take_work(self) -> bool:
        """See the slot's newest job through, if it has no result yet."""
        job = await self._newest_job()
        if job is None:
            await self.supervisor.stop("there is no job for it")
            return False
        worker = self.supervisor.worker
        if worker is not None and worker.file.task != job.task:
            await self.supervisor.stop("another task has the slot")
        fault_point(FaultPoint.FOUND)  # a restarted node finds it in the same place
        try:
            with log_context(task=job.task):
                # In a thread: it looks for the model, whose disk may be slow, and the lease must be renewed.
                self.reconciler = await asyncio.to_thread(JobReconciler, self.context, job)
                await self.reconciler.reconcile()
        finally:
            self.reconciler = None
        return self.lease.holder is None

    async def _newest_job(self) -> Job | None:
        """Return the slot's newest job if it has no result; gateways store no second one before that.

        A record that can't be read as a job is skipped: the job that was begun before it continues.
        """
        slot = self.settings.slot
        record = await self.bus.last(subjects.JOBS_STREAM, subjects.jobs_of_slot(slot))
        job = job_of(record) if record is not None else None
        if record is not None and job is None and (begun := self.supervisor.last_file()) is not None:
            record = await self.bus.last(subjects.JOBS_STREAM, subjects.job(slot, begun.task))
            job = job_of(record) if record is not None else None
        if job is None:
            return None
        last = await Chain(self.bus, self.lease, job.task).read()
        return None if isinstance(last, Result | Moved) else job

    def _lease_changed(self) -> None:
        self.wake.set()
        self.heartbeats.wake.set()

    async def _on_message(self, message: Msg) -> None:
        self._alert()

    def _alert(self) -> None:
        """Poll quickly for a while: a job may be stored now or in a moment."""
        self._alerted_at = time.monotonic()
        self.wake.set()

    def _activity(self) -> Activity:
        reconciler, alive = self.reconciler, self.supervisor.alive
        if reconciler is None:
            return Activity(epoch=self.lease.epoch, worker_alive=alive)
        latest = reconciler.monitor.latest
        return Activity(
            epoch=self.lease.epoch,
            task=reconciler.job.task,
            phase=latest.phase if latest else None,
            step=latest.step if latest else 0,
            worker_alive=alive,
        )

    async def _release(self) -> None:
        try:
            await self.lease.release()
        except BusError as error:  # it lapses by itself
            log.warning("lease not released", error=str(error))


def job_of(record: Record) -> Job | None:
    """Return the job that a record of JOBS holds; log why and return None if it can't be run."""
    named = subjects.task_in(record.subject)
    try:
        job = decode_job_record(record.data)
    except ValueError as error:  # msgspec's errors too
        log.error("a stored job can't be read", subject=record.subject, error=str(error), **named)
        return None
    # The task key becomes a folder's name, so nothing else may pass.
    if not isinstance(job, Job) or subjects.task_key(job.task) != job.task:
        log.error("a stored record is not a job", subject=record.subject, **named)
        return None
    if record.subject != subjects.job(job.slot, job.task):
        log.error("a stored job does not match its subject", subject=record.subject, **named)
        return None
    return job


async def serve(settings: Settings) -> None:
    """Run one node in its folder until SIGTERM or SIGINT. Raises PodiumError with one clear line."""
    folder = settings.node
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        hardware = await detect(settings)
        bus = await connect(settings, name=f"node-{settings.slot}", user=trainer(settings.slot))
        try:
            await when_usable(bus, settings, lambda: ready(bus, settings, _needed(settings)))
            node = Node(settings, bus, node_id(folder), hardware)
            if self_test.wanted(settings, hardware) and not node.supervisor.lock.is_held():
                node.heartbeats.health = await self_test.health_at_start(settings, hardware, folder)
            for remark in remarks(os.environ, settings):
                log.warning(remark)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, node.drain)
            log.info("node is up", node=node.context.node, hardware=hardware.name, folder=str(folder))
            await node.run()
        finally:
            await bus.close()
    finally:
        os.close(lock)


def _needed(settings: Settings) -> list[tuple[str, str]]:
    """Return the subjects that this node reads."""
    slot = settings.slot
    needed = [
        (subjects.JOBS_STREAM, subjects.jobs_of_slot(slot)),
        (subjects.state_stream(slot), subjects.state(slot, "*")),
        (subjects.LEASES_STREAM, subjects.lease(slot)),
    ]
    if settings.artifacts_kind == "object":
        needed.append((subjects.artifacts_stream(slot), subjects.artifacts_of_slot(slot)))
    return needed


def lock_folder(folder: Path) -> int:
    """Make the folder this process's own until the descriptor is closed. Raises FolderInUseError."""
    descriptor = os.open(folder / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FolderInUseError(
            f"another trainer node works in {folder}: stop it, or set PODIUM_SLOT or PODIUM_NODE_DIR"
        ) from error
    return descriptor


def node_id(folder: Path) -> str:
    """Return this folder's node id: random, made once, kept."""
    path = folder / "node_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    made = uuid.uuid4().hex[:12]
    write_atomically(path, made.encode())
    return made
