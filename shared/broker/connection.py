"""What the client library tells us of a connection: lost, back, refused, denied."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from nats.aio.client import Client

from shared.broker.client_errors import denial, refusal
from shared.broker.credentials import Identity, identify
from shared.errors import RefusedError, SettingsError
from shared.logs import get_logger
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.broker.bus import Bus

log = get_logger()

# The library's reader keeps TLS links half open when the server ends them; asyncio warns of it every time.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received() has no effect" not in record.msg)


def callbacks(bus: Bus, settings: Settings, identity: Identity | None) -> dict[str, Any]:
    """What the client library tells us of the connection."""
    logged = ""

    async def on_closed() -> None:
        bus.closed.set()

    async def on_disconnected() -> None:
        _watch_reconnecting(bus)
        if bus.entered_at is not None and not bus.closing:
            log.warning("lost NATS, reconnecting", url=settings.nats_url)

    async def on_reconnected() -> None:
        nonlocal logged
        logged = ""
        log.info("NATS is back", url=settings.nats_url)
        for callback in bus.reconnected:
            callback()

    async def on_error(error: Exception) -> None:
        nonlocal logged
        if (found := denial(error)) is not None:
            bus.note_denial(found)
            return
        if not bus.connected:
            drop_link(bus.client)
        if (why := refusal(error, settings, identity)) is None:
            log.debug("NATS client error", error=repr(error))
            return
        if bus.entered_at is None:
            raise RefusedError(why) from error  # out of the library's endless attempts to connect
        if why != logged:
            log.error(why)
        logged = why
        _take_new_key(bus, settings)

    return {
        "closed_cb": on_closed,
        "disconnected_cb": on_disconnected,
        "reconnected_cb": on_reconnected,
        "error_cb": on_error,
    }


def _watch_reconnecting(bus: Bus) -> None:
    """An error in the library's task that reconnects, and so calls this, ends it for ever without a word."""

    def ended(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the client library gave up reconnecting", error=repr(error))
            bus.closed.set()

    if bus.client.is_reconnecting and (task := asyncio.current_task()) is not None:
        task.add_done_callback(ended)


def _take_new_key(bus: Bus, settings: Settings) -> None:
    """The key was rotated: the next attempt is with what the seed file holds now; nothing has to end."""
    try:
        identity = identify(settings, bus.user)
    except SettingsError as error:
        log.error("no new key either", error=str(error))
        return
    if identity is not None and identity.seed != bus.client._nkeys_seed_str:
        bus.client._nkeys_seed_str = identity.seed
        bus.client._setup_nkeys_connect()


def drop_link(client: Client) -> None:
    """Close what a failed attempt to connect left open; the library forgets it."""
    transport = client._transport
    for writer in (getattr(transport, "_io_writer", None), getattr(transport, "_bare_io_writer", None)):
        # Some Pythons (3.11.2) can't abort a TLS transport that is closed: it has no protocol any more.
        if writer is not None and getattr(writer.transport, "_ssl_protocol", writer) is not None:
            writer.transport.abort()
