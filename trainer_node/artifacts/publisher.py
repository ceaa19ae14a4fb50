"""Where a slot's submissions go: on disk first, and from there, if so configured, to a store beyond it.

The copy on disk makes the rest safe to repeat: another holder of the task that sees it sends the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from shared.aio import cancel_all
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.files import folder_digest, is_disk_full
from shared.messages.jobs import Job
from shared.messages.runs import ErrorCode
from shared.settings import Settings
from trainer_node.artifacts import disk
from trainer_node.artifacts.hub import Hub
from trainer_node.artifacts.interface import NotTakenError, Remote, Stored, StoreError
from trainer_node.artifacts.model_hash import model_hash
from trainer_node.artifacts.object_store import ObjectStore
from trainer_node.context import NodeContext
from trainer_node.worker.crash import Failure

T = TypeVar("T")
LONGEST_PAUSE_S: Final = 60.0  # between two tries of a store that doesn't work
AGAIN_S: Final = 4.0  # before a store is cancelled again: its process is killed first, which may take 2


class Export(Struct, frozen=True):
    """A worker's export and the digest that it reported."""

    folder: Path
    digest: str


class Submissions:
    """One slot's submissions, as the node that holds the slot sees and stores them."""

    def __init__(self, context: NodeContext) -> None:
        self.settings = context.settings
        self.folder = context.settings.artifacts
        self.node = context.node
        self.must_hold = context.lease.must_hold
        self.draining = context.draining
        self.remote = _remote(context.settings, context.bus)
        self._refused = 0  # failed tries in a row

    def check(self, job: Job) -> None:
        """Refuse a job whose submission could never be stored. Raises EngineError."""
        if isinstance(self.remote, Hub):
            self.remote.repository(job)

    async def is_there(self, job: Job) -> bool:
        """Return whether the task has a submission, even if only the copy on disk that was about to be sent.

        Raises StoreError and BusError if that is unknown.
        """
        if await asyncio.to_thread(disk.is_stored, self.folder, job.task):
            return True
        return await self._find(job) is not None

    async def put(self, job: Job, export: Export | None) -> Stored:
        """Store the export unless the task has a submission; what it has now, read back.

        Raises DamagedExportError, OSError, and StoreError or BusError: not known what is there, try again.
        """
        if export is None and not await asyncio.to_thread(disk.is_stored, self.folder, job.task):
            return await self._elsewhere(job)
        path = disk.submission(self.folder, job.task)
        digest = await asyncio.to_thread(self._keep, job, export)
        local = Stored(digest, str(path.absolute()))
        if self.remote is None:
            return local
        try:
            stored = await self._unless_draining(
                self.remote.store(job, path, digest, must_hold=self.must_hold, limit_s=self._limit_s(job))
            )
            self._refused = 0
            return stored
        except NotTakenError as error:
            return Stored(local.digest, local.artifact, remark=str(error))

    async def model_hash(self, job: Job, digest: str) -> str | None:
        """Upstream's hash of what was stored, if it is wanted and the copy here is the same."""
        path = disk.submission(self.folder, job.task)
        if not self.settings.upstream_model_hash or not await asyncio.to_thread(path.is_dir):
            return None
        if self.remote is not None and await asyncio.to_thread(folder_digest, path) != digest:
            return None  # another holder's submission was first
        return await asyncio.to_thread(model_hash, path)

    def pause_s(self) -> float:
        """Return how long to wait after an error of the store: longer each time, until it works again."""
        self._refused += 1
        return min(LONGEST_PAUSE_S, 0.25 * 2.0 ** min(self._refused, 10))

    async def lost(self, job: Job, error: OSError | StoreError) -> Failure | Stored | None:
        """Return how the task ends although it can't go on because of `error`, or None to try again.

        It ends only after upstream's deadline, and fails only if the store has no submission. If the store
        can't be read it fails `expire_after_s` after our deadline. A submission that is there is returned if
        the error is this machine's: then the next try fails as this one did.
        """
        if self.draining.is_set() or time.time() < last_call(self.settings, job):
            return None
        kept = ""
        try:
            path = disk.submission(self.folder, job.task)
            kept = f"; kept at {path.absolute()}" if await asyncio.to_thread(path.is_dir) else ""
            found = await self._find(job)
        except (StoreError, BusError, OSError):
            if self.draining.is_set() or time.time() < job.deadline_at + self.settings.expire_after_s:
                return None
            return Failure(f"nobody knows whether the submission was stored: {error}{kept}")
        if found is not None:
            return found if isinstance(error, OSError) else None
        if isinstance(error, StoreError):
            return Failure(f"the submission could not be stored: {error}{kept}")
        if is_disk_full(error):
            return Failure(f"this node's disk: {error}{kept}", ErrorCode.DISK_FULL)
        return Failure(f"this node can't go on with it: {error}{kept}")  # a process or a folder, by its name

    async def _find(self, job: Job) -> Stored | None:
        """Return what is stored: what the store beyond this machine has, or without one the disk."""
        if self.remote is not None:
            return await self._unless_draining(self.remote.find(job))
        return await asyncio.to_thread(self._find_here, job)

    def _find_here(self, job: Job) -> Stored | None:
        if not disk.is_stored(self.folder, job.task):
            return None
        path = disk.submission(self.folder, job.task)
        return Stored(disk.stored_digest(self.folder, job.task), str(path.absolute()))

    async def _unless_draining(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the store's answer. It may take long; if the node drains, the next process asks again."""
        asked, drain = asyncio.create_task(work), asyncio.create_task(self.draining.wait())
        try:
            await asyncio.wait([asked, drain], return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise StoreError("the node drains")
            return asked.result()
        finally:
            await cancel_all([asked, drain], AGAIN_S)
            await asyncio.gather(asked, drain, return_exceptions=True)

    def _keep(self, job: Job, export: Export | None) -> str:
        if export is None:
            return disk.stored_digest(self.folder, job.task)
        return disk.store(
            self.folder, job.task, export.folder, export.digest, node=self.node, must_hold=self.must_hold
        )

    async def _elsewhere(self, job: Job) -> Stored:
        found = await self._find(job)
        if found is None:
            raise StoreError(f"the submission of {job.task} was there and is gone")
        return found

    def _limit_s(self, job: Job) -> float:
        """Return how long one try may take: until upstream's own deadline, and never less than a fair chance.

        What moves is not cut off at a deadline: a late submission may still count, none never does.
        """
        return max(last_call(self.settings, job) - time.time(), self.settings.expire_after_s)


def last_call(settings: Settings, job: Job) -> float:
    """Return upstream's own deadline: after it no new try begins, and what can't be stored fails the task."""
    return job.deadline_at + min(settings.deadline_margin_s, settings.expire_after_s)


def _remote(settings: Settings, bus: Bus) -> Remote | None:
    match settings.artifacts_kind:
        case "object":
            return ObjectStore(settings, bus)
        case "hub":
            return Hub(settings)
        case _:
            return None
