"""Define the streams and the lease bucket; create them if absent, refuse incompatible ones."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from msgspec import Struct

from shared import subjects
from shared.broker.bus import Bus
from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    IncompatibleStreamError,
    NobodyAnswersError,
)
from shared.logs import get_logger
from shared.settings import Settings

STREAM_EXISTS = 10058
NOT_FOUND = 10059
INFO_TIMEOUT_S = 5.0
NONCES_KEPT_S: Final = 300.0  # a nonce from the future is valid for twice upstream's window of 120 s
RETRY_S: Final = 0.25

T = TypeVar("T")

log = get_logger()


class StreamSpec(Struct, frozen=True):
    """A stream's configuration, and which of its fields carry a promise and so must not differ."""

    config: dict[str, Any]
    binding: tuple[str, ...]


class StreamInfo(Struct, frozen=True, kw_only=True):
    """One stream at one moment."""

    config: dict[str, Any]
    created: str  # RFC 3339; a stream re-created under the same name has another
    now: str  # the broker's clock, RFC 3339
    messages: int
    bytes: int
    first: int  # sequence of the oldest message
    last: int  # sequence of the newest message there ever was


async def find_stream(bus: Bus, name: str, *, timeout_s: float = INFO_TIMEOUT_S) -> StreamInfo | None:
    """Return the stream of this name, or None. Raises BusError."""
    reply = json.loads((await bus.request(bus.info_subject(name), timeout_s=timeout_s)).data)
    if "error" in reply:
        if reply["error"].get("err_code") == NOT_FOUND:
            return None
        raise BusUnavailableError(f"stream {name}: {reply['error'].get('description')}")
    state = reply["state"]
    return StreamInfo(
        config=reply["config"],
        created=reply["created"],
        now=reply.get("ts", ""),
        messages=state["messages"],
        bytes=state["bytes"],
        first=state["first_seq"],
        last=state["last_seq"],
    )


def stream_specs(settings: Settings) -> list[StreamSpec]:
    """Return all streams of Podium."""
    stores = [_artifacts(settings, slot) for slot in settings.slots if settings.artifacts_kind == "object"]
    return [
        _log(settings, subjects.JOBS_STREAM, [subjects.ANY_JOB, subjects.ANY_RESERVATION]),
        _log(settings, subjects.STATE_STREAM, [subjects.ANY_STATE]),
        _leases(settings),
        _watched(subjects.PROGRESS_STREAM, subjects.ANY_PROGRESS, max_msgs_per_subject=1000),
        _watched(subjects.DECISIONS_STREAM, subjects.ANY_DECISION, max_msgs=10_000),
        _scores(settings),
        _nonces(),
        *stores,
    ]


def _log(settings: Settings, name: str, bound: list[str]) -> StreamSpec:
    """Return JOBS or STATE: append-only, without an age limit. A full one refuses, and drops no record."""
    config = {
        "name": name,
        "subjects": bound,
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_bytes": settings.log_max_bytes,
        "max_age": 0,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "allow_direct": True,
        "deny_delete": True,
        "deny_purge": True,
        "num_replicas": settings.nats_replicas,
    }
    limits = ("max_age", "max_msgs", "max_msgs_per_subject")
    return StreamSpec(config, ("subjects", "storage", "retention", "discard", *limits, "allow_direct"))


def _leases(settings: Settings) -> StreamSpec:
    """Return the bucket of leases, with history 1: an expired lease can't bring back an older one."""
    config = {
        "name": subjects.LEASES_STREAM,
        "subjects": [subjects.ANY_LEASE],
        "storage": "file",  # epochs are sequences: they must not restart with the broker
        "retention": "limits",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "allow_rollup_hdrs": False,  # one write with such a header deletes every other slot's lease
        "deny_delete": True,
        "num_replicas": settings.nats_replicas,
    }
    return StreamSpec(
        config, ("subjects", "storage", "max_msgs_per_subject", "allow_direct", "allow_msg_ttl")
    )


def _watched(name: str, subject: str, **limits: int) -> StreamSpec:
    """Return a stream for watchers only: in memory, the oldest messages are dropped."""
    config = {
        "name": name,
        "subjects": [subject],
        **limits,
        "max_bytes": 16 << 20,
        "storage": "memory",
        "retention": "limits",
        "discard": "old",
        "allow_direct": True,
    }
    return StreamSpec(config, ("subjects",))


def _scores(settings: Settings) -> StreamSpec:
    """Return the stream with the newest score of each task."""
    config = {
        "name": subjects.SCORES_STREAM,
        "subjects": [subjects.ANY_SCORE],
        "max_msgs_per_subject": 1,
        "max_bytes": 64 << 20,
        "storage": "file",
        "retention": "limits",
        "discard": "old",  # the oldest score counts least: its evidence has faded
        "allow_direct": True,
        "num_replicas": settings.nats_replicas,
    }
    return StreamSpec(config, ("subjects", "storage", "max_msgs_per_subject", "allow_direct"))


