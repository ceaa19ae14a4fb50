"""`/v1/events`: one reader's stream of server-sent events, from where it left off."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Final

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from gateway.api.access import Access, Guard
from gateway.api.problems import MALFORMED_QUERY, MalformedRequestError
from gateway.api.routing import GUARD, SERVICE, read_query
from gateway.errors import BusyError
from gateway.service import Service
from gateway.telemetry.event_log import Choice, EventLog, EventType, Hello, Lost, Reset, UnknownIdError, frame
from shared.aio import pause
from shared.errors import PodiumError
from shared.subjects import task_key

LOOK_S: Final = 1.0  # between two looks whether a reader may still ask
ALIVE_S: Final = 15.0  # between two signs of life of a stream without events
STUCK_S: Final = 30.0  # a reader that takes nothing for so long is let go
LEAVE_S: Final = 0.5  # how long the last words may take when the gateway stops
MOST_READERS: Final = 64
BATCH: Final = 256
MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final = {
    "Content-Type": MEDIA_TYPE,
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}

_encode = msgspec.json.Encoder().encode


class EventQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which events are wanted, and from where on."""

    types: Annotated[str, Meta(description=f"only these, with commas between: {', '.join(EventType)}")] = ""
    task: Annotated[str | None, Meta(description="only this task, by id or token")] = None
    slot: Annotated[str | None, Meta(description="only this slot")] = None
    after: Annotated[
        str | None,
        Meta(description="go on after the event with this id; 0 = from the oldest one that is kept"),
    ] = None


class Stream:
    """What one reader is sent."""

    def __init__(
        self, request: web.Request, log: EventLog, choice: Choice, response: web.StreamResponse
    ) -> None:
        self.news = asyncio.Event()
        self._request = request
        self._log = log
        self._choice = choice
        self._response = response
        self._written_at = self._looked_at = time.monotonic()

    async def send(self, guard: Guard, after: int, first: bytes) -> None:
        """Events after number `after`, until the reader leaves, is stuck, may no longer ask, or all ends."""
        alive = await self._write(first)
        while alive and self._may_ask(guard) and not self._log.closing.is_set():
            self.news.clear()
            lost, events = self._log.read(after, BATCH)
            after += lost + len(events)
            parts = [event.frame for event in events if self._choice.holds(event)]
            if lost:
                self._log.lost += lost
                parts.insert(0, self._lost(lost))
            if parts:
                alive = await self._write(b"".join(parts))
            elif (quiet_s := ALIVE_S - (time.monotonic() - self._written_at)) <= 0:
                alive = await self._write(b": alive\n\n")
            elif not events:
                await pause(quiet_s, self.news)

    def _lost(self, count: int) -> bytes:
        reason = "this stream was read too slowly, or its last event is too long ago"
        return frame("lost", _encode(Lost(count, reason)))

    def _may_ask(self, guard: Guard) -> bool:
        """The token may be gone by now."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return True
        self._looked_at = time.monotonic()
        try:
            guard.admit(Access.TOKEN, self._request.headers)
        except PodiumError:
            return False
        return True

    async def _write(self, data: bytes) -> bool:
        """Send, as fast as the reader takes it. False if it doesn't, or is gone."""
        writing = asyncio.ensure_future(self._response.write(data))
        closing = asyncio.ensure_future(self._log.closing.wait())
        try:
            await asyncio.wait({writing, closing}, timeout=STUCK_S, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done() and closing.done():
                await asyncio.wait({writing}, timeout=LEAVE_S)
            if writing.done():
                self._written_at = time.monotonic()
                return writing.exception() is None  # ConnectionError: the reader has left
        finally:
            closing.cancel()
            writing.cancel()
            await asyncio.gather(writing, closing, return_exceptions=True)
        if self._request.transport is not None:
            self._request.transport.abort()
        return False


async def get_events(request: web.Request) -> web.StreamResponse:
    """Server-sent events: decisions, tasks, progress and heartbeats, as they happen."""
    service, guard = request.app[SERVICE], request.app[GUARD]
    log, query = service.events, read_query(request, EventQuery)
    choice = chosen(query, service)
    start, first = _start(log, request.headers.get("Last-Event-ID") or query.after)
    if log.readers >= MOST_READERS:
        raise BusyError(f"{MOST_READERS} streams are open; close one, or ask another gateway")
    response = web.StreamResponse(headers=HEADERS)
    stream = Stream(request, log, choice, response)
    with log.reader(stream.news.set):
        await service.event_sources.listen()
        await response.prepare(request)
        hello = frame("hello", _encode(Hello(service.settings.gateway_name, time.time())), log.id_of(start))
        await stream.send(guard, start, b"retry: 1000\n" + hello + first)
    return response


def chosen(query: EventQuery, service: Service) -> Choice:
    """What the query asks for; MalformedRequestError naming the parameter."""
    types = None
    if query.types:
        try:
            types = frozenset(EventType(name.strip()) for name in query.types.split(","))
        except ValueError as error:
            known = ", ".join(EventType)
            raise MalformedRequestError(
                MALFORMED_QUERY, f"{error}; types are {known}", field="types"
            ) from error
    slots = service.settings.slots
    if query.slot is not None and query.slot not in slots:
        detail = f"{query.slot[:50]!r} is no slot; there are {', '.join(slots)}"
        raise MalformedRequestError(MALFORMED_QUERY, detail, field="slot")
    return Choice(types, task_key(query.task) if query.task else None, query.slot)


def _start(log: EventLog, event_id: str | None) -> tuple[int, bytes]:
    """After which number the stream goes on, and what is said before."""
    if not event_id:
        return log.last, b""
    try:
        number = log.number_of(event_id)
    except UnknownIdError as error:
        raise MalformedRequestError(MALFORMED_QUERY, str(error), field="after") from error
    if number is not None:
        return number, b""
    reason = "the id is another gateway's, or from before this one started"
    return log.last, frame("reset", _encode(Reset(reason)))
