"""A real gateway in this process on a real nats-server, and slots that show heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.server import listening_socket, running
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.slots import Heartbeat
from shared.settings import Settings
from tests.integration.gateway.upstream_client import SIGNED

CPU = Hardware(device="cpu", count=8, memory_bytes=64 << 30)
GATEWAY_SETTINGS: dict[str, Any] = {"heartbeat_missing_s": 2.0, "poll_s": 0.5}


class Api:
    """One gateway's HTTP interface."""

    def __init__(self, client: aiohttp.ClientSession) -> None:
        self.client = client

    async def offer(self, body: Any) -> tuple[int, dict[str, Any]]:
        async with self.client.post("/v1/offers", json=body) as response:
            return response.status, await response.json(content_type=None)

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        async with self.client.get(path) as response:
            return response.status, await response.json(content_type=None)

    async def until(
        self, path: str, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 10
    ) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            _, body = await self.get(path)
            if holds(body):
                return body
            assert time.monotonic() < deadline, body
            await asyncio.sleep(0.02)

    async def until_ready(self) -> None:
        await self.until("/readyz", lambda body: body.get("status") == "ready")

    async def until_live(self, *slots: str) -> None:
        def live(body: dict[str, Any]) -> bool:
            return {view["slot"] for view in body["slots"] if view["live"]} >= set(slots)

        await self.until("/v1/slots", live)


@pytest.fixture
def make_offer() -> Callable[..., dict[str, Any]]:
    def make(task_id: str, **fields: Any) -> dict[str, Any]:
        offer = {
            "task_id": task_id,
            "task_type": "InstructTextTask",
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "model_params_count": 134_515_008,
            "hours_to_complete": 2,
            "dataset": "rows.jsonl",
            "file_format": "jsonl",
            "dataset_type": {"field_instruction": "q", "field_output": "a"},
        }
        return offer | fields

    return make


@pytest.fixture
def gateway_settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Callable[..., Settings]:
    def make(name: str = "gateway", **overrides: Any) -> Settings:
        own = {"gateway_id": name, "data_dir": str(tmp_path / name)}
        return make_settings(**(GATEWAY_SETTINGS | own | overrides))

    return make


@pytest.fixture
def start_gateway(
    gateway_settings: Callable[..., Settings],
) -> Callable[..., AbstractAsyncContextManager[Api]]:
    @asynccontextmanager
    async def start(name: str = "gateway", **overrides: Any) -> AsyncIterator[Api]:
        settings = gateway_settings(name, **overrides)
        listening = listening_socket(settings, {})
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with running(settings, listening), aiohttp.ClientSession(url) as client:
            yield Api(client)

    return start


@pytest.fixture
def one_heartbeat() -> Callable[[str], bytes]:
    """Return the heartbeat of a slot's live node, to be published once."""

    def make(slot: str) -> bytes:
        return encode(Heartbeat(slot=slot, node=f"node-{slot}", epoch=1, hardware=CPU, at=time.time()))

    return make


@pytest.fixture
async def heartbeats(bus: Bus) -> AsyncIterator[Callable[..., None]]:
    """`heartbeats("a", "b")`: from now on these slots show a heartbeat ten times a second."""
    alive: dict[str, dict[str, Any]] = {}

    def show(*slots: str, hardware: Hardware = CPU, **measured: float) -> None:
        alive.update({slot: {"hardware": hardware, **measured} for slot in slots})

    async def beat() -> None:
        while True:
            for slot, shown in alive.items():
                message = Heartbeat(slot=slot, node=f"node-{slot}", epoch=1, at=time.time(), **shown)
                with contextlib.suppress(BusError):
                    await bus.publish(subjects.heartbeat(slot), encode(message))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(beat())
    yield show
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def api(
    bus: Bus,
    start_gateway: Callable[..., AbstractAsyncContextManager[Api]],
    heartbeats: Callable[..., None],
) -> AsyncIterator[Api]:
    """One gateway that is ready, with both slots live."""
    heartbeats("a", "b")
    async with start_gateway() as api:
        await api.until_ready()
        await api.until_live("a", "b")
        yield api


@pytest.fixture
async def upstream(
    bus: Bus,
    start_gateway: Callable[..., AbstractAsyncContextManager[Api]],
    heartbeats: Callable[..., None],
) -> AsyncIterator[Api]:
    """A gateway that takes VALIDATOR's requests, with both slots live."""
    heartbeats("a", "b")
    async with start_gateway(**SIGNED) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        yield api
