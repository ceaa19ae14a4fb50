"""Connect to the broker, and handle what happens to the connection: lost, back, refused, denied."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from shared.broker.bus import REQUEST_TIMEOUT_S, Bus, drop_link
from shared.broker.client_errors import PLAIN_TEXT, denial, refusal
from shared.broker.credentials import NOBODY, Identity, identify, inbox_prefix, tls_context
from shared.errors import (
    BusUnavailableError,
    RefusedError,
    SettingsError,
)
from shared.logs import get_logger
from shared.messages.encoding import decode
from shared.settings import Settings

log = get_logger()

NATS_PORT: Final = 4222
GREETING_TIMEOUT_S: Final = 3.0  # brokers with TLS greet in plain text after they waited 1 s for a handshake

# The library's reader keeps TLS links half open when the server ends them; asyncio warns of it every time.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received() has no effect" not in record.msg)


class Callbacks:
    """What the client library calls when the connection changes."""

    def __init__(self, bus: Bus, settings: Settings, identity: Identity | None) -> None:
        self._bus = bus
        self._settings = settings
        self._identity = identity
        self._logged = ""  # the newest refusal: each is logged once until the link is back
        self.late = False  # the broker has TLS, and the newest handshake came too late for it

    def options(self) -> dict[str, Any]:
        """Return them under the names that the library's `connect` takes."""
        return {
            "closed_cb": self.on_closed,
            "disconnected_cb": self.on_disconnected,
            "reconnected_cb": self.on_reconnected,
            "error_cb": self.on_error,
        }

    async def on_closed(self) -> None:
        """Tell all that wait for it that the link is closed for good."""
        self._bus.end_lost()
        self._bus.closed.set()

    async def on_disconnected(self) -> None:
        """Log the loss, and see that reconnecting doesn't end silently."""
        _watch_reconnecting(self._bus)
        self._bus.note_loss()
        if self._bus.entered_at is not None and not self._bus.closing:
            log.warning("lost NATS, reconnecting", url=self._settings.nats_url)

    async def on_reconnected(self) -> None:
        """End the waits for lost answers, and wake the parts that poll after a reconnect."""
        self._logged = ""
        self._bus.end_lost()
        log.info("NATS is back", url=self._settings.nats_url)
        for callback in self._bus.reconnected:
            callback()

    async def on_error(self, error: Exception) -> None:
        """Note a denial; log a refusal once. Raises RefusedError during the first connect."""
        bus = self._bus
        if (found := denial(error)) is not None:
            bus.note_denial(found)
            return
        reconnecting = asyncio.current_task() is bus.client._reconnection_task
        if not bus.connected or reconnecting:
            drop_link(bus.client)
            if reconnecting and bus.client._ping_interval_task is not None:
                bus.client._ping_interval_task.cancel()  # the library makes a new one, and keeps both
            if bus.entered_at is None:
                bus.client._transport = None  # else the library waits forever: a failed handshake has no end
        why = refusal(error, self._settings, self._identity)
        self.late = await _came_too_late(error, self._settings.nats_url)
        if why is None or self.late:
            log.debug("NATS client error", error=repr(error))
            return
        if bus.entered_at is None:
            raise RefusedError(why) from error  # out of the library's endless attempts to connect
        if why != self._logged:
            log.error(why)
        self._logged = why
        _read_new_key(bus, self._settings)


async def _came_too_late(error: Exception, url: str) -> bool:
    """Return whether a TLS handshake failed at a broker that has TLS.

    A broker that waited too long for the handshake greets in plain text, as one without TLS does at once. A
    broker that can't be asked now, or ended the link, is asked again with the next attempt.
    """
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return True
    if not isinstance(error, ssl.SSLError) or error.reason not in PLAIN_TEXT:
        return False
    address = urlsplit(url)
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.hostname, address.port or NATS_PORT)
            with closing(writer):
                greeting = decode((await reader.readline()).removeprefix(b"INFO "), Any)
    except (OSError, ValueError):  # TimeoutError is an OSError
        return True
    return isinstance(greeting, dict) and bool(greeting.get("tls_required") or greeting.get("tls_available"))


def _watch_reconnecting(bus: Bus) -> None:
    """Watch the library's reconnect task, which calls this: an error ends it forever and silently."""

    def ended(task: asyncio.Task[Any]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if bus.client._reconnection_task is not task:  # the link was lost again: a newer task reconnects
            log.debug("an older task of the NATS client failed", error=repr(error))
        else:
            log.error("the NATS client gave up reconnecting", error=repr(error))
            bus.closed.set()

    if bus.client.is_reconnecting and (task := asyncio.current_task()) is not None:
        task.add_done_callback(ended)


def _read_new_key(bus: Bus, settings: Settings) -> None:
    """Read a rotated key from the seed file; the next attempt uses it, and no restart is needed."""
    try:
        identity = identify(settings, bus.user)
    except SettingsError as error:
        log.error("the new key can't be read", error=str(error))
        return
    if identity is not None and identity.seed != bus.client._nkeys_seed_str:
        bus.client._nkeys_seed_str = identity.seed
        bus.client._setup_nkeys_connect()


async def connect(settings: Settings, *, name: str, user: str | None = None) -> Bus:
    """Connect as `name`, with the key of `user` (None: the user that the seed file names).

    Waits `nats_connect_timeout_s` for the broker, then raises BusUnavailableError. Raises RefusedError if
    it answers but refuses this process, and SettingsError if the key or the CA certificate can't be used.

    The options matter: the library's defaults give up forever after two minutes, notice a dead
    link after six, and store what was published while disconnected long after the call reported failure.
    """
    identity = identify(settings, user)
    bus = Bus(Client(), identity.user if identity else NOBODY)
    callbacks = Callbacks(bus, settings, identity)
    options: dict[str, Any] = {
        "servers": [settings.nats_url],
        "name": name,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "connect_timeout": 2,
        "ping_interval": 10,
        "max_outstanding_pings": 2,
        "drain_timeout": REQUEST_TIMEOUT_S,
        "pending_size": 0,  # while disconnected a publish fails at once instead of being stored later
    }
    if identity is not None:
        options |= {"nkeys_seed_str": identity.seed, "inbox_prefix": inbox_prefix(bus.user)}
    if (context := tls_context(settings)) is not None:
        # Handshake first: an attacker could strip the offer from a broker that merely offers TLS.
        options |= {"tls": context, "tls_handshake_first": True}
    try:
        async with asyncio.timeout(settings.nats_connect_timeout_s):
            await bus.client.connect(**options, **callbacks.options())
    except (RefusedError, asyncio.CancelledError):
        await bus.close()
        raise
    except (TimeoutError, nats.errors.Error, OSError) as error:
        await bus.close()
        waited = f"waited {settings.nats_connect_timeout_s:g} s"
        if callbacks.late:
            raise BusUnavailableError(
                f"no TLS handshake with the broker at {settings.nats_url} came in time ({waited}): "
                "this machine, the broker's or the network between them is too slow"
            ) from error
        raise BusUnavailableError(
            f"no NATS server answers at {settings.nats_url} ({waited}): start it, or set PODIUM_NATS_URL"
        ) from error
    bus.entered_at = time.monotonic()
    return bus
