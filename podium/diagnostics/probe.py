"""Gather the facts for `podium doctor`, without changing anything."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Set
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from nats.aio.msg import Msg

from gateway.api.tokens import own_token
from gateway.state.ledger import Ledger, TaskHistory, TaskState
from gateway.upstream import repositories
from gateway.views.schemas import GatewayInfo
from podium.client import Client
from podium.diagnostics.machine import MachineVitals, probe_machine
from podium.diagnostics.monitor import Monitor, probe_monitor
from podium.local.discovery import monitor_url
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import OPERATOR
from shared.broker.stream_requests import StreamInfo, find_stream
from shared.broker.stream_specs import StreamSpec, stream_specs
from shared.errors import BusError, NobodyAnswersError, PodiumError
from shared.messages.jobs import Job
from shared.messages.runs import decode_progress
from shared.messages.slots import Heartbeat, Lease, decode_heartbeat, decode_lease
from shared.settings import Settings

CONNECT_S = 5.0
ANSWER_S = 5.0  # a healthy broker answers in milliseconds
LISTEN_BEATS = 2.5  # heartbeats
PROBE = f"$KV.{subjects.LEASES_BUCKET}.probe.doctor"  # two tokens, so it is no slot's lease


class StreamVitals(Struct, frozen=True, kw_only=True):
    """One stream: its expected configuration and its actual state."""

    spec: StreamSpec
    found: StreamInfo | None = None
    error: str | None = None  # why it could not be inspected


class ReceivedHeartbeat(Struct, frozen=True):
    """One heartbeat, and when it arrived by this machine's clock."""

    heartbeat: Heartbeat
    at: float


class OpenJob(Struct, frozen=True, kw_only=True):
    """A job without a result."""

    job: Job
    state: TaskState
    chain: TaskHistory
    progress_at: float | None = None  # by the clock of its node
    unread: str | None = None  # why its newest progress can't be decoded


class GatewayVitals(Struct, frozen=True, kw_only=True):
    """State of a gateway, as reported over HTTP."""

    url: str
    error: str | None = None
    info: GatewayInfo | None = None
    skew_s: float | None = None  # its clock minus ours


class Folder(Struct, frozen=True):
    """Disk space for one folder."""

    path: str
    total: int
    free: int
    error: str | None = None  # why it could not be read


class Vitals(Struct, frozen=True, kw_only=True):
    """All facts at one moment. Without a connection to the broker, the facts from it are empty."""

    now: float
    version: str
    settings: Settings
    chosen: frozenset[str] = frozenset()  # settings that are set here, not left at their default
    broker_error: str | None = None
    broker_version: str = ""
    broker_skew_s: float | None = None  # its clock minus ours
    read_error: str | None = None  # of a log, while connected
    append_error: str | None = None
    appended: bool = False  # whether an append was tried: not every user may append
    denied: tuple[str, ...] = ()
    streams: tuple[StreamVitals, ...] = ()
    unread: tuple[str, ...] = ()  # logs of slots' states that nobody answers for
    old_log: bool = False  # whether STATE is there, of which not every user may know
    jobs: tuple[OpenJob, ...] = ()
    malformed: int = 0
    heartbeats: tuple[ReceivedHeartbeat, ...] = ()
    leases: dict[str, Lease] = {}
    unread_leases: dict[str, str] = {}  # slot -> why its lease can't be decoded
    monitor: Monitor
    gateway: GatewayVitals
    folders: tuple[Folder, ...] = ()
    nodes_file_age_s: float | None = None  # of upstream's nodes; None if there is no such file
    entry_faults: tuple[str, ...] = ()  # of the training repositories that are configured
    variables: frozenset[str] = frozenset()  # names of the environment's, here
    machine: MachineVitals = MachineVitals()


async def gather(
    settings: Settings, url: str, monitor: str | None, version: str, chosen: Set[str] = frozenset()
) -> Vitals:
    """Gather all facts. Takes about three seconds, and ten if the broker doesn't answer."""
    outside = asyncio.gather(
        asyncio.to_thread(probe_monitor, monitor or monitor_url(settings), ANSWER_S),
        asyncio.to_thread(probe_gateway, url, settings),
        asyncio.to_thread(probe_folders, settings),
        asyncio.to_thread(probe_nodes_file, settings),
        asyncio.to_thread(repositories.faults, settings),
        asyncio.to_thread(probe_machine, settings),
    )
    inside = await _probe_broker(settings)
    seen, gateway, folders, nodes_file_age_s, entry_faults, machine = await outside
    return Vitals(
        now=time.time(),
        version=version,
        settings=settings,
        chosen=frozenset(chosen),
        monitor=seen,
        gateway=gateway,
        folders=folders,
        nodes_file_age_s=nodes_file_age_s,
        entry_faults=tuple(entry_faults),
        variables=frozenset(os.environ),
        machine=machine,
        **inside,
    )


async def _probe_broker(settings: Settings) -> dict[str, Any]:
    patience = min(CONNECT_S, settings.nats_connect_timeout_s)
    user = OPERATOR if await asyncio.to_thread(_has_all_keys, settings) else None
    try:
        hurried = msgspec.structs.replace(settings, nats_connect_timeout_s=patience)
        bus = await connect(hurried, name="doctor", user=user)
    except PodiumError as error:
        return {"broker_error": str(error)}
    try:
        return await _probe_connected(bus, settings)
    finally:
        await bus.close()


def _has_all_keys(settings: Settings) -> bool:
    """Return whether the key setting is a folder with all users' keys, so that it has the operator's too."""
    keys = settings.nats_nkey_seed_file
    return keys is not None and Path(keys).expanduser().is_dir()


