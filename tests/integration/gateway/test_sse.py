"""`/v1/events` over real HTTP: the events, their start, their readers, and the end of a stream."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from gateway.api import sse
from gateway.server import listening_socket, running
from gateway.telemetry import event_sources
from gateway.telemetry.event_log import EventType
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.runs import Phase, Progress
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.test_gateway_api import result_of

MakeOffer = Callable[..., dict[str, Any]]
Event = dict[str, Any]


class Reader:
    """What a browser's EventSource does with a stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""
        self.comments = 0

    async def next(self, *types: str, timeout_s: float = 20) -> Event:
        """The next event, of these types if any are named."""
        async with asyncio.timeout(timeout_s):
            while True:
                event = await self._next()
                if not types or event["event"] in types:
                    return event

    async def _next(self) -> Event:
        event: Event = {}
        while line := (await self._line()):
            name, _, value = line.partition(": ")
            if name == "":
                self.comments += 1
            elif name != "retry":
                event[name] = value
        if not event:
            return await self._next()
        self.last_id = event.get("id", self.last_id)
        return event | {"data": json.loads(event["data"])}

    async def _line(self) -> str:
        line = await self.response.content.readline()
        if not line:
            raise EOFError
        return line.decode().rstrip("\n")


@asynccontextmanager
async def reading(api: Any, query: str = "", **options: Any) -> AsyncIterator[Reader]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with api.client.get(f"/v1/events{query}", timeout=timeout, **options) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        reader = Reader(response)
        assert (await reader.next())["event"] == "hello"
        yield reader


async def say_progress(bus: Bus, step: int, task: str = "one", slot: str = "a", message: str = "") -> None:
    progress = Progress(task=task, slot=slot, phase=Phase.TRAIN, step=step, loss=1.5, message=message or None)
    await bus.publish(subjects.progress(slot, task), encode(progress))


async def test_a_job_is_told_from_offer_to_result_on_every_gateway(
    api: Any, bus: Bus, start_gateway: Any, make_offer: MakeOffer
) -> None:
    async with start_gateway("second") as second:
        await second.until_live("a", "b")
        async with reading(api) as here, reading(second) as there:
            await api.offer(make_offer("one"))
            await api.offer(make_offer("long", hours_to_complete=97))
            await say_progress(bus, 7)
            await result_of(bus, "a", "one")
            for reader in (here, there):
                seen: list[Event] = []
                while sum(event["event"] == "decision" for event in seen) < 2 or len(seen) < 5:
                    seen.append(await reader.next("decision", "task", "progress"))
                tasks = [event["data"] for event in seen if event["event"] == "task"]
                assert [(task["task"], task["state"]) for task in tasks] == [
                    ("one", "queued"),
                    ("one", "submitted"),
                ]
                decisions = [event["data"] for event in seen if event["event"] == "decision"]
                assert [(each["task"], each["accepted"]) for each in decisions] == [
                    ("one", True),
                    ("long", False),
                ]
                (progress,) = [event["data"] for event in seen if event["event"] == "progress"]
                assert (progress["step"], progress["loss"]) == (7, 1.5)
                beat = (await reader.next("heartbeat"))["data"]
                assert beat["node"] == f"node-{beat['slot']}"
        assert here.last_id.partition("-")[0] != there.last_id.partition("-")[0]


