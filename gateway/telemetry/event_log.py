"""A bounded log of server-sent events that any number of readers follow at their own pace.

Readers have no queues: each knows the number of the next event it wants. A slow one finds that the log has
moved on, and by how much, so memory does not grow with readers.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from typing import Final

import msgspec
from msgspec import Struct

MOST_EVENTS: Final = 16_384
MOST_BYTES: Final = 16 << 20
_ID = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})")


class EventType(StrEnum):
    """The types that a reader can choose from."""

    DECISION = "decision"  # any gateway's answer to an offer
    TASK = "task"  # a task was accepted, or its state has changed
    SLOT = "slot"  # an operator drained a slot, or ended that
    PROGRESS = "progress"  # where a run stands
    HEARTBEAT = "heartbeat"  # a node's sign of life


class Hello(Struct, frozen=True):
    """The start of every stream; events from now on follow."""

    gateway: str
    now: float


class Lost(Struct, frozen=True):
    """Events that this reader missed; `count` is before its filters, null if unknown."""

    count: int | None
    reason: str


class Reset(Struct, frozen=True):
    """The id to resume from is unknown here: read /v1/tasks and /v1/slots again; new events follow."""

    reason: str


class Event(Struct, frozen=True):
    """One event. `type` None: sent to every reader, whatever its filter."""

    number: int
    type: EventType | None
    task: str | None
    slot: str | None
    frame: bytes  # as it is sent


class Choice(Struct, frozen=True):
    """Which events a reader wants; None matches all."""

    types: Collection[EventType] | None = None
    task: str | None = None
    slot: str | None = None

    def holds(self, event: Event) -> bool:
        """Return whether an event is wanted."""
        if event.type is None:
            return True
        if self.types is not None and event.type not in self.types:
            return False
        if self.task is not None and event.task != self.task:
            return False
        return self.slot is None or event.slot == self.slot


class UnknownIdError(ValueError):
    """An event id of a form that no gateway makes."""


class EventLog:
    """The newest events of this gateway, numbered from 1; `boot` marks them as this process's."""

    def __init__(self, most_events: int = MOST_EVENTS, most_bytes: int = MOST_BYTES) -> None:
        self.boot = uuid.uuid4().hex[:8]
        self.last = 0
        self.counts: Counter[str] = Counter()  # by type
        self.readers = 0
        self.left_at = float("-inf")  # when the newest of them left, monotonic
        self.lost = 0  # events that slow readers missed
        self.closing = asyncio.Event()
        self._events: deque[Event] = deque()
        self._bytes = 0
        self._most_events, self._most_bytes = most_events, most_bytes
        self._wakers: set[Callable[[], None]] = set()

    @property
    def first(self) -> int:
        """Return the number of the oldest event that is kept; one above `last` if none is."""
        return self.last - len(self._events) + 1

    def add(self, kind: EventType, data: bytes, *, task: str | None = None, slot: str | None = None) -> None:
        """Note one event; `data` is JSON."""
        self._append(kind, kind.value, data, task, slot)

    def add_gap(self, reason: str) -> None:
        """Note that this gateway may have missed events."""
        self._append(None, "lost", msgspec.json.encode(Lost(None, reason)), None, None)

    def read(self, after: int, most: int) -> tuple[int, list[Event]]:
        """Return how many events after number `after` are no longer kept, and up to `most` that are."""
        lost = max(0, self.first - 1 - after)
        skip = after + lost - (self.first - 1)
        # Readers are mostly near the end, so count from there.
        if skip >= len(self._events):
            return lost, []
        newest = list(islice(reversed(self._events), len(self._events) - skip))
        newest.reverse()
        return lost, newest[:most]

    def id_of(self, number: int) -> str:
        """Return the id that a reader may resume from."""
        return f"{self.boot}-{number}"

    def number_of(self, event_id: str) -> int | None:
        """Return the number of an id of this process, None for another's. Raises UnknownIdError."""
        if event_id == "0":
            return max(0, self.first - 1)
        match = _ID.fullmatch(event_id)
        if match is None:
            raise UnknownIdError(
                f"{event_id[:50]!r} is not an event id: one looks like {self.id_of(self.last)}"
            )
        number = int(match[2])
        return number if match[1] == self.boot and number <= self.last else None

    @contextmanager
    def reader(self, waker: Callable[[], None]) -> Iterator[None]:
        """Register a reader: `waker` is called after every event."""
        self.readers += 1
        self._wakers.add(waker)
        try:
            yield
        finally:
            self.readers -= 1
            self.left_at = time.monotonic()
            self._wakers.discard(waker)

    def close(self) -> None:
        """End all streams, because the gateway stops."""
        self.closing.set()
        for waker in self._wakers:
            waker()

    def _append(
        self, kind: EventType | None, name: str, data: bytes, task: str | None, slot: str | None
    ) -> None:
        self.last += 1
        self.counts[name] += 1
        event = Event(self.last, kind, task, slot, frame(name, data, self.id_of(self.last)))
        self._events.append(event)
        self._bytes += len(event.frame)
        while len(self._events) > self._most_events or self._bytes > self._most_bytes:
            self._bytes -= len(self._events.popleft().frame)
        for waker in self._wakers:
            waker()


def frame(name: str, data: bytes, event_id: str | None = None) -> bytes:
    """Return one event as sent. Line breaks in JSON are only space, and would end the event's data."""
    if b"\n" in data or b"\r" in data:
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    head = f"event: {name}\n" if event_id is None else f"id: {event_id}\nevent: {name}\n"
    return b"%b%b%b\n\n" % (head.encode(), b"data: ", data)
