"""NATS as Podium uses it: append with compare-and-set, read stored records, subscribe to messages.

No consumers, acks or dedup windows: kill -9 of the server was seen to break each of them. The truth is
what is stored, and who may store is decided by the expected last sequence on every append.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared import subjects
from shared.broker.client_errors import Denial
from shared.broker.credentials import ADMIN, NOBODY
from shared.broker.jetstream import (
    EXPECTED_LAST,
    EXPECTED_LAST_SUBJECT,
    EXPECTED_LAST_SUBJECT_PATTERN,
    EXPECTED_STREAM,
    TTL,
    answer_of,
    record_of,
    refused,
)
from shared.broker.jetstream import Record as Record
from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    DeniedError,
    NobodyAnswersError,
)
from shared.logs import get_logger

REQUEST_TIMEOUT_S: Final = 2.0
FLUSH_S: Final = 0.2  # for the flush, where draining the subscriptions took all of REQUEST_TIMEOUT_S
STARTING_S: Final = 10.0  # a service has done everything that it must be allowed to do once
READ_BATCH: Final = 256

log = get_logger()


class Bus:
    """One connection to the broker; `closed` is set if it is lost for good, and then the process must end.

    It also is if the broker denies something while the service starts; later that is logged and counted.
    """

    def __init__(self, client: Client, user: str = NOBODY) -> None:
        self.client = client
        self.user = user
        self.closed = asyncio.Event()
        self.entered_at: float | None = None  # when the broker let us in first, monotonic
        self.closing = False  # by ourselves
        self.denied: Counter[Denial] = Counter()  # permission violations, which the library never raises
        self.reconnected: list[Callable[[], None]] = []
        self._asked: defaultdict[str, set[asyncio.Timeout]] = defaultdict(set)  # by subject in lower case
        self._waiting: set[asyncio.Timeout] = set()  # for an answer
        self._lost: set[asyncio.Timeout] = set()  # of these: the link that they were asked on is gone

    @property
    def guest(self) -> bool:
        """Return whether this user has another account than the streams: all users but the admin do."""
        return self.user not in (NOBODY, ADMIN)

    def info_subject(self, stream: str) -> str:
        """Return the subject for asking about a stream's configuration and content; not every user may."""
        return subjects.stream_info(stream) if self.guest else f"{subjects.STREAM_INFO}.{stream}"

    @property
    def connected(self) -> bool:
        """Return whether the link is up now."""
        return bool(self.client.is_connected)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every reconnect: messages published in between were missed."""
        self.reconnected.append(callback)

    def why_closed(self) -> BusError:
        """Return the error to raise once `closed` is set."""
        if self.denied:
            return DeniedError(next(iter(self.denied)).explain(self.user))
        if isinstance(self.client.last_error, nats.errors.AuthorizationError):
            return BusUnavailableError(
                f"the broker no longer accepts the key of {self.user}; restart to read it again"
            )
        return BusUnavailableError("the connection to NATS was closed for good; restart this process")

    def note_denial(self, found: Denial) -> None:
        """Record a denial: requests that wait for it fail at once; a service that is starting must end."""
        self.denied[found] += 1
        if self.denied[found] == 1:
            log.error(found.explain(self.user))
        _end(self._asked.get(found.subject, ()))
        if self.entered_at is None or time.monotonic() - self.entered_at < STARTING_S:
            self.closed.set()

    def note_loss(self) -> None:
        """Record that the link is gone: no answer will come to what was asked on it."""
        self._lost |= self._waiting

    def end_lost(self) -> None:
        """End the waits for answers that were lost; the link is back, so that who asked can look at once."""
        _end(self._lost)

    @contextmanager
    def _answer(self, timeout_s: float) -> Iterator[asyncio.Timeout]:
        """Give the timeout of one wait for an answer."""
        waiting = asyncio.timeout(timeout_s)
        self._waiting.add(waiting)
        try:
            yield waiting
        finally:
            self._waiting.discard(waiting)
            self._lost.discard(waiting)

    def _no_answer(self, waiting: asyncio.Timeout, what: str, timeout_s: float) -> BusTimeoutError:
        lost = waiting in self._lost
        return BusTimeoutError(f"{what} {'before the link was lost' if lost else f'within {timeout_s:g} s'}")

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
        """Store one message and return its sequence, if no other writer was faster.

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
        message = await self.request(subject, data, headers=sent, timeout_s=timeout_s)
        try:
            reply = answer_of(message, subject)
            sequence = None if "error" in reply else int(reply["seq"])
        except (BusUnavailableError, KeyError, TypeError, ValueError) as error:
            raise BusTimeoutError(f"{subject}: no answer that can be read") from error
        if sequence is None:
            raise refused(reply["error"], subject)
        return sequence

    async def last(self, stream: str, subject: str) -> Record | None:
        """Return the newest stored message on `subject` (wildcards allowed), or None.

        The subject is part of the request's own, so that the broker can allow some and deny others.
        """
        return record_of(await self.request(f"{subjects.DIRECT_GET}.{stream}.{subject}"), stream)

    async def read(
        self, stream: str, after: int, *, subject: str = ">", timeout_s: float = REQUEST_TIMEOUT_S
    ) -> list[Record]:
        """Up to READ_BATCH stored messages with a sequence above `after`, oldest first; empty = all read.

        Only those on `subject`, if one is given (wildcards allowed).
        """
        inbox, replies = self.client.new_inbox(), asyncio.Queue[Msg]()

        async def received(message: Msg) -> None:
            replies.put_nowait(message)

        subscription = await self.subscribe(inbox, received)
        try:
            query = {"seq": after + 1, "next_by_subj": subject, "batch": READ_BATCH}
            await self.publish(f"{subjects.DIRECT_GET}.{stream}", json.dumps(query).encode(), reply=inbox)
            records: list[Record] = []
            while True:
                with self._answer(timeout_s) as waiting:
                    try:
                        async with waiting:
                            message = await replies.get()
                    except TimeoutError as error:
                        raise self._no_answer(waiting, f"reading {stream}: no answer", timeout_s) from error
                record = record_of(message, stream)
                if record is None:  # 404 nothing there, 204 end of batch
                    return records
                records.append(record)
        finally:
            await _unsubscribe(subscription)

    async def read_all(
        self, stream: str, after: int = 0, *, subject: str = ">", timeout_s: float = REQUEST_TIMEOUT_S
    ) -> AsyncIterator[list[Record]]:
        """Yield what `read` returns, batch after batch, until the stream's end."""
        while records := await self.read(stream, after, subject=subject, timeout_s=timeout_s):
            yield records
            after = records[-1].sequence

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Publish to all subscribers; stored only if a stream has the subject."""
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
        """Send a request; wait for the answer. Errors as `append`; DeniedError if this user may not ask."""
        key = subject.lower()
        denied_before = self._denied_on(key)
        with self._answer(timeout_s) as waiting:
            self._asked[key].add(waiting)
            try:
                # The library's own timeout is wait_for, which in Python 3.11 drops a cancellation that comes
                # in the same moment as the answer: a task that is cancelled once would then run on.
                async with waiting:
                    return await self.client.request(subject, data, timeout=None, headers=headers)
            except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError) as error:
                raise BusUnavailableError("not connected to NATS") from error
            except nats.errors.NoRespondersError as error:
                raise NobodyAnswersError(
                    f"nobody answers on {subject}: no such stream, or JetStream is starting"
                ) from error
            except TimeoutError as error:
                if self._denied_on(key) > denied_before:
                    raise DeniedError(Denial("publish", subject).explain(self.user)) from error
                raise self._no_answer(waiting, f"no answer on {subject}", timeout_s) from error
            finally:
                self._asked[key].discard(waiting)
                if not self._asked[key]:
                    del self._asked[key]

    def _denied_on(self, subject: str) -> int:
        return self.denied[Denial("publish", subject)] if self.denied else 0

    async def subscribe(
        self, subject: str, callback: Callable[[Msg], Awaitable[None]], *, queue: str = ""
    ) -> Subscription:
        """Subscribe to `subject` from now on; survives reconnects."""
        try:
            return await self.client.subscribe(subject, queue=queue, cb=callback)
        except nats.errors.ConnectionClosedError as error:
            raise BusUnavailableError("not connected to NATS") from error

    async def close(self) -> None:
        """Flush and close; safe to call on a dead link."""
        self.closing = True
        try:
            if self.client.is_connected:
                await self._drain()
        finally:
            await self._close_client()

    async def _drain(self) -> None:
        """Drain with a limit: the library ignores a cancellation while it drains subscriptions."""
        draining = asyncio.create_task(self.client.drain())
        try:
            await asyncio.wait({draining}, timeout=REQUEST_TIMEOUT_S + FLUSH_S)
        finally:
            done = draining.done()
            draining.cancel()
        if not done or (not draining.cancelled() and draining.exception() is not None):
            why = repr(draining.exception()) if done else "the broker doesn't answer"
            log.warning("closing NATS without a clean drain", error=why)

    async def _close_client(self) -> None:
        """Close the client. The library waits forever for a TLS link whose handshake failed; drop it then."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S if self.entered_at is not None else 0.2):
                await self.client.close()
        except TimeoutError:
            log.debug("closing NATS took too long")
        finally:
            drop_link(self.client)  # also if this was cancelled: nobody else would close it


def _end(waits: Iterable[asyncio.Timeout]) -> None:
    for waiting in waits:
        if not waiting.expired():
            waiting.reschedule(asyncio.get_running_loop().time())


async def _unsubscribe(subscription: Subscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error as error:  # the link died: the subscription is gone with it
        log.debug("unsubscribe on a dead link", error=repr(error))


def drop_link(client: Client) -> None:
    """Close what a failed attempt to connect left open; the library forgets it."""
    transport = client._transport
    for writer in (getattr(transport, "_io_writer", None), getattr(transport, "_bare_io_writer", None)):
        # Some Pythons (3.11.2) can't abort a TLS transport that is closed: it has no protocol any more.
        if writer is not None and getattr(writer.transport, "_ssl_protocol", writer) is not None:
            writer.transport.abort()
