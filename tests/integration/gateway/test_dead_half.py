"""A half that is down gets no start while the other lives, and a job that it never claimed moves, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Job, Moved, decode_job_record, decode_state_record
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.upstream_client import SIGNED, VALIDATOR, Start, accepted, start

JOBS = subjects.JOBS_STREAM
SOON: dict[str, Any] = {"unclaimed_s": 0.6, "heartbeat_missing_s": 0.6}
Heartbeats = Callable[..., None]


@asynccontextmanager
async def only_b_lives(start_gateway: Start, heartbeats: Heartbeats, **settings: Any) -> AsyncIterator[Api]:
    """A gateway whose slot a was live for a moment: a job or reservation that it took is there."""
    heartbeats("b")
    async with start_gateway(**SIGNED, **settings) as api:
        await api.until_live("b")
        yield api


async def show_a_once(bus: Bus, api: Api, beat: Callable[[str], bytes]) -> None:
    await bus.publish(subjects.heartbeat("a"), beat("a"))
    await api.until_live("a")


async def until_a_is_gone(api: Api) -> None:
    def gone(body: dict[str, Any]) -> bool:
        return [view["live"] for view in body["slots"]] == [False, True]

    await api.until("/v1/slots", gone)


async def jobs(bus: Bus) -> list[Job]:
    records = [decode_job_record(record.data) for record in await bus.read(JOBS, 0)]
    return [record for record in records if isinstance(record, Job)]


async def moved_by(api: Api) -> float:
    name = "podium_moved_jobs_total "
    async with api.client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line for line in lines if line.startswith(name)).removeprefix(name))


async def test_a_start_goes_to_the_live_half(
    bus: Bus, start_gateway: Start, heartbeats: Heartbeats, one_heartbeat: Callable[[str], bytes]
) -> None:
    async with only_b_lives(start_gateway, heartbeats, heartbeat_missing_s=0.6) as api:
        await show_a_once(bus, api, one_heartbeat)
        assert await accepted(api, "t1")
        assert (await api.get("/v1/tasks/t1"))[1]["slot"] == "a"
        await until_a_is_gone(api)
        status, answer = await VALIDATOR.post(api, "/start_training/", start("t1"))
        assert (status, answer["message"]) == (200, "Training on slot b")
        slots = (await api.get("/v1/slots"))[1]["slots"]
        assert [view["state"] for view in slots] == ["free", "busy"]


async def test_without_a_live_half_the_start_keeps_its_slot(
    bus: Bus, start_gateway: Start, one_heartbeat: Callable[[str], bytes]
) -> None:
    async with start_gateway(**SIGNED, heartbeat_missing_s=0.6) as api:
        await api.until_ready()
        await show_a_once(bus, api, one_heartbeat)
        assert await accepted(api, "t1")
        await asyncio.sleep(0.8)
        status, answer = await VALIDATOR.post(api, "/start_training/", start("t1"))
        assert (status, answer["message"]) == (200, "Training on slot a")


async def test_an_unclaimed_job_moves_once_to_the_live_half(
    bus: Bus,
    start_gateway: Start,
    heartbeats: Heartbeats,
    one_heartbeat: Callable[[str], bytes],
    make_offer: Callable[..., dict[str, Any]],
) -> None:
    async with (
        only_b_lives(start_gateway, heartbeats, **SOON) as api,
        start_gateway("other", **SIGNED, **SOON) as other,
    ):
        await other.until_live("b")
        await show_a_once(bus, api, one_heartbeat)
        _, decision = await api.offer(make_offer("t1"))
        assert decision["slot"] == "a"
        task = await api.until("/v1/tasks/t1", lambda body: body.get("slot") == "b")
        assert (task["state"], task["deadline_at"]) == ("queued", pytest.approx(decision["deadline_at"]))
        await other.until("/v1/tasks/t1", lambda body: body.get("slot") == "b")
        await asyncio.sleep(1.0)  # nobody claims it there either: it stays
        stored = await jobs(bus)
        assert [(job.slot, job.moved_from) for job in stored] == [("a", None), ("b", "a")]
        chain = [decode_state_record(record.data) for record in await bus.read(subjects.state_stream("a"), 0)]
        assert [type(record) for record in chain] == [Moved]
        assert await moved_by(api) + await moved_by(other) == 1
        slots = (await api.get("/v1/slots"))[1]["slots"]
        assert [view["state"] for view in slots] == ["free", "busy"]
        assert (await api.get("/v1/gateway"))[1]["malformed_records"] == 0


async def test_a_claimed_job_stays_even_if_its_half_is_down(
    bus: Bus,
    start_gateway: Start,
    heartbeats: Heartbeats,
    one_heartbeat: Callable[[str], bytes],
    make_offer: Callable[..., dict[str, Any]],
) -> None:
    async with only_b_lives(start_gateway, heartbeats, **SOON) as api:
        await show_a_once(bus, api, one_heartbeat)
        assert (await api.offer(make_offer("t1")))[1]["slot"] == "a"
        claim = Claimed(record_id="c", task="t1", slot="a", node="node-a", epoch=1, attempt=1)
        await bus.append(
            subjects.state_stream("a"), subjects.state("a", "t1"), encode(claim), last_on_subject=0
        )
        await asyncio.sleep(2.0)
        assert [job.slot for job in await jobs(bus)] == ["a"]


async def test_a_job_that_was_fenced_before_a_kill_is_moved_by_the_next_gateway(
    bus: Bus,
    start_gateway: Start,
    heartbeats: Heartbeats,
    one_heartbeat: Callable[[str], bytes],
    make_offer: Callable[..., dict[str, Any]],
) -> None:
    async with only_b_lives(start_gateway, heartbeats, unclaimed_s=2.0, heartbeat_missing_s=0.6) as api:
        await show_a_once(bus, api, one_heartbeat)
        assert (await api.offer(make_offer("t1")))[1]["slot"] == "a"
        fence = Moved(record_id="m", task="t1", slot="a", gateway="killed")
        await bus.append(
            subjects.state_stream("a"), subjects.state("a", "t1"), encode(fence), last_on_subject=0
        )
        await api.until("/v1/tasks/t1", lambda body: body.get("slot") == "b", timeout_s=1.5)
