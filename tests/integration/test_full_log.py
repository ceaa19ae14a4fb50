"""A taken-over node that fills its slot's log: the other slot claims, runs, stores, and gets new jobs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace

from bench.harness.fleet import SCRIPTED
from gateway.server import listening_socket, running
from gateway.state import log_room
from podium.local.nats_server import Broker, bootstrap
from podium.security.key_files import make_users
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN, GATEWAY, trainer
from shared.broker.stream_requests import find_stream
from shared.errors import DeniedError, StoreFullError
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed, Result, Submitting, decode_state_record
from shared.messages.slots import Heartbeat
from shared.settings import Settings

STATE_A, STATE_B = map(subjects.state_stream, "ab")
ROOM = 1 << 20
CPU = Hardware(device="cpu", count=1, memory_bytes=8 << 30)
Fleet = tuple[Settings, dict[str, Bus]]


@pytest.fixture
async def fleet(tmp_path: Path, make_settings: Callable[..., Settings]) -> AsyncIterator[Fleet]:
    """A broker with users whose logs have little room, and a connection of each user."""
    keys = tmp_path / "keys"
    make_users(keys, ("a", "b"))
    broker = Broker(tmp_path / "secured", keys=keys)
    await broker.start()
    settings = make_settings(
        nats_url=broker.url,
        nats_nkey_seed_file=str(keys),
        log_max_bytes=ROOM,
        dataset_roots=(str(tmp_path),),
        poll_s=0.5,
    )
    await bootstrap(settings)
    async with AsyncExitStack() as stack:
        buses = {}
        for user in (ADMIN, GATEWAY, trainer("a"), trainer("b")):
            buses[user] = await connect(settings, name=f"test {user}", user=user)
            stack.push_async_callback(buses[user].close)
        yield settings, buses
    await broker.stop(kill=True)


async def fill(bus: Bus) -> int:
    """Write what the user of slot a may until no more is stored; return how many records were."""
    count = 0
    for size in (20_000, 1_000, 1):  # until the last gap is filled
        for _ in range(1000):
            try:
                await bus.append(STATE_A, subjects.state("a", f"t{count}"), b"x" * size)
            except StoreFullError:
                break
            count += 1
        else:
            raise AssertionError("it never gets full")
    return count


async def test_a_full_log_is_its_slots_alone_until_it_has_more_room(fleet: Fleet) -> None:
    settings, buses = fleet
    taken_over, other, gateway = buses[trainer("a")], buses[trainer("b")], buses[GATEWAY]
    claim = await other.append(STATE_B, subjects.state("b", "t"), b"claimed", last_on_subject=0)
    count = await fill(taken_over)
    with pytest.raises(StoreFullError, match="raise log_max_bytes"):
        await gateway.append(STATE_A, subjects.state("a", "t"), b"cancelled")
    last = await other.append(STATE_B, subjects.state("b", "t"), b"submitting", last_on_subject=claim)
    await gateway.append(STATE_B, subjects.state("b", "t"), b"result", last_on_subject=last)
    await other.append(subjects.LEASES_STREAM, subjects.lease("b"), b"held")
    await gateway.append(subjects.JOBS_STREAM, subjects.job("b", "next"), b"job")
    # The other slot's log stays closed, under each stream's name.
    for stream in (STATE_A, STATE_B):
        with pytest.raises(DeniedError):
            await taken_over.append(stream, subjects.state("b", "t"), b"forged")
        with pytest.raises(DeniedError):
            await taken_over.last(stream, subjects.state("b", "t"))

    assert await bootstrap(replace(settings, log_max_bytes=4 * ROOM)) == []
    await gateway.append(STATE_A, subjects.state("a", "t"), b"cancelled")
    found = await find_stream(buses[ADMIN], STATE_A)
    assert found is not None
    assert (found.config["max_bytes"], found.messages) == (4 * ROOM, count + 1)
    assert found.config["deny_purge"]
    assert found.config["subjects"] == ["podium.state.a.>"]


async def test_a_limit_only_grows_and_never_beyond_the_brokers_store(fleet: Fleet) -> None:
    settings, buses = fleet
    for wanted, kept in ((2 * ROOM, 2 * ROOM), (ROOM, 2 * ROOM), (1 << 40, 2 * ROOM)):
        assert await bootstrap(replace(settings, log_max_bytes=wanted)) == []
        found = await find_stream(buses[ADMIN], STATE_B)
        assert found is not None
        assert found.config["max_bytes"] == kept
    assert await buses[trainer("b")].append(STATE_B, subjects.state("b", "t"), b"claimed") == 1


@pytest.fixture
async def node_b(fleet: Fleet, tmp_path: Path) -> AsyncIterator[None]:
    """The other half's trainer node, a process with its own key."""
    values = {
        "nats_url": fleet[0].nats_url,
        "nats_nkey_seed_file": fleet[0].nats_nkey_seed_file,
        "data_dir": tmp_path / "node-b",
        "dataset_roots": tmp_path,
        "worker_command": json.dumps(SCRIPTED),
        "slot": "b",
        "hardware": "cpu",
        "poll_s": 0.5,
    }
    environment = dict(os.environ) | {f"PODIUM_{name.upper()}": str(value) for name, value in values.items()}
    with (tmp_path / "node-b.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "trainer_node", env=environment, stdout=log, stderr=log
        )
    yield
    process.terminate()
    await process.wait()


