"""Services with different limits that start within a moment: the highest limit stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg

from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.stream_requests import find_stream
from shared.broker.streams import bootstrap
from shared.settings import Settings

UPDATE = f"$JS.API.STREAM.UPDATE.{subjects.JOBS_STREAM}"


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[Bus]:
    bus = await connect(settings, name="other")
    yield bus
    await bus.close()


def hold_updates(bus: Bus, go: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Hold each update of JOBS until `go`; return the event of the first one."""
    request, held = bus.request, asyncio.Event()

    async def slow(subject: str, *args: Any, **kwargs: Any) -> Msg:
        if subject == UPDATE:
            held.set()
            await go.wait()
        return await request(subject, *args, **kwargs)

    monkeypatch.setattr(bus, "request", slow)
    return held


def tell_of_limit(bus: Bus, limit: int, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return the event of an update that gave JOBS this limit."""
    request, done = bus.request, asyncio.Event()

    async def watched(subject: str, data: bytes = b"", **kwargs: Any) -> Msg:
        answer = await request(subject, data, **kwargs)
        if subject == UPDATE and json.loads(data)["max_bytes"] == limit:
            done.set()
        return answer

    monkeypatch.setattr(bus, "request", watched)
    return done


@pytest.mark.parametrize("exists", [False, True])
async def test_an_update_of_one_that_read_the_lower_limit_comes_last(
    exists: bool, empty: Bus, other: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow one makes the stream and then has its file written, or raises its limit by less."""
    limit = settings.log_max_bytes
    if exists:
        await bootstrap(other, settings)
    less = replace(settings, log_max_bytes=2 * limit) if exists else settings
    raised = tell_of_limit(other, 3 * limit, monkeypatch)
    held = hold_updates(empty, raised, monkeypatch)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(bootstrap(empty, less))
        await held.wait()
        tasks.create_task(bootstrap(other, replace(settings, log_max_bytes=3 * limit)))
    found = await find_stream(empty, subjects.JOBS_STREAM)
    assert found is not None
    assert found.config["max_bytes"] == 3 * limit
