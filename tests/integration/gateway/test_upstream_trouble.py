"""Responses to upstream while gateway or broker start, are unreachable, or disagree on the time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench.harness.signed_fleet import subnet_node
from gateway import http_request, service
from gateway.server import listening_socket, running
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Job, Reservation, decode_job_record
from shared.net import free_port
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.upstream_client import SIGNED, VALIDATOR, Start, accepted, offer, start


async def test_a_start_waits_for_a_broker_that_is_away(broker: Broker, bus: Bus, upstream: Api) -> None:
    assert await accepted(upstream, "t1")
    await broker.stop(kill=True)
    assert (await VALIDATOR.post(upstream, "/task_offer/", offer("t2")))[0] == 503
    starting = asyncio.create_task(VALIDATOR.post(upstream, "/start_training/", start("t1")))
    await asyncio.sleep(1.0)
    assert not starting.done()
    await broker.start()
    assert (await starting)[0] == 200
    assert (await upstream.get("/v1/tasks/t1"))[1]["state"] == "queued"


async def test_a_start_is_told_to_come_again_before_upstream_gives_up(
    broker: Broker, bus: Bus, upstream: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.START_ANSWER_S + service.START_S + 1.0 < 10.0
    monkeypatch.setattr(service, "START_ANSWER_S", 0.5)
    assert await accepted(upstream, "t1")
    await broker.stop(kill=True)
    status, answer = await VALIDATOR.post(upstream, "/start_training/", start("t1"))
    assert status == 503
    assert "retry" in answer["detail"]
    await broker.start()
    await upstream.until_ready()
    assert (await VALIDATOR.post(upstream, "/start_training/", start("t1")))[0] == 200


async def test_who_has_the_stake_is_known_before_the_first_request(
    gateway_settings: Callable[..., Any], tmp_path: Path
) -> None:
    """Also without a broker: a 404 would be final for upstream."""
    nodes = tmp_path / "nodes.json"
    nodes.write_text(json.dumps({VALIDATOR.address: subnet_node(VALIDATOR.keys, 0, 5000.0)}))
    settings = gateway_settings(
        hotkey=SIGNED["hotkey"],
        upstream_nodes_file=str(nodes),
        nats_url=f"nats://127.0.0.1:{free_port()}",
    )
    listening = listening_socket(settings, {})
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with running(settings, listening), aiohttp.ClientSession(url) as client:
        status, answer = await VALIDATOR.post(Api(client), "/task_offer/", offer("t1"))
    assert (status, "NATS" in answer["detail"]) == (503, True)


async def test_a_slot_that_another_clock_gave_away_is_not_taken_twice(
    upstream: Api, bus: Bus, make_offer: Callable[..., dict[str, Any]]
) -> None:
    """By its gateway's clock the reservation had lapsed, so it gave the slot to the next task."""
    assert await accepted(upstream, "t1")
    records = [decode_job_record(record.data) for record in await bus.read(subjects.JOBS_STREAM, 0)]
    (reserved,) = [record for record in records if isinstance(record, Reservation)]
    other = subjects.task_key("t2")
    decision = reserved.decision
    taken = Job(
        record_id="r2",
        task_id="t2",
        task=other,
        slot=reserved.slot,
        gateway="ahead",
        offer=await job_offer(upstream, bus),
        decision=decision,
        received_at=time.time(),
        deadline_at=time.time() + 3600,
    )
    await bus.append(subjects.JOBS_STREAM, subjects.job(reserved.slot, other), encode(taken))
    await upstream.until("/v1/tasks", lambda page: len(page["tasks"]) >= 2)
    status, answer = await VALIDATOR.post(upstream, "/start_training/", start("t1"))
    assert status == 409
    assert "no slot is free" in answer["detail"]
    status, judged = await upstream.offer(make_offer("t1"))  # its data, over /v1: judged as if it were new
    assert (status, judged["accepted"]) == (200, False)
    assert judged["reason"].startswith("At maximum accuracy capacity")


async def job_offer(api: Api, bus: Bus) -> Any:
    """The offer of a job that upstream started; it keeps its slot."""
    assert await accepted(api, "started")
    assert (await VALIDATOR.post(api, "/start_training/", start("started")))[0] == 200
    records = [decode_job_record(record.data) for record in await bus.read(subjects.JOBS_STREAM, 0)]
    return next(record.offer for record in records if isinstance(record, Job))


async def test_a_body_that_does_not_come_is_not_waited_for(
    bus: Bus, start_gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_request, "BODY_S", 0.2)
    async with start_gateway(**SIGNED) as api:
        url = api.client._base_url
        assert url is not None
        for path, form in (("/task_offer/", b'"detail"'), ("/v1/offers", b"problem:slow-body")):
            reader, writer = await asyncio.open_connection(url.host, url.port)
            lines = (
                f"POST {path} HTTP/1.1",
                "Host: localhost",
                "Content-Type: application/json",
                "Content-Length: 9",
            )
            writer.write("\r\n".join((*lines, "", "{")).encode())
            answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the connection is closed
            assert answer.startswith(b"HTTP/1.1 408")
            assert form in answer
            writer.close()
            await writer.wait_closed()
