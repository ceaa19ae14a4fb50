"""Several gateways, a broker that dies, answers that get lost: never too many jobs, never one lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest

from bench.harness.checker import read_all
from gateway.server import listening_socket, running
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusUnavailableError
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Job, Result, ResultStatus, decode_job_record, decode_state_record
from shared.net import free_port
from shared.settings import Settings
from tests.log_records import claimed, job_due, submitting

MakeOffer = Callable[..., dict[str, Any]]
Heartbeats = Callable[..., None]


async def jobs(bus: Bus) -> list[Job]:
    records = [decode_job_record(record.data) for record in await read_all(bus, subjects.JOBS_STREAM)]
    return [record for record in records if isinstance(record, Job)]


@asynccontextmanager
async def two_gateways(start_gateway: Any, heartbeats: Heartbeats) -> AsyncIterator[tuple[Any, Any]]:
    heartbeats("a", "b")
    async with start_gateway("one") as first, start_gateway("two") as second:
        for api in (first, second):
            await api.until_ready()
            await api.until_live("a", "b")
        yield first, second


@pytest.mark.fault("F17")
async def test_of_hundreds_of_offers_to_two_gateways_exactly_two_are_accepted(
    bus: Bus, start_gateway: Any, heartbeats: Heartbeats, make_offer: MakeOffer
) -> None:
    async with two_gateways(start_gateway, heartbeats) as gateways:
        offers = [gateways[number % 2].offer(make_offer(f"t{number}")) for number in range(300)]
        answers = await asyncio.gather(*offers)
    assert {status for status, _ in answers} == {200}
    accepted = {decision["task"]: decision["slot"] for _, decision in answers if decision["accepted"]}
    assert sorted(accepted.values()) == ["a", "b"]
    assert {job.task: job.slot for job in await jobs(bus)} == accepted
    refused = {decision["reason"] for _, decision in answers if not decision["accepted"]}
    assert refused == {"At maximum accuracy capacity (2 jobs for #1)"}


@pytest.mark.fault("F17")
async def test_one_id_offered_to_both_at_once_is_stored_once_and_accepted_by_both(
    bus: Bus, start_gateway: Any, heartbeats: Heartbeats, make_offer: MakeOffer
) -> None:
    async with two_gateways(start_gateway, heartbeats) as gateways:
        for number in range(50):
            task = f"t{number}"
            answers = await asyncio.gather(
                *(api.offer(make_offer(task)) for api in gateways for _ in range(2))
            )
            assert all(decision["accepted"] for _, decision in answers)
            assert len({decision["decided_at"] for _, decision in answers}) == 1
            slot = answers[0][1]["slot"]
            result = Result(record_id="r", task=task, task_id=task, slot=slot, status=ResultStatus.FAILED)
            await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(result))
    assert [job.task for job in await jobs(bus)] == [f"t{number}" for number in range(50)]


@pytest.mark.fault("F3")
async def test_a_broker_that_is_killed_again_and_again_loses_nothing(
    bus: Bus, broker: Broker, api: Any, make_offer: MakeOffer
) -> None:
    """Each task is offered until it is answered; between answers the slot is freed by a result."""
    stopping = asyncio.Event()

    async def kill_again_and_again() -> None:
        while not stopping.is_set():
            await asyncio.sleep(0.3)
            await broker.stop(kill=True)
            await asyncio.sleep(0.2)
            await broker.start()
            await asyncio.sleep(0.7)

    async def free(slot: str, task: str) -> None:
        result = Result(record_id="r", task=task, task_id=task, slot=slot, status=ResultStatus.FAILED)
        while await bus.last(subjects.state_stream(slot), subjects.state(slot, task)) is None:
            await bus.append(
                subjects.state_stream(slot), subjects.state(slot, task), encode(result), last_on_subject=0
            )

    killer = asyncio.create_task(kill_again_and_again())
    accepted: list[Any] = []
    unavailable = 0
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        task = f"t{len(accepted)}"
        status, body = await api.offer(make_offer(task))
        assert status in (200, 503), body
        if status == 503:
            unavailable += 1
            assert "retry" in body["detail"]
        elif body["accepted"]:
            accepted.append(task)
            while True:
                with suppress(Exception):
                    await free(body["slot"], task)
                    break
                await asyncio.sleep(0.05)
        else:
            assert "no free and live slot" in body["reason"]  # no heartbeats were received while it was down
        await asyncio.sleep(0.01)
    stopping.set()
    await killer
    assert unavailable > 0
    assert len(accepted) > 5
    await api.until_ready()
    assert [job.task for job in await jobs(bus)] == accepted


async def test_a_gateway_that_starts_first_waits_for_nats(
    bus: Bus, broker: Broker, start_gateway: Any, heartbeats: Heartbeats, make_offer: MakeOffer
) -> None:
    heartbeats("a", "b")
    await broker.stop(kill=True)
    async with start_gateway(nats_connect_timeout_s=0.3) as api:
        assert (await api.get("/healthz"))[0] == 200
        status, body = await api.get("/readyz")
        assert (status, body["title"]) == (503, "Service Unavailable")
        assert "not connected to NATS at" in body["detail"]
        async with api.client.post("/v1/offers", json=make_offer("one")) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert response.content_type == "application/problem+json"
        await broker.start()
        await api.until_ready()
        await api.until_live("a", "b")
        assert (await api.offer(make_offer("one")))[1]["accepted"] is True


async def test_a_restarted_gateway_rebuilds_everything_from_the_logs(
    bus: Bus, start_gateway: Any, heartbeats: Heartbeats, make_offer: MakeOffer
) -> None:
    heartbeats("a", "b")
    async with start_gateway() as api:
        await api.until_ready()
        await api.until_live("a", "b")
        decisions = [(await api.offer(make_offer(name)))[1] for name in ("one", "a.b")]
        claimed = Claimed(record_id="r", task="one", slot="a", node="n", epoch=3, attempt=1)
        await bus.append(subjects.state_stream("a"), subjects.state("a", "one"), encode(claimed))
        await api.until("/v1/tasks/one", lambda body: body["state"] == "running")
        _, before = await api.get("/v1/tasks")
    async with start_gateway() as api:
        await api.until_ready()
        assert (await api.get("/v1/tasks"))[1] == before
        assert [(await api.offer(make_offer(name)))[1] for name in ("one", "a.b")] == decisions
        assert (await api.offer(make_offer("new")))[1]["accepted"] is False


@pytest.mark.fault("F14")
async def test_records_that_can_not_be_read_stop_nothing(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    await bus.append(subjects.JOBS_STREAM, "podium.jobs.a.bad", b"not json")
    await bus.append(subjects.JOBS_STREAM, "podium.jobs.a.bad.worse", b"{}")
    await bus.append(subjects.state_stream("a"), "podium.state.a.bad", b'{"kind": "claimed"}')
    await bus.append(subjects.state_stream("a"), "podium.state.a.no.where", b"")
    await bus.publish("podium.heartbeats.a", b"[]")
    await bus.publish("podium.progress.a.bad", b"\xff")
    assert (await api.offer(make_offer("one")))[1]["accepted"] is True
    status, body = await api.offer(make_offer("bad"))  # its place in the log is taken for ever
    assert status == 503
    assert "could not be stored in 8 tries" in body["detail"]
    assert (await api.offer(make_offer("two")))[1]["accepted"] is True


async def test_a_job_whose_newest_state_can_not_be_read_says_so_until_it_is_cancelled(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    slot = (await api.offer(make_offer("one")))[1]["slot"]
    await bus.append(subjects.state_stream(slot), subjects.state(slot, "one"), b"\0\0\0")
    view = await api.until("/v1/tasks/one", lambda body: body.get("damaged"))
    assert view["state"] == "queued"
    (busy,) = [each for each in (await api.get("/v1/slots"))[1]["slots"] if each["slot"] == slot]
    assert busy["damaged"] == view["damaged"]
    async with api.client.post("/v1/tasks/one/cancel", json={}) as response:
        assert response.status == 200
    view = (await api.get("/v1/tasks/one"))[1]
    assert (view["state"], view["damaged"]) == ("cancelled", None)


async def test_overdue_jobs_expire_once_but_never_after_submitting(bus: Bus, start_gateway: Any) -> None:
    for task, slot, in_s in (("late", "a", -5.0), ("submitting", "b", -5.0), ("early", "a", 60.0)):
        await bus.append(subjects.JOBS_STREAM, subjects.job(slot, task), encode(job_due(task, slot, in_s)))
    await bus.append(subjects.state_stream("a"), subjects.state("a", "late"), encode(claimed("late", "a")))
    last = encode(submitting("submitting", "b"))
    await bus.append(subjects.state_stream("b"), subjects.state("b", "submitting"), last)
    async with start_gateway("one", expire_after_s=0.2) as first, start_gateway("two", expire_after_s=0.2):
        view = await first.until("/v1/tasks/late", lambda body: body.get("state") == "expired")
        assert "after the deadline" in view["result"]["reason"]
        await asyncio.sleep(1.0)
        assert (await first.get("/v1/tasks/submitting"))[1]["state"] == "submitting"
        assert (await first.get("/v1/tasks/early"))[1]["state"] == "queued"
    records = [record for slot in "ab" for record in await bus.read(subjects.state_stream(slot), 0)]
    results = [record for record in records if isinstance(decode_state_record(record.data), Result)]
    assert [record.subject for record in results] == ["podium.state.a.late"]


class DeafProxy:
    """Between gateway and broker; after a job went through it swallows all answers for `deaf_s`."""

    def __init__(self, target: int, deaf_s: float) -> None:
        self.port = free_port()
        self.swallowed = 0
        self._target = target
        self._deaf_s = deaf_s
        self._deaf_until = 0.0

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._there(reader, upstream_writer), self._back(upstream_reader, writer))

    async def _there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if b"HPUB podium.jobs." in data:
                self._deaf_until = time.monotonic() + self._deaf_s
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if time.monotonic() < self._deaf_until:
                self.swallowed += len(data)
                continue
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.mark.fault("F8")
@pytest.mark.parametrize(("deaf_s", "first_status"), [(0.5, 200), (4.0, 503)])
async def test_a_job_whose_confirmation_was_lost_is_stored_once(
    bus: Bus,
    broker: Broker,
    start_gateway: Any,
    heartbeats: Heartbeats,
    make_offer: MakeOffer,
    deaf_s: float,
    first_status: int,
) -> None:
    heartbeats("a", "b")
    proxy = DeafProxy(broker.port, deaf_s)
    server = await proxy.serve()
    async with start_gateway(nats_url=f"nats://127.0.0.1:{proxy.port}", heartbeat_missing_s=60.0) as api:
        await api.until_ready()
        await api.until_live("a", "b")
        begun = time.monotonic()
        status, _ = await api.offer(make_offer("one"))
        assert time.monotonic() - begun < 3.0  # upstream waits no longer
        assert status == first_status
        assert proxy.swallowed > 0
        assert [job.task for job in await jobs(bus)] == ["one"]
        while status != 200:
            status, _ = await api.offer(make_offer("one"))
        assert len(await jobs(bus)) == 1
        assert (await api.offer(make_offer("one")))[1]["accepted"] is True
    server.close()
    await server.wait_closed()


async def test_without_a_broker_an_offer_is_refused_at_once_and_not_stored_later(
    bus: Bus, broker: Broker, api: Any, make_offer: MakeOffer
) -> None:
    await broker.stop(kill=True)
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    status, body = await api.offer(make_offer("ghost"))
    assert (status, body["title"]) == (503, "Service Unavailable")
    assert time.monotonic() - begun < 10.0  # an outage of any length must not be waited out
    assert (await api.get("/healthz"))[0] == 200
    assert (await api.get("/v1/tasks"))[0] == 200
    await broker.start()
    await api.until_ready()
    await asyncio.sleep(0.3)
    assert await jobs(bus) == []


async def test_a_connection_that_is_closed_for_good_ends_the_service(
    bus: Bus, gateway_settings: Callable[..., Settings]
) -> None:
    settings = gateway_settings()

    async def lose_nats_for_good() -> None:
        async with running(settings, listening_socket(settings, {})) as (service, work):
            while service.why_not_ready():
                await asyncio.sleep(0.01)
            await (await service.started()).bus.client.close()
            await asyncio.wait({work}, timeout=5)

    with pytest.raises(BusUnavailableError, match="closed for good"):
        await lose_nats_for_good()


async def test_a_client_that_goes_away_changes_nothing(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    timeout = aiohttp.ClientTimeout(total=0.0005)
    for number in range(20):
        with suppress(TimeoutError, aiohttp.ClientError):
            await api.client.post("/v1/offers", json=make_offer(f"t{number}"), timeout=timeout)
    answers = [(await api.offer(make_offer(f"t{number}")))[1] for number in range(20)]
    accepted = sorted(decision["task"] for decision in answers if decision["accepted"])
    assert sorted(job.task for job in await jobs(bus)) == accepted
    assert len(accepted) == 2
