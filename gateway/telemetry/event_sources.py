"""Where a gateway's events come from.

Tasks come from the logs as this gateway folds them, not from the subjects of the records: an append that the
broker refused is heard there too. The rest is what others say, and is lost while the link is down.
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
from gateway.views.build import task_view
from shared import subjects
from shared.broker.bus import Bus
from shared.logs import get_logger
from shared.messages import Heartbeat, Progress

KEEP_S = 600.0  # how long decisions are heard after the last reader has left, so that it may come back
LISTEN_S = 1.0  # a reader doesn't wait longer for it
CUT_OFF = (
    "this gateway was cut off from the broker: decisions, progress and heartbeats of that time are missing"
)

NOBODY = "nobody has read for ten minutes: decisions since then are missing"


class _Heard(Struct, frozen=True):
    """What is looked at of a decision on its way through; all of it is checked to be JSON."""

    task: str
    slot: str | None = None


log = get_logger()
_decode_decision = msgspec.json.Decoder(_Heard).decode
_encode = msgspec.json.Encoder().encode


class News:
    """Puts what happens into the event log; counts the tasks that have ended."""

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
        self._folded = folded  # the logs were read to their end once: what was in them is no news
        self._wanted, self._hearing = asyncio.Event(), asyncio.Event()  # decisions
        ledger.on_news = self._heard_task
        presence.on_heard = self._heard_run

    async def run(self, bus: Bus) -> None:
        """Hear decisions while somebody reads: nothing else comes in thousands a second."""
        bus.on_reconnect(lambda: self._events.add_gap(CUT_OFF))
        while True:
            await self._wanted.wait()
            subscription = await bus.subscribe(subjects.ANY_DECISION, self._heard_decision)
            await _arrived(bus)
            self._hearing.set()
            while self._events.readers or time.monotonic() - self._events.left_at < KEEP_S:  # noqa: ASYNC110
                await asyncio.sleep(KEEP_S / 10)
            self._wanted.clear()
            self._hearing.clear()
            self._events.add_gap(NOBODY)
            try:
                await subscription.unsubscribe()
            except nats.errors.Error as error:  # the link is gone, and the subscription with it
                log.debug("unsubscribe on a dead link", error=repr(error))

    async def listen(self) -> None:
        """Somebody is about to read: return once decisions are heard."""
        self._wanted.set()
        self._events.left_at = time.monotonic()  # until it reads, it counts as one that has just left
        try:
            async with asyncio.timeout(LISTEN_S):
                await self._hearing.wait()
        except TimeoutError:
            return  # the broker is away: they will be once it is back

    def _heard_task(self, token: str) -> None:
        task = self._ledger.task(token)
        if task is None:  # its chain was read before its job
            return
        result = self._ledger.chain_of(task.record).result
        if result is not None:
            self._measures.ended(result)
        if self._folded.is_set():
            view = task_view(task, self._ledger, self._presence, time.time())
            self._events.add(EventType.TASK, _encode(view), task=token, slot=view.slot)

    def _heard_run(self, message: Heartbeat | Progress, data: bytes) -> None:
        kind = EventType.HEARTBEAT if isinstance(message, Heartbeat) else EventType.PROGRESS
        self._events.add(kind, data, task=message.task, slot=message.slot)

    async def _heard_decision(self, message: Msg) -> None:
        try:
            decision = _decode_decision(message.data)
        except ValueError as error:
            self._presence.count_malformed(message.subject, error)
            return
        self._events.add(EventType.DECISION, message.data, task=decision.task, slot=decision.slot)


async def _arrived(bus: Bus) -> None:
    """Return once the broker knows the subscription; if the link is down, it will with the next one.

    The library's PING overtakes what still waits to be written; the second one comes after it.
    """
    try:
        for _ in range(2):
            await bus.client.flush(timeout=LISTEN_S)
    except nats.errors.Error as error:
        log.debug("a subscription was not confirmed", error=repr(error))
