"""Tokens and the rules without them, over real HTTP and on real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.server import running
from podium.__main__ import main
from podium.client import Client, find_gateway
from shared.broker.bus import Bus
from shared.errors import PodiumError
from tests.integration.gateway.conftest import Api

MakeOffer = Callable[..., dict[str, Any]]
TOKEN, OTHER = "0123456789abcdef", "fedcba9876543210"
OPEN = ("/healthz", "/readyz", "/v1/openapi.json", "/v1/docs")
CLOSED = (
    *("/v1/tasks", "/v1/tasks/one", "/v1/tasks/one/story"),
    *("/v1/slots", "/v1/gateway", "/v1/events", "/v1/slots/"),
)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "api.token"
    path.touch(0o600)
    path.write_text(f"me: {TOKEN}\n")
    return path


async def status_of(api: Any, path: str, method: str = "GET", **options: Any) -> int:
    async with api.client.request(method, path, **options) as response:
        return response.status


async def test_v1_wants_a_token_and_the_rest_does_not(
    bus: Bus, start_gateway: Any, token_file: Path, make_offer: MakeOffer
) -> None:
    async with start_gateway(api_token_file=str(token_file)) as api:
        await api.until_ready()
        for path in OPEN:
            assert await status_of(api, path) == 200, path
        for path in CLOSED:
            async with api.client.get(path) as response:
                assert response.status == 401, path
                assert response.headers["WWW-Authenticate"] == 'Bearer realm="podium"'
                assert response.content_type == "application/problem+json"
                assert (await response.json(content_type=None))["type"] == "urn:podium:problem:unauthorized"
        for path in ("/v1/offers", "/v1/tasks/one/cancel", "/v1/tasks/one/requeue"):
            assert await status_of(api, path, "POST", json={}) == 401
        assert (
            await status_of(api, "/v1/offers", "POST", json=make_offer("one"), headers=bearer(TOKEN)) == 200
        )
        assert await status_of(api, "/v1/slots", headers=bearer(OTHER)) == 401
        assert await status_of(api, f"/v1/slots?token={TOKEN}") == 401
        assert await status_of(api, "/metrics") == 200  # this machine
        assert await status_of(api, "/metrics", headers={"X-Forwarded-For": "8.8.8.8"}) == 401
        await asyncio.to_thread(token_file.write_text, f"{OTHER}\n")
        async with asyncio.timeout(20):
            while await status_of(api, "/v1/slots", headers=bearer(OTHER)) != 200:
                await asyncio.sleep(0.05)
        assert await status_of(api, "/v1/slots", headers=bearer(TOKEN)) == 401


async def test_commands_send_the_token_of_their_settings(
    bus: Bus,
    start_gateway: Any,
    token_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with start_gateway(api_token_file=str(token_file)) as api:
        await api.until_ready()
        url = str(api.client._base_url)
        for name in [name for name in os.environ if name.startswith("PODIUM_")]:
            monkeypatch.delenv(name)
        with pytest.raises(PodiumError, match=r"answered 401.*PODIUM_API_TOKEN_FILE"):
            await asyncio.to_thread(Client(url).slots)
        monkeypatch.setenv("PODIUM_API_TOKEN_FILE", str(token_file))
        slots = await asyncio.to_thread(lambda: find_gateway(url).slots())
        assert [slot.slot for slot in slots] == ["a", "b"]
        assert await asyncio.to_thread(main, ["status", "--url", url]) == 0
        assert await asyncio.to_thread(main, ["jobs", "list", "--url", url, "--json"]) == 0
    said = "".join(capfd.readouterr())
    assert TOKEN not in said


async def test_without_tokens_what_a_web_page_could_send_is_refused(api: Any, make_offer: MakeOffer) -> None:
    rebound = {"Host": "evil.example"}
    assert await status_of(api, "/v1/tasks", headers=rebound) == 403
    assert await status_of(api, "/v1/offers", "POST", json=make_offer("one"), headers=rebound) == 403
    assert await status_of(api, "/v1/tasks", headers={"X-Forwarded-For": "8.8.8.8"}) == 403
    assert await status_of(api, "/v1/tasks", headers={"Host": "localhost:1"}) == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        options: dict[str, Any] = {"data": b"{}", "headers": {"Content-Type": kind}}
        for path in ("/v1/offers", "/v1/tasks/one/cancel"):
            assert await status_of(api, path, "POST", **options) == 415
    async with api.client.post("/v1/offers", data=b"{}", skip_auto_headers=["Content-Type"]) as response:
        assert response.status == 415


async def test_an_open_gateway_does_not_start_where_others_reach_it(
    bus: Bus, gateway_settings: Any, token_file: Path
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as anywhere:
        with pytest.raises(PodiumError, match="podium keys DIR"):
            async with running(gateway_settings(), anywhere):
                pytest.fail("it started")
        async with running(gateway_settings(api_token_file=str(token_file)), anywhere):
            url = f"http://127.0.0.1:{anywhere.getsockname()[1]}"
            async with aiohttp.ClientSession(url) as client, client.get("/metrics") as response:
                assert response.status == 401  # not a loopback socket
                await Api(client).until_ready()


async def test_a_token_that_is_taken_back_ends_its_streams(
    bus: Bus, start_gateway: Any, token_file: Path, heartbeats: Callable[..., None]
) -> None:
    """Also while events come all the time."""
    heartbeats("a", "b")
    async with start_gateway(api_token_file=str(token_file)) as api:
        await api.until_ready()
        async with api.client.get("/v1/events", headers=bearer(TOKEN)) as response:
            assert response.status == 200
            await asyncio.to_thread(token_file.write_text, f"{OTHER}\n")
            async with asyncio.timeout(20):
                assert b"event: heartbeat" in await response.read()  # to its end
