"""A copy of all logs in a file of this gateway, in case the broker loses its disk.

The broker's logs are the truth and nothing waits for the mirror. It follows a few milliseconds behind,
one batch of records per fsync. `podium restore` writes it back to the broker.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from gateway.state.mirror_file import Content, DamagedMirrorError, Header, encode_line, read_mirror
from shared.broker.bus import Bus, Record
from shared.errors import BusError, NobodyAnswersError, PodiumError
from shared.files import open_private, sync
from shared.logs import get_logger

FOLDER = "mirror"  # in the gateway's data folder
MOST_GATEWAYS = 64  # that share one data folder
RETRY_S = 5.0

log = get_logger()


class LostRecordsError(PodiumError):
    """The broker's logs lack records that this gateway has seen: deciding on them would forget jobs."""


class Mirror:
    """One gateway's mirror; `open`, `begin`, then `run` while the gateway does."""

    def __init__(self, folder: Path, gateway: str) -> None:
        self.wake = asyncio.Event()  # set when the ledger has grown
        self.error: str | None = None  # why the file is not being written
        self.path = folder / FOLDER / "1.jsonl"
        self.last: dict[str, int] = {}  # by stream, the newest sequence in the file
        self._folder = folder / FOLDER
        self._gateway = gateway
        self._held: int | None = None
        self._file: BinaryIO | None = None
        self._size = 0
        self._writing = threading.Lock()
        self._content: Content | None = None

    def open(self) -> None:
        """Lock the first file that no other gateway holds, and read it. Blocks; raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, MOST_GATEWAYS + 1):
            held = os.open(self._folder / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(held)
                continue
            self._held, self.path = held, self._folder / f"{number}.jsonl"
            break
        else:
            raise PodiumError(f"{MOST_GATEWAYS} gateways use {self._folder}: give this one another data_dir")
        try:
            self._content = read_mirror(self.path) if self.path.exists() else None
        except DamagedMirrorError as error:  # the logs themselves are still there
            log.error(
                "the mirror is damaged; starting a new one", kept=str(self._set_aside()), error=str(error)
            )

    async def begin(self, bus: Bus) -> None:
        """Continue the file if it matches the broker's logs; else set it aside and begin another.

        Raises LostRecordsError if the logs lack records of the file, BusError, and OSError.
        """
        content, goes_on = self._content, self._content is not None
        for stream, records in content.records.items() if content is not None else ():
            found = await _sequences(bus, stream)
            # Check each one, not only the newest: the server skips single records of a damaged block.
            lost = next((record for record in records if _key(record) not in found), None)
            if lost is not None:
                raise LostRecordsError(
                    f"{self.path} has record {lost.sequence} of {lost.subject}, which {stream} lacks: the "
                    "broker lost acknowledged records. Stop the nodes and `podium restore` that file, or "
                    "move it away and start the gateway again, to continue without it"
                )
            newest = records[-1]
            goes_on &= found[_key(newest)] == newest.sequence
        await asyncio.to_thread(self._begin, goes_on)

    def _begin(self, goes_on: bool) -> None:
        content, self._content = self._content, None
        if content is not None and goes_on:
            self.last = {stream: content.last(stream) for stream in content.records}
            self._size, self._file = content.end, open_private(self.path, empty=False)
            if content.size > content.end:
                log.info("the mirror's last line was cut short; rewriting it", path=str(self.path))
            return
        if content is not None:
            log.warning(
                "the logs were restored; keeping the mirror they came from", kept=str(self._set_aside())
            )
        self._size, self._file = 0, open_private(self.path, empty=True)
        self._write(msgspec.json.encode(Header(1, self._gateway)) + b"\n")
        sync(self.path.parent)

    def fail(self, error: OSError) -> None:
        """Run without the file from now on; `error` keeps why."""
        self.error = f"{self.path} can't be used: {error}"
        log.error("running without a mirror", error=self.error)

    async def run(self, bus: Bus, folded: Mapping[str, int]) -> None:
        """Follow the ledger forever; a disk that can't be written is logged once and retried."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            try:
                await self.catch_up(bus, folded)
                self.error = None if self._file is not None else self.error
            except (BusError, OSError) as error:
                if self.error != str(error):
                    self.error = str(error)
                    log.error("can't write the mirror, retrying", path=str(self.path), error=self.error)
                await asyncio.sleep(RETRY_S)
                self.wake.set()

    async def catch_up(self, bus: Bus, folded: Mapping[str, int]) -> None:
        """Write the folded records that the file lacks. Raises BusError and OSError."""
        for stream, end in list(folded.items()):  # it grows with a log for each new slot
            while (last := self.last.get(stream, 0)) < end and (records := await bus.read(stream, last)):
                await asyncio.to_thread(self._append, stream, records)

    def behind(self, folded: Mapping[str, int]) -> bool:
        """Return whether the ledger has folded records that the file lacks."""
        return any(self.last.get(stream, 0) < end for stream, end in folded.items())

    def close(self) -> None:
        """Close the file. Blocks while a batch is being written."""
        with self._writing:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def _append(self, stream: str, records: list[Record]) -> None:
        self._write(b"".join(encode_line(stream, record) for record in records))
        self.last[stream] = records[-1].sequence

    def _write(self, data: bytes) -> None:
        """Write all of it to disk; whatever a failed write leaves, the next one replaces."""
        with self._writing:
            if self._file is None:
                raise OSError(self.error or "the mirror is closed")
            self._file.truncate(self._size)
            self._file.seek(self._size)
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._size += len(data)

    def _set_aside(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        kept = self.path.with_name(f"{self.path.stem}-{stamp}.jsonl")
        os.rename(self.path, kept)
        return kept


async def _sequences(bus: Bus, stream: str) -> dict[bytes, int]:
    """Return each record's sequence in the log: in a restored log it differs from the mirrored one."""
    found = dict[bytes, int]()
    try:
        await bus.last(stream, ">")
    except NobodyAnswersError:  # a slot that the settings no longer have: its log isn't made by itself
        return found
    async for records in bus.read_all(stream):
        found |= {_key(record): record.sequence for record in records}
    return found


def _key(record: Record) -> bytes:
    """Return a record's identity without its sequence; short, as a log may have very many."""
    return hashlib.sha256(record.subject.encode() + b"\n" + record.data).digest()
