"""Submissions in an object store of the broker: small ones, where gateway and trainer share no disk.

One submission is one object `<task>/<digest>`, a tar of the folder, in NATS's own format, so that every
client can fetch it (`nats object get artifacts-a <task>/<digest>`). Written without the client library's
object store, which overwrites: here what makes an object appear is one append that expects no other object
to have come since this writer looked. So the first complete upload of a task wins, and there is no second.
What an upload that was cut short leaves behind are pieces that no object names; they go with time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import tarfile
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from shared import subjects
from shared.broker.bus import Bus, Record
from shared.errors import BusTimeoutError, ConflictError, StoreFullError
from shared.files import digest_of
from shared.logs import get_logger
from shared.messages.encoding import decode
from shared.messages.jobs import Job
from shared.settings import Settings
from trainer_node.artifacts.interface import NotTakenError, Stored, StoreError

CHUNK_BYTES: Final = 128 << 10  # the usual size of NATS's clients
OBJECT_TRIES: Final = 20  # to be the next to write an object; each other one that was faster costs one

log = get_logger()


class Options(Struct):
    """How an object was cut up."""

    max_chunk_size: int


class Object(Struct, omit_defaults=True):
    """The record that NATS clients keep of an object; the field names are theirs."""

    name: str
    bucket: str
    nuid: str
    size: int = 0
    chunks: int = 0
    digest: str = ""  # SHA-256= and the hash in URL-safe base64, of the bytes that are stored
    mtime: str = ""
    deleted: bool = False
    options: Options | None = None


class ObjectStore:
    """The object store of one slot."""

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self.bus = bus
        self.slot = settings.slot
        self.max_bytes = settings.artifacts_object_max_bytes
        self.bucket = subjects.artifacts_bucket(self.slot)
        self.stream = subjects.artifacts_stream(self.slot)

    async def find(self, job: Job) -> Stored | None:
        """Return the task's submission, fetched and hashed; see `Remote`."""
        found, _ = await self._look(job)
        return await self._read_back(found) if found is not None else None

    async def store(
        self, job: Job, folder: Path, digest: str, *, must_hold: Callable[[], None], limit_s: float
    ) -> Stored:
        """Put a folder there unless something is; see `Remote`."""
        try:
            async with asyncio.timeout(limit_s):
                found, _ = await self._look(job)
                if found is None:
                    packed = await asyncio.to_thread(_pack, folder, self.max_bytes)
                    found = await self._write(job, f"{job.task}/{digest}", packed, must_hold)
                return await self._read_back(found)
        except TimeoutError as error:
            raise StoreError(f"object store {self.bucket}: not done within {limit_s:.0f} s") from error
        except StoreFullError as error:
            raise NotTakenError(
                f"object store {self.bucket} is full: raise artifacts_bucket_max_bytes, or delete old objects"
            ) from error

    async def _look(self, job: Job) -> tuple[Object | None, int]:
        """Return the task's object, if any, and the sequence of the store's newest; 0 = there is none."""
        objects: dict[str, Object] = {}
        sequence = 0
        async for records in self.bus.read_all(self.stream, subject=subjects.artifacts_of_slot(self.slot)):
            sequence = records[-1].sequence
            for known in filter(None, map(_decode, records)):
                objects.pop(known.name, None)
                objects[known.name] = known
        of_task = (one for one in objects.values() if one.name.startswith(f"{job.task}/") and not one.deleted)
        return next(of_task, None), sequence

    async def _write(self, job: Job, name: str, packed: bytes, must_hold: Callable[[], None]) -> Object:
        """Store the pieces, then the object unless the task has one; return the task's object."""
        made = Object(
            name=name,
            bucket=self.bucket,
            nuid=uuid.uuid4().hex,
            size=len(packed),
            chunks=-(-len(packed) // CHUNK_BYTES),
            digest=_sum(packed),
            mtime=datetime.now(UTC).isoformat(),
            options=Options(CHUNK_BYTES),
        )
        sequence = 0
        for start in range(0, len(packed), CHUNK_BYTES):
            piece = packed[start : start + CHUNK_BYTES]
            sequence = await self.bus.append(
                self.stream, subjects.artifact_chunks(self.slot, made.nuid), piece, last_on_subject=sequence
            )
        for _ in range(OBJECT_TRIES):
            found, newest = await self._look(job)
            if found is not None:
                return found
            must_hold()
            try:
                await self.bus.append(
                    self.stream,
                    subjects.artifact(self.slot, name),
                    msgspec.json.encode(made),
                    last_on_subject=newest,
                    pattern=subjects.artifacts_of_slot(self.slot),
                )
            except (ConflictError, BusTimeoutError):
                continue  # another writer was faster, or the answer was lost: look
            return made
        raise StoreError(f"object store {self.bucket}: others were faster {OBJECT_TRIES} times in a row")

    async def _read_back(self, found: Object) -> Stored:
        packed = bytearray()
        subject = subjects.artifact_chunks(self.slot, found.nuid)
        async for records in self.bus.read_all(self.stream, subject=subject):
            for record in records:
                packed += record.data
        digest = await asyncio.to_thread(_digest, bytes(packed), found)
        if not found.name.endswith(f"/{digest}"):
            raise StoreError(
                f"object {found.name} in {self.bucket} is damaged: its content has digest {digest}"
            )
        return Stored(digest, f"nats://{self.bucket}/{found.name}")


def _decode(record: Record) -> Object | None:
    try:
        return decode(record.data, Object)
    except ValueError as error:  # no submission; it must not block others
        log.warning("an object record can't be read", subject=record.subject, error=str(error))
        return None


def _pack(folder: Path, max_bytes: int) -> bytes:
    """Return the folder as a tar: nothing in it but names and contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > max_bytes:
        raise NotTakenError(
            f"{size:,} bytes are more than artifacts_object_max_bytes ({max_bytes:,}): "
            "use a disk that gateway and trainer share, or a hub"
        )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in files:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return packed.getvalue()


def _digest(packed: bytes, found: Object) -> str:
    """Return the folder's digest, from the bytes that were fetched."""
    if (len(packed), _sum(packed)) != (found.size, found.digest):
        raise StoreError(f"object {found.name} is damaged: not the bytes that were stored")
    files: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for entry in tar:
            file = tar.extractfile(entry)
            if file is not None:
                files[entry.name] = hashlib.sha256(file.read()).hexdigest()
    return digest_of(files)


def _sum(packed: bytes) -> str:
    return f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(packed).digest()).decode()}"
