"""The logs from a gateway's mirror, into a broker that has lost them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from gateway.state.ledger import Ledger
from gateway.state.mirror_file import Content, read_mirror
from podium.local.discovery import is_own, with_own_keys
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN
from shared.broker.jetstream import Record, answer_of
from shared.broker.state_upgrade import split_states
from shared.broker.stream_requests import create_stream, delete_stream, find_stream, write_file
from shared.broker.stream_specs import StreamSpec, state_log, stream_specs
from shared.broker.streams import bootstrap, when_usable
from shared.errors import BusError, BusTimeoutError, BusUnavailableError, ConflictError, PodiumError
from shared.messages.jobs import decode_state_record
from shared.messages.slots import decode_lease
from shared.net import LOOPBACK
from shared.settings import Settings
from shared.settings_sources import load_settings

EPOCH_MARGIN = 1_000_000  # lease renewals since the newest claim, which the file doesn't have: weeks of them
LISTEN_S = 1.0

STOP = "stop gateways and nodes, empty the broker's store (or remove these streams), start the broker alone"


class NotEmptyError(PodiumError):
    """The broker holds something that this mirror doesn't: restoring would mix two histories."""


class Restored(Struct, frozen=True):
    """Counts of a restore."""

    records: dict[str, int]  # by stream
    written: int  # of these by this run; an interrupted run may have written others
    missing: dict[str, int]  # sequences that the file doesn't have
    cut_bytes: int  # of a truncated last line
    tasks: dict[str, int]  # by state


async def restore_from(path: Path) -> Restored:
    """Restore from a mirror's file, into the broker of the settings; raise PodiumError that says why not."""
    try:
        content = await asyncio.to_thread(read_mirror, path)
    except OSError as error:
        raise PodiumError(f"{path} can't be read: {error.strerror}") from error
    async with _broker(load_settings()) as settings:
        bus = await connect(settings, name="restore", user=ADMIN)
        try:
            return await when_usable(bus, settings, lambda: restore(bus, settings, content))
        finally:
            await bus.close()


@asynccontextmanager
async def _broker(settings: Settings) -> AsyncIterator[Settings]:
    """Use the broker of the settings; start the embedded one, alone, if it doesn't run."""
    settings, port = with_own_keys(settings), urlsplit(settings.nats_url).port or 4222
    if not is_own(settings) or await _listens(port):
        yield settings
        return
    keys = settings.nats_nkey_seed_file
    broker = Broker(settings.data / "nats", port, keys=Path(keys) if keys else None)
    await broker.start()
    try:
        yield settings
    finally:
        await broker.stop()


