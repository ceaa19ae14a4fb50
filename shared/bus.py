"""NATS as Podium uses it: append with compare-and-set, read what is stored, hear what is said.

No consumers, acks or dedup windows: kill -9 of the server was seen to break each of them. The truth is
what is stored, and who may store is decided by the expected last sequence on every append.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import nats
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConflictError,
    SettingsError,
    StoreFullError,
)
from shared.logs import get_logger
from shared.settings import Settings

REQUEST_TIMEOUT_S: Final = 2.0
WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})  # the second form names no sequence
STREAM_FULL: Final = frozenset({10047, 10077, 10122})
READ_BATCH: Final = 256

EXPECTED_STREAM: Final = "Nats-Expected-Stream"
EXPECTED_LAST: Final = "Nats-Expected-Last-Sequence"
EXPECTED_LAST_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_LAST_SUBJECT_PATTERN: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
TTL: Final = "Nats-TTL"

log = get_logger()


class Record(Struct, frozen=True):
    """One stored message. `data` is empty for a deleted key."""

    sequence: int
    subject: str
    data: bytes
    stored: str = ""  # when, by the broker's clock; RFC 3339


class Bus:
    """One connection to the broker; `closed` is set if it is lost for good, and then the process must end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.closed = asyncio.Event()
        self.closing = False  # by ourselves
        self.denied: list[str] = []  # permission violations, which the client library never raises
        self._reconnected: list[Callable[[], None]] = []

    @property
    def connected(self) -> bool:
        """Whether the link is up now."""
        return bool(self.client.is_connected)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every reconnect: what was said meanwhile was not heard."""
        self._reconnected.append(callback)

    async def append(
        self,
        stream: str,
        subject: str,
        data: bytes,
        *,
        last: int | None = None,
        last_on_subject: int | None = None,
        pattern: str | None = None,
        ttl_s: float | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> int:
        """Store one message and return its sequence, if nobody was faster.

        `last` = expected last sequence of the whole stream, `last_on_subject` = of the subject, or of
        `pattern` if given (0 = nothing there). Raises ConflictError if the expectation fails (nothing is
        stored), BusUnavailableError (nothing was sent), StoreFullError, and BusTimeoutError, after which it
        may or may not be stored: read before trying again.
        """
        sent = {EXPECTED_STREAM: stream} | (headers or {})
        if last is not None:
            sent[EXPECTED_LAST] = str(last)
        if last_on_subject is not None:
            sent[EXPECTED_LAST_SUBJECT] = str(last_on_subject)
            if pattern is not None:
                sent[EXPECTED_LAST_SUBJECT_PATTERN] = pattern
        if ttl_s is not None:
            sent[TTL] = f"{max(1, round(ttl_s))}s"  # the server's resolution is a second
        reply = json.loads((await self.request(subject, data, headers=sent, timeout_s=timeout_s)).data)
        if "error" in reply:
            raise _refusal(reply["error"], subject)
        return int(reply["seq"])

    async def last(self, stream: str, subject: str) -> Record | None:
        """The newest stored message on `subject` (wildcards allowed), or None."""
        query = json.dumps({"last_by_subj": subject}).encode()
        reply = await self.request(f"$JS.API.DIRECT.GET.{stream}", query)
        return _record(reply, stream)

    async def read(
        self, stream: str, after: int, *, subject: str = ">", timeout_s: float = REQUEST_TIMEOUT_S
    ) -> list[Record]:
        """Up to READ_BATCH stored messages with a sequence above `after`, oldest first; empty = all read.

        Only those on `subject`, if one is given (wildcards allowed).
        """
        inbox, replies = self.client.new_inbox(), asyncio.Queue[Msg]()

        async def heard(message: Msg) -> None:
            replies.put_nowait(message)

        subscription = await self.subscribe(inbox, heard)
        try:
            query = {"seq": after + 1, "next_by_subj": subject, "batch": READ_BATCH}
            await self.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(query).encode(), reply=inbox)
            records: list[Record] = []
            while True:
                try:
                    async with asyncio.timeout(timeout_s):
                        message = await replies.get()
                except TimeoutError as error:
                    raise BusTimeoutError(f"reading {stream}: no answer within {timeout_s:g} s") from error
                record = _record(message, stream)
                if record is None:  # 404 nothing there, 204 end of batch
                    return records
                records.append(record)
        finally:
            await _unsubscribe(subscription)

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Say something to whoever listens; not stored unless a stream takes the subject."""
        try:
            await self.client.publish(subject, data, reply=reply)
        except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError) as error:
            raise BusUnavailableError("not connected to NATS") from error

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Msg:
        """Ask and wait for one answer. Errors as in `append`."""
        try:
            # The library's own timeout is wait_for, which in Python 3.11 drops a cancellation that comes in
            # the same moment as the answer: a task that is cancelled once would then run on.
            async with asyncio.timeout(timeout_s):
                return await self.client.request(subject, data, timeout=None, headers=headers)
        except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError) as error:
            raise BusUnavailableError("not connected to NATS") from error
        except nats.errors.NoRespondersError as error:
            raise BusUnavailableError(
                f"nobody answers on {subject}: no such stream, or JetStream is starting"
            ) from error
        except TimeoutError as error:
            raise BusTimeoutError(f"no answer on {subject} within {timeout_s:g} s") from error

    async def subscribe(
        self, subject: str, callback: Callable[[Msg], Awaitable[None]], *, queue: str = ""
    ) -> Subscription:
        """Hear what is said on `subject` from now on; survives reconnects."""
        try:
            return await self.client.subscribe(subject, queue=queue, cb=callback)
        except nats.errors.ConnectionClosedError as error:
            raise BusUnavailableError("not connected to NATS") from error

    async def close(self) -> None:
        """Flush and close; safe to call on a dead link."""
        self.closing = True
        try:
            if self.client.is_connected:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await self.client.drain()
        except (nats.errors.Error, TimeoutError) as error:
            log.warning("closing NATS without a clean drain", error=repr(error))
        finally:
            await self.client.close()


