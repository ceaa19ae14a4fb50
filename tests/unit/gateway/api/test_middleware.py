"""Requests that anyone may send are throttled; offers and upstream's requests are not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.api.access import Guard
from gateway.api.routing import THROTTLE, URGENT
from gateway.api.throttle import LoopThrottle
from gateway.api.v1 import make_app
from gateway.service import Service
from gateway.upstream.auth import ClosedGate
from gateway.upstream.endpoints import Entrance, add_endpoints
from shared.settings import Settings

Client = TestClient[web.Request, web.Application]


class CountingThrottle(LoopThrottle):
    taken = 0

    async def take(self) -> None:
        self.taken += 1


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[tuple[Client, CountingThrottle]]:
    """A gateway's HTTP side, without a broker."""
    service = Service(Settings(data_dir=str(tmp_path)))
    app, throttle = make_app(service, Guard(None, loopback=True, metrics_open=False)), CountingThrottle()
    app[URGENT].update(add_endpoints(app, service, Entrance(ClosedGate(), CountingThrottle().take)))
    app[THROTTLE] = throttle
    async with TestClient(TestServer(app)) as client:
        yield client, throttle


@pytest.mark.parametrize(
    ("method", "path", "throttled"),
    [
        ("POST", "/v1/offers", False),
        ("POST", "/v1/offers/", False),
        ("POST", "/task_offer", False),
        ("POST", "/task_offer/", False),
        ("POST", "/start_training/", False),
        ("GET", "/get_latest_model_submission/7f3c", False),
        ("GET", "/training_repo/text/", False),
        ("GET", "/healthz", True),
        ("GET", "/v1/tasks/7f3c/", True),
        ("GET", "/v1/offers", True),  # no such method
        ("GET", "/v1/offers/7f3c", True),
        ("GET", "/", True),
        ("GET", "/favicon.ico", True),
        ("POST", "/task_offer/7f3c", True),
    ],
)
async def test_what_is_throttled(
    gateway: tuple[Client, CountingThrottle], method: str, path: str, throttled: bool
) -> None:
    client, throttle = gateway
    async with client.request(method, path, data=b"x") as response:
        assert response.status != 500
    assert throttle.taken == throttled
