"""The worker process: start it, adopt one that outlived its node, see its end, stop it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.files import write_atomically
from shared.json_files import read_json_if_possible
from shared.logs import get_logger
from shared.processes import command_line, start_time
from shared.settings import Settings
from trainer_node.fault_injection import FaultPoint, fault_point
from trainer_node.worker.crash import KILLED, out_of_memory_kills
from trainer_node.worker.environment import worker_environment
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.slot_lock import STUCK_S, LockWait, MachineLock, SlotLock, StuckError

ENGINE = (sys.executable, "-m", "trainer_node.engine")
TEMPORARY = "tmp"  # in the node's folder
POLL_S = 0.05  # between looks at something that has no event
OTHERS_GRACE_S = 10.0  # for the worker of a node that lost the lease
ORPHANS_AFTER_S = 5.0  # children that keep the lock so long after their worker's end are killed

log = get_logger()


class WorkerFile(Struct, frozen=True, kw_only=True):
    """`worker.json`: who the running worker is. Process id and start time together are never reused."""

    pid: int
    start_time: int
    task: str
    attempt: int
    step: int  # of the checkpoint it began with
    started_at: float


class Worker:
    """One running or ended worker process."""

    def __init__(self, file: WorkerFile, process: subprocess.Popen[bytes] | None) -> None:
        self.file = file
        self.process = process  # None = adopted: not our child
        self.stopped = False  # by the node, so its end doesn't count
        self.out_of_memory = False  # the kernel ended it for that
        self.ended = asyncio.Event()
        self._kills_before = out_of_memory_kills()

    @property
    def alive(self) -> bool:
        """Return whether its end was not seen yet."""
        return not self.ended.is_set()

    def note_end(self) -> None:
        """Take down how it ended, while the kernel's counter tells something about it."""
        code = self.process.poll() if self.process else None
        # SIGTERM kills only a worker that has no handler yet: it was asked to stop.
        self.stopped |= code == -signal.SIGTERM
        self.out_of_memory = code in KILLED and out_of_memory_kills() > self._kills_before
        self.ended.set()

    def manner(self) -> str:
        """Return how the worker ended, in words."""
        code = self.process.returncode if self.process else None
        if code is None:
            return "the worker ended"
        if code < 0:
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker ended with exit code {code}"


