"""What was signed once is taken once: on any gateway, through restarts and outages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from gateway.upstream import nonces
from gateway.upstream.nonces import Nonces
from podium.local.nats_server import Broker
from shared.broker.bus import Bus
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.upstream_client import (
    SIGNED,
    VALIDATOR,
    Start,
    accepted,
    offer,
)


async def test_a_replay_is_refused_by_every_gateway_and_after_a_restart(
    bus: Bus, start_gateway: Start, heartbeats: Callable[..., None]
) -> None:
    heartbeats("a", "b")
    body = json.dumps(offer("t1", hours_to_complete=1000)).encode()
    headers = VALIDATOR.headers(body)

    async def send(api: Api) -> int:
        async with api.client.post("/task_offer/", data=body, headers=headers) as response:
            return response.status

    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(start_gateway("one", **SIGNED))
        second = await stack.enter_async_context(start_gateway("two", **SIGNED))
        for api in (first, second):
            await api.until_ready()
        assert await send(first) == 200
        assert await send(first) == 401
        await asyncio.sleep(nonces.POLL_S + 0.5)  # until then another gateway may refuse the offer once more
        assert await send(second) == 401
        fresh = [VALIDATOR.headers(None) for _ in range(20)]
        path = "/get_latest_model_submission/t1"
        sent = [api.client.get(path, headers=h) for h in fresh for api in (first, second)]
        statuses = [response.status for response in await asyncio.gather(*sent)]
        assert sorted(statuses) == [401] * 20 + [404] * 20  # of two that come at once, one
    async with start_gateway("three", **SIGNED) as third:
        await third.until_ready()
        assert await send(third) == 401


async def test_a_replay_that_another_gateway_has_not_heard_of_accepts_nothing(
    bus: Bus, start_gateway: Start, heartbeats: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonces, "POLL_S", 60.0)
    body = json.dumps(offer("t1")).encode()
    headers = VALIDATOR.headers(body)

    async def send(api: Api) -> int:
        async with api.client.post("/task_offer/", data=body, headers=headers) as response:
            return response.status

    async with start_gateway("one", **SIGNED) as first, start_gateway("two", **SIGNED) as second:
        await first.until_ready()
        await second.until_ready()
        assert await send(first) == 200  # no node is alive, so it is refused
        heartbeats("a", "b")
        await second.until_live("a", "b")
        assert await send(second) == 401
        assert (await second.get("/v1/tasks"))[1]["tasks"] == []
        assert await accepted(second, "t1")
        headers = VALIDATOR.headers(body)
        assert await send(second) == 200  # accepted before, and accepted again
        assert await send(first) == 401  # but a copy of the request is refused


async def test_a_replay_is_refused_after_a_restart_of_everything(
    broker: Broker, bus: Bus, start_gateway: Start, heartbeats: Callable[..., None]
) -> None:
    heartbeats("a", "b")
    headers = VALIDATOR.headers(None)
    path = "/get_latest_model_submission/t1"

    async def ask(api: Api) -> int:
        async with api.client.get(path, headers=headers) as response:
            return response.status

    async with start_gateway(**SIGNED) as api:
        await api.until_ready()
        assert await ask(api) == 404
        await broker.stop(kill=True)
        await broker.start()
        await api.until_ready()
        assert await ask(api) == 401
    async with start_gateway("another", **SIGNED) as api:
        await api.until_ready()
        assert await ask(api) == 401
        assert (await VALIDATOR.get(api, path))[0] == 404  # a new one passes


async def ended(nonces: asyncio.Task[None]) -> None:
    nonces.cancel()
    await asyncio.gather(nonces, return_exceptions=True)


async def test_a_gateway_that_starts_answers_only_once_it_knows_what_the_life_before_it_saw(bus: Bus) -> None:
    now = time.time()
    before = Nonces("g")
    running = asyncio.create_task(before.run(bus))
    first = before.claim("v", "1_a", now)
    assert first is not None
    assert await first
    await ended(running)

    after = Nonces("g")  # the same gateway restarted; it is asked before it could read anything
    replay, fresh = after.claim("v", "1_a", now), after.claim("v", "1_b", now)
    assert replay is not None
    assert fresh is not None
    await asyncio.sleep(0.1)
    assert not replay.done()
    running = asyncio.create_task(after.run(bus))
    assert (await replay, await fresh) == (False, True)
    await ended(running)


async def test_what_comes_while_the_broker_is_away_is_shared_once_it_is_back(
    broker: Broker, bus: Bus
) -> None:
    now = time.time()
    one, two = Nonces("one"), Nonces("two")
    running = [asyncio.create_task(each.run(bus)) for each in (one, two)]
    known = one.claim("v", "1_a", now)
    assert known is not None
    assert await known
    await broker.stop(kill=True)
    async with asyncio.timeout(10):
        while bus.connected:
            await asyncio.sleep(0.01)
    away = one.claim("v", "1_b", now)
    assert away is not None
    await asyncio.sleep(0.1)
    assert not away.done()
    await broker.start()
    assert await asyncio.wait_for(away, 20)
    for nonce in ("1_a", "1_b"):
        again = two.claim("v", nonce, now)
        assert again is None or not await again
    await asyncio.gather(*(ended(task) for task in running))


async def test_a_request_that_holds_its_body_back_is_judged_by_the_time_it_is_whole(upstream: Api) -> None:
    body = json.dumps(offer("t1")).encode()
    signed_at = time.time() - nonces.WINDOW_S + 1.0  # passes for another second
    headers = VALIDATOR.headers(body, nonce=f"{int(signed_at * 1e9)}_a")
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(
        ["POST /task_offer/ HTTP/1.1", "Host: g", f"Content-Length: {len(body)}", *lines, "", ""]
    )
    url = upstream.client._base_url
    assert url is not None
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(head.encode() + body[:-1])
    await asyncio.sleep(2.0)
    writer.write(body[-1:])
    assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()
    await writer.wait_closed()
    assert await accepted(upstream, "t1")
