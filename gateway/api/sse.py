"""`/v1/events`: a stream of server-sent events per reader, resumable after a lost connection."""

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

POLL_S: Final = 1.0  # interval of checks whether a reader's token is still valid
ALIVE_S: Final = 15.0  # interval of keep-alive comments on a stream without events
STUCK_S: Final = 30.0  # a reader that accepts no data for this long is disconnected
LEAVE_S: Final = 0.5  # time limit for the last write when the gateway stops
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
    """Filter and start of an event stream."""

    types: Annotated[str, Meta(description=f"only these types, comma-separated: {', '.join(EventType)}")] = ""
    task: Annotated[str | None, Meta(description="only this task, by id or task key")] = None
    slot: Annotated[str | None, Meta(description="only this slot")] = None
    after: Annotated[
        str | None,
        Meta(description="continue after the event with this id; 0 = from the oldest kept event"),
    ] = None


class Stream:
    """The event stream of one reader."""

    def __init__(
        self, request: web.Request, log: EventLog, choice: Choice, response: web.StreamResponse
    ) -> None:
        self.new_events = asyncio.Event()
        self._request = request
        self._log = log
        self._choice = choice
        self._response = response
        self._written_at = self._checked_at = time.monotonic()

    async def send(self, guard: Guard, after: int, first: bytes) -> None:
        """Send events after number `after` until the reader leaves, is stuck or unauthorized, or we stop."""
        alive = await self._write(first)
        while alive and self._may_ask(guard) and not self._log.closing.is_set():
            self.new_events.clear()
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
                await pause(quiet_s, self.new_events)

    def _lost(self, count: int) -> bytes:
        reason = "the reader was too slow, or its last event is too old"
        return frame("lost", _encode(Lost(count, reason)))

    def _may_ask(self, guard: Guard) -> bool:
        """Return whether the reader's token is still valid."""
        if time.monotonic() - self._checked_at < POLL_S:
            return True
        self._checked_at = time.monotonic()
        try:
            guard.admit(Access.TOKEN, self._request.headers)
        except PodiumError:
            return False
        return True

    async def _write(self, data: bytes) -> bool:
        """Send at the reader's speed; return False if it is stuck or gone."""
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
    """Stream decisions, task changes, progress and heartbeats as server-sent events."""
    service, guard = request.app[SERVICE], request.app[GUARD]
    log, query = service.events, read_query(request, EventQuery)
    choice = chosen(query, service)
    start, first = _start(log, request.headers.get("Last-Event-ID") or query.after)
    if log.readers >= MOST_READERS:
        raise BusyError(
            f"{MOST_READERS} streams are open, which is the limit; close one, or use another gateway"
        )
    response = web.StreamResponse(headers=HEADERS)
    stream = Stream(request, log, choice, response)
    with log.reader(stream.new_events.set):
        await service.event_sources.listen()
        await response.prepare(request)
        hello = frame("hello", _encode(Hello(service.settings.gateway_name, time.time())), log.id_of(start))
        await stream.send(guard, start, b"retry: 1000\n" + hello + first)
    return response


def chosen(query: EventQuery, service: Service) -> Choice:
    """Return the filter of the query. Raises MalformedRequestError that names the parameter."""
    types = None
    if query.types:
        try:
            types = frozenset(EventType(name.strip()) for name in query.types.split(","))
        except ValueError as error:
            known = ", ".join(EventType)
            raise MalformedRequestError(
                MALFORMED_QUERY, f"{error}; known types are {known}", field="types"
            ) from error
    slots = service.settings.slots
    if query.slot is not None and query.slot not in slots:
        detail = f"unknown slot {query.slot[:50]!r}; known slots are {', '.join(slots)}"
        raise MalformedRequestError(MALFORMED_QUERY, detail, field="slot")
    return Choice(types, task_key(query.task) if query.task else None, query.slot)


def _start(log: EventLog, event_id: str | None) -> tuple[int, bytes]:
    """Return the number after which the stream continues, and a `reset` event if the id is unknown."""
    if not event_id:
        return log.last, b""
    try:
        number = log.number_of(event_id)
    except UnknownIdError as error:
        raise MalformedRequestError(MALFORMED_QUERY, str(error), field="after") from error
    if number is not None:
        return number, b""
    reason = "the id is from another gateway, or from before this gateway started"
    return log.last, frame("reset", _encode(Reset(reason)))