class Supervisor:
    """At most one worker, the one that holds the slot's lock."""

    def __init__(
        self,
        settings: Settings,
        threads: int,
        *,
        worker_command: tuple[str, ...] = ENGINE,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = settings.node
        self.settings = settings
        self.threads = threads
        self.command = worker_command
        self.worker: Worker | None = None
        self.lock = SlotLock(self.folder)
        self.machine = MachineLock(settings)
        self._file = self.folder / "worker.json"
        self._on_end = on_end
        self._poller: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # a stop that still waits for the lock must not see the next worker's

    @property
    def alive(self) -> bool:
        """Return whether there is a running worker."""
        return self.worker is not None and self.worker.alive

    def last_file(self) -> WorkerFile | None:
        """Return the newest worker this folder knows of, running or not."""
        return read_json_if_possible(self._file, WorkerFile)

    async def adopt(self) -> None:
        """Take on the worker that holds the lock, if one does; kill a holder that is no worker."""
        if not await asyncio.to_thread(self.lock.is_held):
            await asyncio.to_thread(self.lock.record_missed_release)
            return
        file = await asyncio.to_thread(self._find)
        if file is None:
            log.error("the slot's lock is held by something that is no worker; killing it")
            await self._try_to_free_lock(orphans_after_s=0)
            return
        log.info("worker adopted", pid=file.pid, task=file.task, attempt=file.attempt)
        self._watch(Worker(file, None), "adopted")

    async def start(
        self, run: RunFolder, attempt: int, step: int, *, must_hold: Callable[[], None] = lambda: None
    ) -> None:
        """Start a worker on a run folder whose job.json is written; waits for the lock first.

        A worker of another node on this machine has to go; `must_hold` raises if this node may not end it.
        Raises StuckError if a process that holds the lock can't be ended.
        """
        async with self._changing:
            try:
                await self._free_lock()
                await self.machine.clear(must_hold, min(OTHERS_GRACE_S, self.settings.stop_grace_s))
            except StuckError as error:
                log.error("no worker can be started", task=run.task, error=str(error))
                raise
            worker = await asyncio.to_thread(self._spawn, run, attempt, step)
            log.info("worker started", pid=worker.file.pid, task=run.task, attempt=attempt, step=step)
            self._watch(worker, "acquired")

    async def stop(self, why: str, *, grace_s: float | None = None) -> None:
        """Ask the worker to stop, kill its process group after the grace, and wait for the lock.

        What can't be ended is logged, and left: the next `stop` or `start` tries again.
        """
        if (worker := self.worker) is None:
            return
        async with self._changing:
            if worker.alive:
                await self._end(worker, why, grace_s)

    async def _end(self, worker: Worker, why: str, grace_s: float | None) -> None:
        worker.stopped = True
        grace_s = self.settings.stop_grace_s if grace_s is None else grace_s
        log.info("stopping the worker", pid=worker.file.pid, task=worker.file.task, why=why)
        _signal(worker.file, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await worker.ended.wait()
        except TimeoutError:
            file = worker.file
            log.warning("worker doesn't stop, killing it", pid=file.pid, task=file.task, after_s=grace_s)
            _kill_group(worker.file)
            try:
                async with asyncio.timeout(STUCK_S):
                    await worker.ended.wait()
            except TimeoutError:
                log.error("a killed worker doesn't end", pid=file.pid, task=file.task, after_s=STUCK_S)
                return
        await self._try_to_free_lock()

    def close(self) -> None:
        """Stop watching; a running worker continues."""
        if self._poller is not None:
            self._poller.cancel()

    def _spawn(self, run: RunFolder, attempt: int, step: int) -> Worker:
        environment = worker_environment(
            os.environ,
            self.threads,
            self.settings.gpus,
            self.settings.worker_environment,
            temporary=self._emptied(),
        )
        locks = [self.lock.take()]
        try:
            locks.append(self.machine.lock.take())
            with run.log_file.open("ab") as output:
                process = subprocess.Popen(
                    [*self.command, str(run.job_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=run.path,
                    env=environment,
                    pass_fds=tuple(locks),
                    start_new_session=True,
                )
        finally:
            for lock in locks:
                os.close(lock)
        fault_point(FaultPoint.SPAWNED)  # a restarted node's `_find` knows the worker by its open lock
        file = WorkerFile(
            pid=process.pid,
            start_time=start_time(process.pid) or 0,
            task=run.task,
            attempt=attempt,
            step=step,
            started_at=time.time(),
        )
        write_atomically(self._file, msgspec.json.encode(file))
        return Worker(file, process)

    def _emptied(self) -> Path:
        """Return the workers' folder for temporary files, without what the last one left.

        Not the node's `/tmp`: a unit's own vanishes when the node restarts, and the worker trains on.
        """
        place = self.folder.absolute() / TEMPORARY
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700, exist_ok=True)
        return place

    def _find(self) -> WorkerFile | None:
        """Return the worker that holds the lock, by worker.json, else by its open files and arguments."""
        last = self.last_file()
        if last is not None and start_time(last.pid) == last.start_time:
            return last
        for pid in self.lock.holders():
            started, job_file = start_time(pid), Path((command_line(pid) or [""])[-1])
            if started is None or not _leads(pid) or job_file.name != "job.json":
                continue
            task = job_file.parent.name
            attempt = last.attempt if last is not None and last.task == task else 1
            step = RunFolder(self.folder, task).newest_step() or 0
            file = WorkerFile(
                pid=pid,
                start_time=started or 0,
                task=task,
                attempt=attempt,
                step=step,
                started_at=time.time(),
            )
            write_atomically(self._file, msgspec.json.encode(file))
            return file
        return None

    def _watch(self, worker: Worker, event: str) -> None:
        file, self.worker = worker.file, worker
        self.lock.record(event, file.pid, file.task, file.attempt)
        try:
            descriptor = os.pidfd_open(file.pid)
        except ProcessLookupError:
            self._ended(worker)
        except OSError:  # a kernel without pidfd
            self._poller = asyncio.create_task(self._poll(worker))
        else:
            loop = asyncio.get_running_loop()

            def ended() -> None:
                loop.remove_reader(descriptor)
                os.close(descriptor)
                self._ended(worker)

            loop.add_reader(descriptor, ended)

    async def _poll(self, worker: Worker) -> None:
        while start_time(worker.file.pid) == worker.file.start_time:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(POLL_S)
        self._ended(worker)

    def _ended(self, worker: Worker) -> None:
        file = worker.file
        _kill_group(file)
        worker.note_end()
        self.lock.record("released", file.pid, file.task, file.attempt)
        log.info("worker ended", pid=file.pid, task=file.task, manner=worker.manner(), asked=worker.stopped)
        self._on_end()

    async def _free_lock(self, orphans_after_s: float = ORPHANS_AFTER_S) -> None:
        """Wait until the lock is free; kill the processes that still hold it after `orphans_after_s`.

        Raises StuckError if one can't be ended.
        """
        wait, began = LockWait(self.lock.path), time.monotonic()
        while await asyncio.to_thread(self.lock.is_held):
            if time.monotonic() - began >= orphans_after_s:
                for pid in await asyncio.to_thread(self.lock.holders):
                    if pid == os.getpid():  # another thread tests the lock in this moment
                        continue
                    if pid not in wait.killed:
                        log.warning("killing a process that keeps the slot's lock", pid=pid)
                    wait.killed.add(pid)
                    _kill(pid)
            await wait.pause()

    async def _try_to_free_lock(self, orphans_after_s: float = ORPHANS_AFTER_S) -> None:
        """Free the lock, or log why not: the next start waits for it, too."""
        try:
            await self._free_lock(orphans_after_s)
        except StuckError as error:
            log.error("the slot's lock is not free", error=str(error))


def _leads(pid: int) -> bool:
    """Return whether a process leads its session, as a worker does; a process that has ended leads none."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _signal(file: WorkerFile, number: int) -> None:
    if start_time(file.pid) == file.start_time:
        _kill(file.pid, number)


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_group(file: WorkerFile) -> None:
    """Kill what is left of a worker's process group (it leads its own session).

    While one member lives, the kernel doesn't reuse the number. So if a process of that number was
    started at another time, none is left, and the group of that number is a stranger's.
    """
    if start_time(file.pid) in (None, file.start_time):
        with suppress(ProcessLookupError):
            os.killpg(file.pid, signal.SIGKILL)