async def _listens(port: int) -> bool:
    try:
        async with asyncio.timeout(LISTEN_S):
            _, writer = await asyncio.open_connection(LOOPBACK, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def restore(bus: Bus, settings: Settings, content: Content) -> Restored:
    """Write the missing records of all logs, read everything back and compare.

    A broker of an older version is upgraded first. Raises NotEmptyError before it writes a record if the
    broker holds other ones or a node is running, and ConflictError if another process writes during the
    restore. An interrupted restore can be run again.
    """
    await _refuse_if_running(bus, settings)
    await split_states(bus, settings)
    logs = _logs(settings, content)
    there = {stream: await _beginning(bus, stream, content.of(stream)) for stream in logs}
    for stream, spec in logs.items():
        if there[stream] == 0:
            await _make(bus, spec, content.last(stream) + 1)
    await bootstrap(bus, settings)
    if any(len(content.of(stream)) > there[stream] for stream in logs):
        await _raise_epochs(bus, [record for stream in content.states for record in content.of(stream)])
    for stream in logs:
        await _write(bus, stream, content.of(stream), there[stream])
    ledger = await _verified(bus, content, logs)
    return Restored(
        records={stream: len(content.of(stream)) for stream in logs},
        written=sum(len(content.of(stream)) - there[stream] for stream in logs),
        missing={stream: content.missing(stream) for stream in logs},
        cut_bytes=content.size - content.end,
        tasks=dict(Counter(str(ledger.state(task, 0.0)) for task in ledger.tasks())),
    )


def _logs(settings: Settings, content: Content) -> dict[str, StreamSpec]:
    """Return the logs to restore, the slots' before JOBS; also of slots that the settings no longer have."""
    known = {spec.config["name"]: spec for spec in stream_specs(settings)}
    named = [*map(subjects.state_stream, settings.slots), *content.states]
    states = {name: known.get(name) or state_log(settings, subjects.slot_of_log(name)) for name in named}
    return {**states, subjects.JOBS_STREAM: known[subjects.JOBS_STREAM]}


async def _refuse_if_running(bus: Bus, settings: Settings) -> None:
    if await find_stream(bus, subjects.LEASES_STREAM) is None:
        return
    for slot in settings.slots:
        record = await bus.last(subjects.LEASES_STREAM, subjects.lease(slot))
        if record is not None and record.data:
            raise NotEmptyError(
                f"{_holder(record)} holds slot {slot}: {STOP}, then restore (a killed node's lease lasts "
                f"{settings.lease_ttl_s:g} s)"
            )


def _holder(record: Record) -> str:
    try:
        return f"node {decode_lease(record.data).node}"
    except ValueError:
        return "something with a lease that can't be read"


async def _beginning(bus: Bus, stream: str, records: list[Record]) -> int:
    """Return how many of the file's records the log already has. Raises NotEmptyError if it has others."""
    if await find_stream(bus, stream) is None:
        return 0
    found = await _all(bus, stream)
    for stored, record in zip(found, records, strict=False):
        if (stored.subject, stored.data) != (record.subject, record.data):
            raise NotEmptyError(
                f"{stream} holds {stored.subject} at {stored.sequence}, the file {record.subject}: {STOP}"
            )
    if len(found) > len(records):
        raise NotEmptyError(f"{stream} holds {len(found)} records, the file {len(records)}: {STOP}")
    return len(found)


async def _make(bus: Bus, spec: StreamSpec, first: int) -> None:
    """Make a missing or empty log start at `first`; keep one that already does."""
    name = spec.config["name"]
    found = await find_stream(bus, name)
    if found is not None and found.last + 1 >= first:
        return
    if found is not None:
        await delete_stream(bus, name)
    await create_stream(bus, spec.config | {"first_seq": first})
    made = await find_stream(bus, name)
    if made is None or made.last + 1 < first:  # a service that starts was faster, with a log from 1 on
        raise BusUnavailableError(f"another process has made {name} meanwhile: {STOP}, then restore again")


async def _raise_epochs(bus: Bus, states: list[Record]) -> None:
    """Make the next lease's revision, and so its epoch, larger than any epoch of the old log."""
    epochs = [0]
    for record in states:
        try:
            epochs.append(decode_state_record(record.data).epoch)
        except ValueError:
            continue  # malformed in the old log too; restored as it is
    found = await find_stream(bus, subjects.LEASES_STREAM)
    newest = max(found.last if found is not None else 0, *epochs)
    query = {"seq": newest + EPOCH_MARGIN}
    await _ask(bus, f"$JS.API.STREAM.PURGE.{subjects.LEASES_STREAM}", query)


async def _write(bus: Bus, stream: str, records: list[Record], there: int) -> None:
    found = await find_stream(bus, stream)
    last = found.last if found is not None else 0
    if found is not None:  # an interrupted restore may have made the log of a slot that is gone, and no more
        await write_file(bus, found.config)
    for record in records[there:]:
        try:
            last = await bus.append(stream, record.subject, record.data, last=last)
        except (BusTimeoutError, ConflictError) as error:
            stored = await bus.read(stream, last)
            if [(each.subject, each.data) for each in stored] != [(record.subject, record.data)]:
                raise ConflictError(
                    f"another process writes to {stream}: {STOP}, then restore again"
                ) from error
            last = stored[0].sequence


async def _verified(bus: Bus, content: Content, logs: Iterable[str]) -> Ledger:
    """Check that the logs equal the file; return their ledger."""
    ledger = Ledger()
    for stream in logs:
        stored = await _all(bus, stream)
        wanted = [(record.subject, record.data) for record in content.of(stream)]
        if [(record.subject, record.data) for record in stored] != wanted:
            raise BusError(f"{stream} differs from what was written: {STOP}, then restore again")
        for record in stored:
            ledger.apply(stream, record)
    return ledger


async def _all(bus: Bus, stream: str) -> list[Record]:
    return [record async for records in bus.read_all(stream) for record in records]


async def _ask(bus: Bus, subject: str, query: dict[str, Any] | None = None) -> None:
    reply = answer_of(await bus.request(subject, json.dumps(query).encode() if query else b""), subject)
    if "error" in reply:
        raise BusUnavailableError(f"{subject}: {reply['error'].get('description')}")
