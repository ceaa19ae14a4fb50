"""A log with hardly any room: no offer is accepted, or none for its slot, until there is room again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gateway.policy.view import VIEW_S
from gateway.state import log_room
from gateway.state.log_room import LogRoom, how_full
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.stream_requests import StreamInfo, find_stream, update_stream
from shared.broker.streams import bootstrap
from shared.errors import BusTimeoutError, StoreFullError
from shared.messages.encoding import encode
from shared.settings import Settings
from tests.log_records import job_due

ROOM = 1 << 20


def info(used: int, limit: int) -> StreamInfo:
    return StreamInfo(
        config={"max_bytes": limit}, created="", now="", messages=1, bytes=used, first=1, last=1
    )


@pytest.mark.parametrize(
    ("used", "limit", "words"),
    [
        (0, ROOM, None),
        (94 << 20, 100 << 20, None),
        (95 << 20, 100 << 20, "STATE-a is 95% full (95 of 100 MiB)"),
        (100 << 20, 100 << 20, "STATE-a is 100% full (100 of 100 MiB)"),
        (1 << 40, -1, None),  # no limit
    ],
)
def test_how_full(used: int, limit: int, words: str | None) -> None:
    assert how_full("STATE-a", info(used, limit)) == words


async def test_what_was_found_last_stays_while_the_broker_is_silent(bus: Bus) -> None:
    room = LogRoom("ab")
    room.full, room.full_slots = "JOBS is 99% full", {"a": "STATE-a is 99% full"}
    await bus.close()
    task = asyncio.create_task(room.run(bus))
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (room.full, room.full_slots) == ("JOBS is 99% full", {"a": "STATE-a is 99% full"})


async def test_a_log_that_can_not_be_read_hides_no_other(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fullness(bus: Bus, name: str) -> str | None:
        if name in ("JOBS", "STATE-b"):
            raise BusTimeoutError(name)
        return f"{name} is 99% full" if name == "STATE-a" else None

    monkeypatch.setattr(log_room, "fullness", fullness)
    room = LogRoom("abc")
    room.full, room.full_slots = "JOBS is 98% full", {"b": "STATE-b is 98% full", "c": "STATE-c is 98% full"}
    task = asyncio.create_task(room.run(bus))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    assert room.full == "JOBS is 98% full"
    assert room.full_slots == {"a": "STATE-a is 99% full", "b": "STATE-b is 98% full"}


async def limit(bus: Bus, stream: str, max_bytes: int) -> None:
    found = await find_stream(bus, stream)
    assert found is not None
    await update_stream(bus, found.config | {"max_bytes": max_bytes})


async def fill(bus: Bus, stream: str, subject: str) -> None:
    await limit(bus, stream, ROOM)
    for _ in range(10):
        await bus.append(stream, subject, b"x" * 101_000)


async def append_for_ever(bus: Bus, stream: str, subject: str) -> None:
    while True:
        await bus.append(stream, subject, b"x")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_room, "READ_S", 0.1)


async def test_no_offer_is_accepted_whose_records_might_not_be_stored(
    api: Any, bus: Bus, settings: Settings, make_offer: Callable[..., dict[str, Any]]
) -> None:
    _, decision = await api.offer(make_offer("one"))
    assert decision["accepted"]
    await fill(bus, subjects.JOBS_STREAM, subjects.job("a", "x"))
    gateway = await api.until("/v1/gateway", lambda body: body["full_log"])
    assert gateway["full_log"].startswith("JOBS is 9")
    _, decision = await api.offer(make_offer("two"))
    assert (decision["accepted"], decision["kind"]) == (False, "log_full")
    assert "records might not be stored" in decision["reason"]
    assert (await api.offer(make_offer("one")))[1]["accepted"]  # what was accepted stays so
    assert any(
        "no offer is accepted" in alert["what"] for alert in (await api.get("/v1/alerts"))[1]["alerts"]
    )
    await bootstrap(bus, settings)
    await api.until("/v1/gateway", lambda body: body["full_log"] is None)
    assert (await api.offer(make_offer("two")))[1]["accepted"]


async def test_a_slot_whose_log_is_full_gets_no_job_and_the_others_do(
    api: Any, bus: Bus, settings: Settings, make_offer: Callable[..., dict[str, Any]]
) -> None:
    await fill(bus, subjects.state_stream("a"), subjects.state("a", "x"))
    gateway = await api.until("/v1/gateway", lambda body: body["full_slots"])
    assert gateway["full_log"] is None
    assert gateway["full_slots"]["a"].startswith("STATE-a is 9")
    async with api.client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    assert 'podium_log_full{stream="STATE-a"} 1.0' in lines
    assert 'podium_log_full{stream="STATE-b"} 0.0' in lines
    _, decision = await api.offer(make_offer("one"))
    assert (decision["accepted"], decision["slot"]) == (True, "b")
    _, decision = await api.offer(make_offer("two"))
    assert (decision["accepted"], decision["kind"]) == (False, "log_full")
    assert "a: STATE-a is 9" in decision["reason"]
    assert "b: busy" in decision["reason"]
    await bootstrap(bus, settings)
    await api.until("/v1/gateway", lambda body: body["full_slots"] == {})
    await asyncio.sleep(2 * VIEW_S)  # until then it may refuse on what it saw before
    assert (await api.offer(make_offer("two")))[1]["slot"] == "a"


async def test_a_full_log_keeps_no_other_slots_jobs_from_moving_or_expiring(
    bus: Bus, make_settings: Callable[..., Settings], start_gateway: Any, heartbeats: Callable[..., None]
) -> None:
    slots = ("a", "b", "c")
    await bootstrap(bus, make_settings(slots=slots))
    for slot in "ab":
        late = encode(job_due(f"late-{slot}", slot, -5.0))
        await bus.append(subjects.JOBS_STREAM, subjects.job(slot, f"late-{slot}"), late)
    await fill(bus, subjects.state_stream("a"), subjects.state("a", "x"))
    with pytest.raises(StoreFullError):
        await append_for_ever(bus, subjects.state_stream("a"), subjects.state("a", "x"))
    async with start_gateway(slots=slots, log_max_bytes=ROOM, expire_after_s=0.2, unclaimed_s=1.0) as api:
        await api.until("/v1/tasks/late-b", lambda body: body.get("state") == "expired")
        assert (await api.get("/v1/tasks/late-a"))[1]["state"] == "queued"
        for slot in "ab":
            message = encode(job_due(f"waits-{slot}", slot, 60.0))
            await bus.append(subjects.JOBS_STREAM, subjects.job(slot, f"waits-{slot}"), message)
        heartbeats("c")
        await api.until("/v1/tasks/waits-b", lambda body: body.get("slot") == "c")
        assert (await api.get("/v1/tasks/waits-a"))[1]["slot"] == "a"
