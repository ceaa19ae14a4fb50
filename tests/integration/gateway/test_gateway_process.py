"""`python -m gateway` as a process: its socket, its signals, its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect

MakeOffer = Callable[..., dict[str, Any]]
Start = Callable[..., Any]
JSON = {"Content-Type": "application/json"}
PASS_AS_3 = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-m", "gateway"])
"""


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start `python -m gateway`; with a socket, it is passed as systemd would."""
    processes = []

    async def start(listening: socket.socket | None = None, **variables: str) -> asyncio.subprocess.Process:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PODIUM_")}
        environ |= {"PODIUM_DATA_DIR": str(tmp_path / "data"), "PODIUM_EXPECTED_HARDWARE": "cpu"}
        environ |= {"PODIUM_HUB_LOOK_S": "0"} | variables
        command = [sys.executable, "-m", "gateway"]
        passed: tuple[int, ...] = ()
        if listening is not None:
            environ["LISTEN_FDS"] = "1"
            passed = (listening.fileno(),)
            command = [sys.executable, "-c", PASS_AS_3, str(listening.fileno())]
        process = await asyncio.create_subprocess_exec(
            *command, env=environ, pass_fds=passed, stderr=asyncio.subprocess.PIPE
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield listening


def url_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


async def status(client: aiohttp.ClientSession, path: str) -> int:
    async with client.get(path) as response:
        return response.status


async def until_ready(client: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(60):
        while await status(client, "/readyz") != 200:
            await asyncio.sleep(0.02)


async def test_it_answers_soon_and_drains_on_sigterm(
    start: Start, listening: socket.socket, bus: Bus, broker: Broker
) -> None:
    begun = time.monotonic()
    process = await start(listening, PODIUM_NATS_URL=broker.url)
    async with aiohttp.ClientSession(url_of(listening)) as client:
        assert await status(client, "/healthz") == 200
        assert time.monotonic() - begun < 30.0  # 0.5 s on a free machine
        await until_ready(client)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0


@pytest.mark.fault("F18")
async def test_a_running_request_is_finished_before_it_ends(
    start: Start, listening: socket.socket, bus: Bus, broker: Broker, make_offer: MakeOffer, tmp_path: Path
) -> None:
    process = await start(listening, PODIUM_NATS_URL=broker.url)
    body = json.dumps(make_offer("one", hours_to_complete=97)).encode()
    rest = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:20]
        await rest.wait()
        yield body[20:]

    async with aiohttp.ClientSession(url_of(listening)) as client:
        await until_ready(client)
        asked = asyncio.create_task(client.post("/v1/offers", data=slowly(), headers=JSON))
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        rest.set()
        response = await asked
        assert response.status == 200
        assert (await response.json())["reason"] == "Job duration too long (>96 hours)"
    assert await asyncio.wait_for(process.wait(), 60) == 0
    lines = (tmp_path / "data" / "decisions.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["one"]


async def test_streams_end_when_it_stops(
    start: Start, listening: socket.socket, bus: Bus, broker: Broker
) -> None:
    process = await start(listening, PODIUM_NATS_URL=broker.url)
    async with aiohttp.ClientSession(url_of(listening)) as client:
        async with client.get("/v1/events") as response:
            assert await response.content.readuntil(b"event: hello\n")
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(response.read(), 60)  # raises unless the chunked answer ends cleanly
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert time.monotonic() - began < 8  # requests that don't end may take FINISH_S, which is 10


@pytest.mark.fault("F1")
async def test_kill_9_refuses_no_connection_while_the_parent_keeps_the_socket(
    start: Start, listening: socket.socket, bus: Bus, broker: Broker, make_offer: MakeOffer
) -> None:
    first = await start(listening, PODIUM_NATS_URL=broker.url)
    async with aiohttp.ClientSession(url_of(listening)) as client:
        await until_ready(client)
        first.kill()
        await first.wait()
        asked = asyncio.create_task(status(client, "/healthz"))
        await start(listening, PODIUM_NATS_URL=broker.url)
        assert await asyncio.wait_for(asked, 60) == 200
        await until_ready(client)


async def test_bad_settings_are_exit_2_with_one_clear_line(start: Start) -> None:
    for variables, said in (
        ({"PODIUM_NO_SUCH": "1"}, "PODIUM_NO_SUCH"),
        ({"PODIUM_EXPECTED_HARDWARE": "four fast ones"}, "unknown hardware 'four fast ones'"),
    ):
        process = await start(**variables)
        _, error = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 2
        assert said in error.decode()
        assert "Traceback" not in error.decode()


async def test_a_taken_port_is_exit_1_with_what_to_do(start: Start, listening: socket.socket) -> None:
    process = await start(PODIUM_GATEWAY_PORT=str(listening.getsockname()[1]))
    _, error = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert "PODIUM_GATEWAY_HOST" in error.decode()
    assert "Traceback" not in error.decode()


async def test_a_stream_that_would_break_a_promise_is_exit_1(
    start: Start, broker: Broker, settings: Any
) -> None:
    bus = await connect(settings, name="test")
    config = b'{"name": "JOBS", "subjects": ["podium.jobs.>"], "storage": "memory", "retention": "workqueue"}'
    await bus.request(f"$JS.API.STREAM.CREATE.{subjects.JOBS_STREAM}", config)
    await bus.close()
    process = await start(PODIUM_NATS_URL=broker.url, PODIUM_GATEWAY_PORT="0")
    _, error = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert "stream JOBS exists with" in error.decode()
    assert "Traceback" not in error.decode()
