"""Offers over NATS: every request gets an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.nats_offers import OfferResponder
from shared.broker.bus import Bus
from shared.errors import BusUnavailableError
from shared.messages.offers import Decision, Offer
from shared.subjects import OFFERS

OFFER = {
    "task_id": "t",
    "task_type": "InstructTextTask",
    "model": "m",
    "hours_to_complete": 1,
    "dataset": "d",
}


@pytest.mark.parametrize(
    ("error", "expected", "retry"),
    [
        (BusUnavailableError("not connected to NATS"), "not connected to NATS; offer again", True),
        (ZeroDivisionError("a mistake of ours"), "internal error; see the gateway's log", False),
    ],
)
async def test_a_failure_is_answered(bus: Bus, error: Exception, expected: str, retry: bool) -> None:
    async def decide(offer: Offer, received_at: float) -> Decision:
        raise error

    responder = OfferResponder(decide)
    await responder.start(bus)
    reply: dict[str, Any] = json.loads((await bus.request(OFFERS, json.dumps(OFFER).encode())).data)
    assert reply == {"error": expected, "retry": retry}
    await responder.stop()
