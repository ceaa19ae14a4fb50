"""A stand-in for a Hugging Face hub, and a broker without streams, for every test that needs one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from bench.harness.fake_hub import FakeHub, Hold
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.settings import Settings


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    for faults in hub.faults.values():
        for fault in faults:
            if isinstance(fault, Hold):
                fault.released.set()
    hub.close()


@pytest.fixture
async def empty(settings: Settings) -> AsyncIterator[Bus]:
    """Connected to a broker without streams."""
    bus = await connect(settings, name="test")
    yield bus
    await bus.close()
