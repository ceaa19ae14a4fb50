"""Offers as request and reply on NATS; the same answers as over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from gateway.errors import MalformedOfferError
from gateway.offers import parse_offer
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.offers import Decision, Offer

log = get_logger()


class OfferResponder:
    """Answer requests on `podium.offers`, several at once; every gateway shares one queue group."""

    def __init__(self, decide: Callable[[Offer, float], Awaitable[Decision]]) -> None:
        self.malformed = 0  # requests that were not offers
        self._decide = decide
        self._subscription: Subscription | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def start(self, bus: Bus) -> None:
        """Subscribe."""
        self._subscription = await bus.subscribe(
            subjects.OFFERS, self._on_request, queue=subjects.OFFERS_QUEUE
        )

    async def stop(self) -> None:
        """Accept no more requests and finish the running ones; safe if it never started."""
        if self._subscription is not None:
            try:
                await self._subscription.unsubscribe()
            except nats.errors.Error as error:  # the link is gone, and the subscription with it
                log.debug("can't unsubscribe: the link is down", error=repr(error))
            self._subscription = None
        await asyncio.gather(*self._running)

    async def _on_request(self, message: Msg) -> None:
        """Start a task for one request: the client library awaits its callbacks one by one."""
        task = asyncio.create_task(self._respond(message, time.time()), name="offer over NATS")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _respond(self, message: Msg, received_at: float) -> None:
        try:
            await message.respond(await self._answer(message.data, received_at))
        except nats.errors.Error as error:
            log.warning("can't answer an offer over NATS", error=repr(error))

    async def _answer(self, data: bytes, received_at: float) -> bytes:
        try:
            return encode(await self._decide(parse_offer(data), received_at))
        except MalformedOfferError as error:
            self.malformed += 1
            return msgspec.json.encode({"error": str(error), "retry": False})
        except BusError as error:
            return msgspec.json.encode({"error": f"{error}; offer again", "retry": True})
        except Exception:  # as over HTTP: the requester must get an answer
            log.exception("an offer over NATS failed")
            return msgspec.json.encode({"error": "internal error; see the gateway's log", "retry": False})
