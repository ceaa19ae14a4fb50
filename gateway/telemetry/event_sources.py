"""The sources of a gateway's events.

Task events come from the logs as this gateway folds them, not from the subjects of the records: an append
that the broker refused is delivered there too. The rest is published by others, and lost while the link is
down.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from gateway.state.ledger import Ledger
from gateway.state.presence import Presence
from gateway.telemetry.counters import Measures
from gateway.telemetry.event_log import EventLog, EventType
from gateway.views.build import slot_view, task_view
from shared import subjects
from shared.aio import pause
from shared.broker.bus import Bus
from shared.logs import get_logger
from shared.messages.encoding import decoder
from shared.messages.runs import Progress
from shared.messages.slots import Heartbeat

KEEP_S = 600.0  # how long to stay subscribed to decisions after the last reader left, as it may come back
LISTEN_S = 1.0  # the longest that a reader waits for the subscription
CUT_OFF = (
    "this gateway was cut off from the broker: decisions, progress and heartbeats of that time are missing"
)

NO_READER = "there was no reader for ten minutes: decisions since then are missing"


class _DecisionHead(Struct, frozen=True):
    """The fields read of a decision in passing; all of it is checked to be JSON."""

    task: str
    slot: str | None = None


log = get_logger()
_decode_decision = decoder(_DecisionHead)
_encode = msgspec.json.Encoder().encode


class EventSources:
    """Put events into the event log; count ended tasks."""

    def __init__(
        self,
        events: EventLog,
        ledger: Ledger,
        presence: Presence,
        measures: Measures,
        folded: asyncio.Event,
    ) -> None:
        self._events = events
        self._ledger = ledger
        self._presence = presence
        self._measures = measures
        self._folded = folded  # set once the logs were read to their end: what they held is not new
        self._wanted, self._subscribed = asyncio.Event(), asyncio.Event()  # to decisions

    async def run(self, bus: Bus) -> None:
        """Subscribe to decisions only while there is a reader: nothing else comes in thousands a second."""
        bus.on_reconnect(lambda: self._events.add_gap(CUT_OFF))
        while True:
            await self._wanted.wait()
            subscription = await bus.subscribe(subjects.ANY_DECISION, self._on_decision)
            await _arrived(bus)
            self._subscribed.set()
            while self._events.readers or time.monotonic() - self._events.left_at < KEEP_S:  # noqa: ASYNC110
                await asyncio.sleep(KEEP_S / 10)
            self._wanted.clear()
            self._subscribed.clear()
            self._events.add_gap(NO_READER)
            try:
                await subscription.unsubscribe()
            except nats.errors.Error as error:  # the link is gone, and the subscription with it
                log.debug("can't unsubscribe: the link is down", error=repr(error))

    async def listen(self) -> None:
        """Prepare for a reader: return once decisions are subscribed to."""
        self._wanted.set()
        self._events.left_at = time.monotonic()  # until it reads, it counts as just left
        await pause(LISTEN_S, self._subscribed)  # with the broker away it happens after the reconnect

    def on_task(self, key: str) -> None:
        """Note a task whose state may have changed; count it if it has ended."""
        task = self._ledger.task(key)
        if task is None:  # its chain was read before its job
            return
        result = self._ledger.chain_of(task.record).result
        if result is not None:
            self._measures.ended(result)
        if self._folded.is_set():
            view = task_view(task, self._ledger, self._presence, time.time())
            self._events.add(EventType.TASK, _encode(view), task=key, slot=view.slot)

    def on_drain(self, slot: str) -> None:
        """Note a slot that an operator drained, or put to work again."""
        if self._folded.is_set():
            view = slot_view(slot, self._ledger, self._presence, time.time())
            self._events.add(EventType.SLOT, _encode(view), slot=slot)

    def on_run_message(self, message: Heartbeat | Progress, data: bytes) -> None:
        """Note a heartbeat or progress."""
        kind = EventType.HEARTBEAT if isinstance(message, Heartbeat) else EventType.PROGRESS
        self._events.add(kind, data, task=message.task, slot=message.slot)

    async def _on_decision(self, message: Msg) -> None:
        try:
            decision = _decode_decision(message.data)
        except ValueError as error:
            self._presence.count_malformed(message.subject, error)
            return
        self._events.add(EventType.DECISION, message.data, task=decision.task, slot=decision.slot)


async def _arrived(bus: Bus) -> None:
    """Wait until the broker knows the subscription; if the link is down, the next link will carry it.

    The library's PING overtakes what still waits to be written; the second one comes after it.
    """
    try:
        for _ in range(2):
            await bus.client.flush(timeout=LISTEN_S)
    except nats.errors.Error as error:
        log.debug("subscription not confirmed", error=repr(error))