async def connect(settings: Settings, *, name: str) -> Bus:
    """Connect as `name`; waits `nats_connect_timeout_s` for the broker, then raises BusUnavailableError.

    The options are not taste: the library's defaults give up for ever after two minutes, notice a dead
    link after six, and store what was published while disconnected long after the caller was told it failed.
    """
    bus = Bus(Client())

    async def on_closed() -> None:
        bus.closed.set()

    async def on_disconnected() -> None:
        if not bus.closing:
            log.warning("lost NATS, reconnecting", url=settings.nats_url)

    async def on_reconnected() -> None:
        log.info("NATS is back", url=settings.nats_url)
        for callback in bus._reconnected:
            callback()

    async def on_error(error: Exception) -> None:
        if "permissions violation" in str(error).lower():
            bus.denied.append(str(error))
            log.error("NATS denied something; check this service's user in nats.conf", error=str(error))
        else:
            log.debug("NATS client error", error=repr(error))

    options: dict[str, Any] = {
        "servers": [settings.nats_url],
        "name": name,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "connect_timeout": 2,
        "ping_interval": 10,
        "max_outstanding_pings": 2,
        "pending_size": 0,  # while disconnected a publish fails at once instead of being stored later
        "closed_cb": on_closed,
        "disconnected_cb": on_disconnected,
        "reconnected_cb": on_reconnected,
        "error_cb": on_error,
    }
    if settings.nats_nkey_seed_file:
        options["nkeys_seed_str"] = _seed(settings.nats_nkey_seed_file)
    try:
        async with asyncio.timeout(settings.nats_connect_timeout_s):
            await bus.client.connect(**options)
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise BusUnavailableError(
            f"no NATS server answers at {settings.nats_url} (waited {settings.nats_connect_timeout_s:g} s): "
            "start it, or set PODIUM_NATS_URL"
        ) from error
    return bus


def _seed(path: str) -> str:
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise SettingsError(f"nats_nkey_seed_file {path} can't be read: {error.strerror}") from error


def _refusal(error: dict[str, Any], subject: str) -> BusError:
    code, text = error.get("err_code"), error.get("description", "")
    if code in WRONG_LAST_SEQUENCE:
        return ConflictError(f"{subject}: {text}")
    if code in STREAM_FULL:
        return StoreFullError(f"{subject} is full ({text}): raise log_max_bytes, or archive")
    if error.get("code") == 503:
        return BusUnavailableError(f"{subject}: JetStream can't store now: {text}")
    return BusError(f"{subject} was refused: {text} (code {code})")


def _record(message: Msg, stream: str) -> Record | None:
    headers = message.headers or {}
    status = headers.get("Status")
    if status in ("404", "204"):
        return None
    if status is not None:
        raise BusError(f"reading {stream} failed: {status} {headers.get('Description', '')}")
    stored = headers.get("Nats-Time-Stamp", "")
    return Record(int(headers["Nats-Sequence"]), headers["Nats-Subject"], message.data, stored)


async def _unsubscribe(subscription: Subscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error as error:  # the link died: the subscription is gone with it
        log.debug("unsubscribe on a dead link", error=repr(error))