async def test_filters_and_what_is_wrong_with_them(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    for task, slot in (("other", "a"), ("a/b", "b")):
        assert (await api.offer(make_offer(task)))[1]["slot"] == slot
    async with reading(api, "?types=progress&task=a%2Fb&slot=b") as reader:
        token = subjects.task_key("a/b")
        await say_progress(bus, 1, "other", "a")
        await say_progress(bus, 2, token, "a")  # not where its job is
        await say_progress(bus, 3, token, "b")
        assert (await reader.next())["data"]["step"] == 3
    for query, field in (
        ("types=music", "types"),
        ("slot=z", "slot"),
        ("after=7", "after"),
        ("after=0123456z-1", "after"),
        ("kind=task", "kind"),
    ):
        status, problem = await api.get(f"/v1/events?{query}")
        assert (status, problem["field"]) == (400, field), query


async def test_a_reader_goes_on_where_it_was(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    await api.offer(make_offer("one"))
    async with reading(api, "?types=progress") as reader:
        await say_progress(bus, 1)
        assert (await reader.next())["data"]["step"] == 1
    for step in (2, 3):
        await say_progress(bus, step)
    await bus.client.flush()
    await asyncio.sleep(0.3)
    async with reading(api, "?types=progress", headers={"Last-Event-ID": reader.last_id}) as again:
        assert [(await again.next())["data"]["step"] for _ in range(2)] == [2, 3]
    async with reading(api, f"?types=progress&after={reader.last_id}") as again:
        assert (await again.next())["data"]["step"] == 2
    async with reading(api, "?types=progress&after=0") as again:
        assert [(await again.next())["data"]["step"] for _ in range(3)] == [1, 2, 3]


async def test_another_life_says_reset_and_goes_on(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    await api.offer(make_offer("one"))
    for strange in ("01234567-3", "fedcba98-0"):
        async with reading(api, "?types=progress", headers={"Last-Event-ID": strange}) as reader:
            reset = await reader.next()
            assert reset["event"] == "reset"
            assert "from before this gateway started" in reset["data"]["reason"]
            await say_progress(bus, 1)
            assert (await reader.next())["data"]["step"] == 1


async def test_a_slow_reader_is_told_what_it_missed_and_costs_no_memory(
    bus: Bus, gateway_settings: Any
) -> None:
    settings = gateway_settings()
    listening = listening_socket(settings, {})
    port = listening.getsockname()[1]
    async with running(settings, listening) as (service, _):
        log = service.events
        log._most_events, log._most_bytes = 200, 4 << 20
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        narrow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=narrow, limit=1 << 24)
        writer.write(b"GET /v1/events?types=progress HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"hello" in await reader.readuntil(b"event: hello")
        for number in range(3000):
            log.add(EventType.PROGRESS, b'{"text": "%s"}' % (b"x" * 4_000), task="one", slot="a")
            if number % 50 == 0:
                await asyncio.sleep(0)
        assert len(log._events) <= 200
        assert log._bytes <= 4 << 20
        async with asyncio.timeout(30):
            text = await reader.readuntil(b"id: %s-3000\n" % log.boot.encode())
        writer.close()
        ids = [int(line.rpartition(b"-")[2]) for line in text.splitlines() if line.startswith(b"id: ")]
        lost = [int(count) for count in re.findall(rb'"count":(\d+)', text)]
        assert lost
        assert sum(lost) + len(ids) == 3000
        assert ids == sorted(set(ids))
        assert log.lost == sum(lost)


async def test_one_that_reads_nothing_is_let_go(
    bus: Bus, gateway_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STUCK_S", 0.3)
    settings = gateway_settings()
    listening = listening_socket(settings, {})
    async with running(settings, listening) as (service, _):
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"event: hello")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            while service.events.readers:
                service.events.add(EventType.PROGRESS, b'"%s"' % (b"x" * 1_000_000))
                await asyncio.sleep(0.01)
        writer.close()


async def test_a_quiet_stream_shows_that_it_lives(
    bus: Bus, start_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "ALIVE_S", 0.1)
    async with start_gateway() as api, reading(api) as reader:
        assert await reader._line() == ": alive"


async def test_a_link_that_was_down_is_a_gap(api: Any, bus: Bus, broker: Broker) -> None:
    async with reading(api, "?types=progress") as reader:
        await broker.stop(kill=True)
        await broker.start()
        lost = await reader.next("lost")
        assert (lost["data"]["count"], "cut off" in lost["data"]["reason"]) == (None, True)
        assert lost["id"]


async def test_decisions_are_heard_while_somebody_reads(
    bus: Bus, gateway_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sources, "KEEP_S", 0.2)
    monkeypatch.setattr(sse, "ALIVE_S", 0.1)  # that is when it is seen that a reader has left
    settings = gateway_settings()
    listening = listening_socket(settings, {})
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with running(settings, listening) as (service, _), aiohttp.ClientSession(url) as client:
        await Api(client).until_ready()
        said = b'{"task": "t", "slot": null}'
        for times in (1, 2):
            async with reading(Api(client), "?types=decision") as reader:
                await bus.publish(subjects.decision("t"), said)
                assert (await reader.next())["data"]["task"] == "t"
            async with asyncio.timeout(20):
                while service.events.readers or service.event_sources._subscribed.is_set():
                    service.events.add(EventType.HEARTBEAT, b"{}")  # not chosen: the stream is quiet
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)  # the end of the subscription comes over another connection
            known = service.events.counts["decision"]
            await bus.publish(subjects.decision("t"), said)
            for _ in range(2):  # the library's first ping overtakes it
                await bus.client.flush()
            await asyncio.sleep(0.2)
            assert service.events.counts["decision"] == known
            assert service.events.counts["lost"] == times  # a reader that reconnects gets it


async def test_a_decision_that_is_none_is_counted(bus: Bus, gateway_settings: Any) -> None:
    settings = gateway_settings()
    listening = listening_socket(settings, {})
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    async with running(settings, listening) as (service, _), aiohttp.ClientSession(url) as client:
        await Api(client).until_ready()
        async with reading(Api(client), "?types=decision"), asyncio.timeout(20):
            while not service.presence.malformed:
                await bus.publish(subjects.decision("t"), b"no json")
                await asyncio.sleep(0.05)


async def test_as_many_streams_as_may_be(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MOST_READERS", 1)
    async with reading(api):
        status, problem = await api.get("/v1/events")
        assert (status, problem["type"]) == (503, "urn:podium:problem:busy")
