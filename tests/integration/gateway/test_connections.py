"""Clients that hold connections are disconnected, and offers are answered meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway import connections
from shared.broker.bus import Bus
from tests.integration.gateway.upstream_client import Start

HEAD = b"POST /task_offer/ HTTP/1.1\r\nHost: x\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(api: Any, count: int, sent: bytes) -> AsyncIterator[list[Stream]]:
    """So many clients that have sent this."""
    url = api.client._base_url
    streams = [await asyncio.open_connection(url.host, url.port) for _ in range(count)]
    for _, writer in streams:
        writer.write(sent)
    try:
        yield streams
    finally:
        for _, writer in streams:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def left(streams: list[Stream]) -> int:
    """How many of them the gateway has not closed."""
    found = 0
    for reader, _ in streams:
        try:
            async with asyncio.timeout(0.01):
                await reader.read()
        except TimeoutError:
            found += 1
        except ConnectionError:
            continue
    return found


async def closed(api: Any) -> float:
    """How many connections the gateway has closed because they were slow."""
    async with api.client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    (line,) = [line for line in lines if line.startswith('podium_closed_connections_total{reason="slow"}')]
    return float(line.split()[-1])


@pytest.mark.parametrize("sent", [b"", HEAD], ids=["silent", "half a head"])
async def test_what_waits_too_long_is_closed(
    bus: Bus, start_gateway: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "WAIT_S", 0.5)
    async with start_gateway() as api, connected(api, 5, sent) as streams:
        await asyncio.sleep(1.5)
        assert await left(streams) == 0
        assert await closed(api) == 5


async def test_a_client_that_reads_nothing_is_closed(
    bus: Bus, start_gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "WAIT_S", 0.5)
    many = b"GET /v1/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500
    async with start_gateway() as api, connected(api, 1, many) as [(_, writer)]:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):  # until megabytes have filled the buffers of both sides
            while await closed(api) != 1:
                await asyncio.sleep(0.1)


async def test_above_the_limit_new_clients_still_get_in(
    bus: Bus, start_gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GRACE_S", 0.1)
    async with start_gateway(max_connections=16) as api, connected(api, 40, HEAD) as streams:
        await asyncio.sleep(1.0)
        assert await left(streams) <= 16
        assert (await api.get("/healthz"))[0] == 200


async def test_clients_with_slow_bodies_do_not_keep_new_ones_out(
    bus: Bus, start_gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "GRACE_S", 0.1)
    body = HEAD + b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    async with start_gateway(max_connections=16) as api, connected(api, 40, body) as streams:
        await asyncio.sleep(1.0)
        assert await left(streams) <= 16
        assert (await api.get("/healthz"))[0] == 200