@pytest.fixture
async def node_a(fleet: Fleet) -> AsyncIterator[None]:
    """Heartbeats of the taken-over node, which looks alive and free."""
    bus = fleet[1][trainer("a")]

    async def beat() -> None:
        while True:
            message = Heartbeat(slot="a", node="evil", epoch=1, hardware=CPU, at=time.time())
            await bus.publish(subjects.heartbeat("a"), encode(message))
            await asyncio.sleep(0.2)

    task = asyncio.create_task(beat())
    yield
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
async def client(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a gateway with its own key."""
    monkeypatch.setattr(log_room, "READ_S", 0.1)
    listening = listening_socket(fleet[0], {})
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with running(fleet[0], listening), aiohttp.ClientSession(url) as client:
        yield client


async def until(client: aiohttp.ClientSession, path: str, holds: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(60):
        while True:
            async with client.get(path) as response:
                if holds(body := await response.json()):
                    return body
            await asyncio.sleep(0.05)


@pytest.mark.fault("F16")
@pytest.mark.usefixtures("node_a", "node_b")
async def test_the_other_slot_gets_jobs_runs_them_and_stores_their_results(
    fleet: Fleet, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"steps": 3, "step_s": 0.05}))

    async def offered(task: str) -> Any:
        offer = {
            "task_id": task,
            "task_type": "InstructTextTask",
            "model": "org/scripted",
            "model_params_count": 140_000,
            "hours_to_complete": 1,
            "dataset": str(data),
            "file_format": "json",
            "dataset_type": {"field_instruction": "q", "field_output": "a"},
        }
        async with client.post("/v1/offers", json=offer) as response:
            return await response.json()

    await until(client, "/v1/slots", lambda body: all(view["live"] for view in body["slots"]))
    await fill(fleet[1][trainer("a")])
    gateway = await until(client, "/v1/gateway", lambda body: body["full_slots"])
    assert gateway["full_log"] is None
    assert list(gateway["full_slots"]) == ["a"]
    assert gateway["full_slots"]["a"].startswith("STATE-a is 9") or "100%" in gateway["full_slots"]["a"]
    alerts = await until(client, "/v1/alerts", lambda body: body["alerts"])
    assert any(
        alert["what"].startswith("no offer is accepted for slot a: STATE-a") for alert in alerts["alerts"]
    )

    for task in ("one", "two"):
        decision = await offered(task)
        assert (decision["accepted"], decision["slot"]) == (True, "b")
        refused = await offered(f"{task}-too")
        assert (refused["accepted"], refused["kind"]) == (False, "log_full")
        assert "a: STATE-a is" in refused["reason"]
        await until(client, f"/v1/tasks/{task}", lambda body: body["state"] == "submitted")
    stored = [decode_state_record(record.data) for record in await fleet[1][GATEWAY].read(STATE_B, 0)]
    assert [type(record) for record in stored] == [Claimed, Submitting, Result] * 2
