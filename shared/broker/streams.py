"""Make the broker's streams ready: create those that are absent, upgrade and check the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from shared.broker.bus import Bus
from shared.broker.state_upgrade import end_copy, split_states
from shared.broker.stream_requests import create_stream, find_stream, update_stream, write_file
from shared.broker.stream_specs import StreamSpec, stream_specs
from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    IncompatibleStreamError,
    NobodyAnswersError,
)
from shared.logs import get_logger
from shared.settings import Settings

RETRY_S: Final = 0.25
SETTLE_S: Final = 1.0  # within which the update of a service that starts at the same time comes
MOST_RAISES: Final = 8  # of one limit that others lower; each service sends two updates of a stream at most

T = TypeVar("T")

log = get_logger()


async def bootstrap(bus: Bus, settings: Settings) -> list[str]:
    """Create every absent stream, and return the names of those created; give the others more room.

    The file of a stream that was created and never updated is written again: it may be broken (see
    `create_stream`). Idempotent, and safe when several services start at once: a limit only grows. Raises
    IncompatibleStreamError for a stream that would break a promise.
    """
    made, raised = await split_states(bus, settings), {}
    for spec in stream_specs(settings):
        name = spec.config["name"]
        stream = await find_stream(bus, name)
        found = stream.config if stream is not None else await create_stream(bus, spec.config)
        if stream is None:
            made.append(name)
        if found.get("mirror"):
            found = await end_copy(bus, spec, found)
        _check(spec, found)
        await _write_file(bus, found)
        most = spec.config.get("max_bytes", -1)
        if _is_below(found, most) and await _raise_limit(bus, found, most):
            raised[name] = most
    await _keep_raised(bus, raised)
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


async def _write_file(bus: Bus, found: dict[str, Any]) -> None:
    """Have the broker write a stream's file if no update ever did. Raises as `_raise_limit`."""
    try:
        await write_file(bus, found)
    except (BusTimeoutError, BusUnavailableError):
        raise
    except BusError as error:
        log.error("a stream's file can't be written again", stream=found["name"], error=str(error))


def _is_below(config: dict[str, Any], max_bytes: int) -> bool:
    """Return whether a stream has a limit, and a lower one than that."""
    return bool(0 < config.get("max_bytes", -1) < max_bytes)


async def _keep_raised(bus: Bus, raised: dict[str, int]) -> None:
    """Raise limits again that another service lowers. Raises as `_raise_limit`.

    An update has the whole configuration. So a service that read it before it had more room, and sends its
    own update after that, gives the stream the old limit again. No update can be made conditional.
    """
    for _ in range(MOST_RAISES):
        if not raised:
            return
        await asyncio.sleep(SETTLE_S)
        lowered = {}
        for name, most in raised.items():
            stream = await find_stream(bus, name)
            if stream is None or not _is_below(stream.config, most):
                continue
            if await _raise_limit(bus, stream.config, most):
                lowered[name] = most
        raised = lowered
    if raised:
        log.error("streams get less room again and again", streams=sorted(raised))


async def _raise_limit(bus: Bus, found: dict[str, Any], max_bytes: int) -> bool:
    """Give a stream more room; return whether it has it. It works on with what it has if the store has none.

    Raises BusTimeoutError and BusUnavailableError: a broker that died meanwhile may have lost the stream,
    which must then be created again.
    """
    name = found["name"]
    try:
        await update_stream(bus, found | {"max_bytes": max_bytes})
    except (BusTimeoutError, BusUnavailableError):
        raise
    except BusError as error:
        log.error("a stream can't get more room", stream=name, max_bytes=max_bytes, error=str(error))
        return False
    log.info("a stream has more room", stream=name, max_bytes=max_bytes)
    return True


def _check(spec: StreamSpec, found: dict[str, Any]) -> None:
    for field in spec.binding:
        wanted, got = spec.config[field], found.get(field)
        if got != wanted and not (got is None and wanted in (0, -1, False)):
            raise IncompatibleStreamError(
                f"stream {spec.config['name']} exists with {field}={got!r} where Podium needs {wanted!r}: "
                "use another NATS account or store folder, or move that stream away"
            )