def _nonces() -> StreamSpec:
    """Return the stream of signed requests that gateways have seen and that could still be replayed."""
    config = {
        "name": subjects.NONCES_STREAM,
        "subjects": [subjects.NONCES],
        "max_age": round(NONCES_KEPT_S * 1e9),
        "max_bytes": 64 << 20,
        "storage": "file",  # in memory, a restarted broker would forget what could be replayed
        "retention": "limits",
        "discard": "old",
        "allow_direct": True,
    }
    return StreamSpec(config, ("subjects", "storage", "allow_direct"))


def _artifacts(settings: Settings, slot: str) -> StreamSpec:
    """Return a slot's object store. Unlike a log it forgets: a submission is fetched soon or never."""
    config = {
        "name": subjects.artifacts_stream(slot),
        "subjects": [subjects.artifact_chunks(slot, ">"), subjects.artifacts_of_slot(slot)],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_bytes": settings.artifacts_bucket_max_bytes,
        "max_age": round(settings.artifacts_keep_s * 1e9),
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "num_replicas": settings.nats_replicas,
    }
    return StreamSpec(config, ("subjects", "storage", "retention", "discard", "allow_direct"))


async def bootstrap(bus: Bus, settings: Settings) -> list[str]:
    """Create every absent stream, and return the names of those created; give the others more room.

    Idempotent, and safe when several services start at once: a limit only grows. Raises
    IncompatibleStreamError for a stream that would break a promise.
    """
    made = []
    for spec in stream_specs(settings):
        found = await _find(bus, spec.config["name"])
        if found is None:
            found = await _create(bus, spec)
            made.append(spec.config["name"])
        _check(spec, found)
        if 0 < found.get("max_bytes", -1) < spec.config.get("max_bytes", -1):
            await _raise_limit(bus, found, spec.config["max_bytes"])
    return made


async def ready(bus: Bus, settings: Settings, needed: Iterable[tuple[str, str]]) -> None:
    """Return once the streams are known to exist; create them if this user may.

    A guest of the broker may not. It reads the newest record of each `needed` (stream, subject) instead.
    Raises BusUnavailableError, with what to do, and IncompatibleStreamError.
    """
    if not bus.guest:
        await bootstrap(bus, settings)
        return
    for stream, subject in needed:
        try:
            await bus.last(stream, subject)
        except NobodyAnswersError as error:
            raise BusUnavailableError(
                f"stream {stream} does not exist (yet): if this stays, the broker is new or its store was "
                "emptied; `podium bootstrap` makes the streams"
            ) from error


async def when_usable(bus: Bus, settings: Settings, prepare: Callable[[], Awaitable[T]]) -> T:
    """Call `prepare` until JetStream answers, for `nats_connect_timeout_s`: the port opens before that."""
    give_up_at = time.monotonic() + settings.nats_connect_timeout_s
    while True:
        try:
            return await prepare()
        except (BusUnavailableError, BusTimeoutError):
            if time.monotonic() > give_up_at or bus.closed.is_set():
                raise
        await asyncio.sleep(RETRY_S)


async def _find(bus: Bus, name: str) -> dict[str, Any] | None:
    found = await find_stream(bus, name)
    return found.config if found is not None else None


async def _create(bus: Bus, spec: StreamSpec) -> dict[str, Any]:
    name = spec.config["name"]
    payload = json.dumps(spec.config).encode()
    reply = json.loads((await bus.request(f"$JS.API.STREAM.CREATE.{name}", payload, timeout_s=5)).data)
    if "error" not in reply:
        config: dict[str, Any] = reply["config"]
        return config
    if reply["error"].get("err_code") == STREAM_EXISTS:  # another service created it first, with other limits
        found = await _find(bus, name)
        if found is not None:
            return found
    raise BusError(f"stream {name} can't be created: {reply['error'].get('description')}")


async def _raise_limit(bus: Bus, found: dict[str, Any], max_bytes: int) -> None:
    """Give a stream more room. It works on with what it has if the broker's store has none."""
    name = found["name"]
    payload = json.dumps(found | {"max_bytes": max_bytes}).encode()
    reply = json.loads((await bus.request(f"$JS.API.STREAM.UPDATE.{name}", payload, timeout_s=5)).data)
    if "error" in reply:
        why = reply["error"].get("description")
        log.error("a stream can't get more room", stream=name, max_bytes=max_bytes, error=why)
    else:
        log.info("a stream has more room", stream=name, max_bytes=max_bytes)


def _check(spec: StreamSpec, found: dict[str, Any]) -> None:
    for field in spec.binding:
        wanted, got = spec.config[field], found.get(field)
        if got != wanted and not (got is None and wanted in (0, -1, False)):
            raise IncompatibleStreamError(
                f"stream {spec.config['name']} exists with {field}={got!r} where Podium needs {wanted!r}: "
                "use another NATS account or store folder, or move that stream away"
            )
