"""What the client library tells us of a connection: lost, back, refused, denied."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nats.aio.client import Client

from shared.credentials import Identity, identify
from shared.errors import RefusedError, SettingsError
from shared.handshake import denial, refusal
from shared.logs import get_logger
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.bus import Bus

log = get_logger()

# The library's reader keeps TLS links half open when the server ends them; asyncio warns of it every time.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received() has no effect" not in record.msg)


def callbacks(bus: Bus, settings: Settings, identity: Identity | None) -> dict[str, Any]:
    """What the client library tells us of the connection."""
    logged = ""

    async def on_closed() -> None:
        bus.closed.set()

    async def on_disconnected() -> None:
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
        if writer is not None:
            writer.transport.abort()