async def _probe_connected(bus: Bus, settings: Settings) -> dict[str, Any]:
    heartbeats: list[ReceivedHeartbeat] = []

    async def receive(message: Msg) -> None:
        try:
            heartbeats.append(ReceivedHeartbeat(decode_heartbeat(message.data), time.time()))
        except ValueError:
            return  # the gateway counts those

    await bus.subscribe(subjects.ANY_HEARTBEAT, receive)
    listen_until = time.monotonic() + LISTEN_BEATS * settings.heartbeat_s
    streams = await asyncio.gather(*(_probe_stream(bus, spec) for spec in stream_specs(settings)))
    seen: dict[str, Any] = {
        "streams": tuple(streams),
        "broker_version": str(bus.client.connected_server_version),
        "broker_skew_s": _skew(streams),
        "append_error": await _probe_append(bus),
        "appended": not bus.guest,
    }
    ledger = Ledger(settings.slots)
    try:
        await _fold(bus, ledger, subjects.JOBS_STREAM)
        seen["old_log"] = not bus.guest and await find_stream(bus, subjects.OLD_STATE_STREAM) is not None
        seen["unread"] = unread = await _fold_states(bus, ledger)
        if not unread:
            seen["jobs"] = tuple([await _open_job(bus, ledger, job) for job in ledger.open_jobs()])
        await asyncio.sleep(max(0.0, listen_until - time.monotonic()))
        seen["leases"], seen["unread_leases"] = await _leases(bus, settings)
    except BusError as error:
        seen["read_error"] = str(error)
    denied = tuple(denial.explain(bus.user) for denial in bus.denied)
    return seen | {"malformed": ledger.malformed, "heartbeats": tuple(heartbeats), "denied": denied}


async def _fold_states(bus: Bus, ledger: Ledger) -> tuple[str, ...]:
    """Fold the logs of all slots that there are or that JOBS names; return those that nobody answers for."""
    unread = []
    for stream in [name for name in ledger.folded if name != subjects.JOBS_STREAM]:
        try:
            await _fold(bus, ledger, stream)
        except NobodyAnswersError:
            unread.append(stream)
    return tuple(unread)


async def _fold(bus: Bus, ledger: Ledger, stream: str) -> None:
    async for records in bus.read_all(stream, timeout_s=ANSWER_S):
        for record in records:
            ledger.apply(stream, record)


async def _probe_stream(bus: Bus, spec: StreamSpec) -> StreamVitals:
    try:
        found = await find_stream(bus, spec.config["name"], timeout_s=ANSWER_S)
    except BusError as error:
        return StreamVitals(spec=spec, error=str(error))
    return StreamVitals(spec=spec, found=found)


async def _probe_append(bus: Bus) -> str | None:
    """Store a record that expires after a second; return the error, or None if the broker stored it."""
    if bus.guest:
        return None
    try:
        await bus.append(subjects.LEASES_STREAM, PROBE, b"", ttl_s=1, timeout_s=ANSWER_S)
    except BusError as error:
        return str(error)
    return None


async def _leases(bus: Bus, settings: Settings) -> tuple[dict[str, Lease], dict[str, str]]:
    """Return the slots' leases, and of those that can't be decoded why."""
    leases, unread = {}, {}
    for slot in settings.slots:
        record = await bus.last(subjects.LEASES_STREAM, subjects.lease(slot))
        if record is not None and record.data:
            try:
                leases[slot] = decode_lease(record.data)
            except ValueError as error:
                unread[slot] = str(error)
    return leases, unread


async def _open_job(bus: Bus, ledger: Ledger, job: Job) -> OpenJob:
    task, progress_at, unread = ledger.task(job.task), None, None
    assert task is not None  # it is of this ledger
    record = await bus.last(subjects.PROGRESS_STREAM, subjects.progress(job.slot, job.task))
    if record is not None and record.data:
        try:
            progress_at = decode_progress(record.data).at
        except ValueError as error:
            unread = str(error)
    state = ledger.state(task, time.time())
    chain = ledger.chain_of(job)
    return OpenJob(job=job, state=state, chain=chain, progress_at=progress_at, unread=unread)


def _skew(streams: list[StreamVitals]) -> float | None:
    """Return the broker's clock minus ours, from the newest response."""
    stamps = [each.found.now for each in streams if each.found is not None and each.found.now]
    return datetime.fromisoformat(stamps[-1]).timestamp() - time.time() if stamps else None


def probe_gateway(url: str, settings: Settings) -> GatewayVitals:
    """Read a gateway's state. Blocks."""
    try:
        client = Client(url, own_token(settings))
        asked = time.time()
        info = client.gateway()
        answered = time.time()
    except PodiumError as error:
        return GatewayVitals(url=url, error=str(error))
    return GatewayVitals(url=url, info=info, skew_s=info.now - (asked + answered) / 2)


def probe_nodes_file(settings: Settings) -> float | None:
    """Return the age of upstream's nodes file; None if none is set or there. Blocks."""
    if settings.upstream_nodes_file is None:
        return None
    try:
        return time.time() - Path(settings.upstream_nodes_file).expanduser().stat().st_mtime
    except OSError:
        return None


def probe_folders(settings: Settings) -> tuple[Folder, ...]:
    """Read the space on the disks of this machine's data and submissions. Blocks."""
    paths = dict.fromkeys((settings.data, settings.artifacts, settings.node))
    found = []
    for path in paths:
        try:
            usage = shutil.disk_usage(path)
        except (FileNotFoundError, NotADirectoryError):  # nothing was stored yet
            continue
        except OSError as error:
            found.append(Folder(str(path), 0, 0, error.strerror))
        else:
            found.append(Folder(str(path), usage.total, usage.free))
    return tuple(found)
