"""Bus against a real nats-server: compare-and-set, reading, leases, restarts."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from nats.aio.client import Client

from podium.local.nats_server import Broker
from shared import subjects
from shared.broker import bus as bus_module
from shared.broker import connection
from shared.broker.bus import READ_BATCH, Bus
from shared.broker.connection import connect
from shared.broker.streams import bootstrap
from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConflictError,
    IncompatibleStreamError,
)
from shared.settings import Settings
from tests.integration.lossy_link import lossy_link

JOBS = subjects.JOBS_STREAM


async def test_append_and_read_back_in_order(bus: Bus) -> None:
    for number in range(3):
        assert await bus.append(JOBS, subjects.job("a", f"t{number}"), b"%d" % number) == number + 1
    records = await bus.read(JOBS, after=1)
    assert [(r.sequence, r.subject, r.data) for r in records] == [
        (2, "podium.jobs.a.t1", b"1"),
        (3, "podium.jobs.a.t2", b"2"),
    ]
    assert await bus.read(JOBS, after=3) == []


async def test_read_comes_in_batches(bus: Bus) -> None:
    for number in range(READ_BATCH + 10):
        await bus.append(JOBS, subjects.job("a", f"t{number}"), b"x")
    first = await bus.read(JOBS, after=0)
    assert len(first) == READ_BATCH
    assert len(await bus.read(JOBS, after=first[-1].sequence)) == 10
    batches = [records async for records in bus.read_all(JOBS)]
    assert [len(records) for records in batches] == [READ_BATCH, 10]
    assert [record.sequence for records in batches for record in records] == list(range(1, READ_BATCH + 11))
    assert [records async for records in bus.read_all(JOBS, READ_BATCH + 10)] == []


async def test_read_all_reads_one_subject_from_a_sequence_on(bus: Bus) -> None:
    for number in range(6):
        await bus.append(JOBS, subjects.job("ab"[number % 2], f"t{number}"), b"x")
    one = bus.read_all(JOBS, 2, subject=subjects.jobs_of_slot("a"))
    assert [[record.sequence for record in records] async for records in one] == [[3, 5]]


async def test_last_takes_wildcards_and_finds_nothing_quietly(bus: Bus) -> None:
    assert await bus.last(JOBS, subjects.jobs_of_slot("a")) is None
    await bus.append(JOBS, subjects.job("a", "one"), b"1")
    await bus.append(JOBS, subjects.job("a", "two"), b"2")
    await bus.append(JOBS, subjects.job("b", "three"), b"3")
    record = await bus.last(JOBS, subjects.jobs_of_slot("a"))
    assert record is not None
    assert (record.subject, record.data, record.sequence) == ("podium.jobs.a.two", b"2", 2)


async def test_expected_last_sequence_of_the_stream_refuses_the_slower(bus: Bus) -> None:
    await bus.append(JOBS, subjects.job("a", "one"), b"1", last=0)
    with pytest.raises(ConflictError):
        await bus.append(JOBS, subjects.job("a", "two"), b"2", last=0)
    assert len(await bus.read(JOBS, after=0)) == 1


async def test_a_task_is_unique_across_slots(bus: Bus) -> None:
    pattern = subjects.job_on_any_slot("same")
    await bus.append(JOBS, subjects.job("a", "same"), b"1", last=0, last_on_subject=0, pattern=pattern)
    with pytest.raises(ConflictError):
        await bus.append(JOBS, subjects.job("b", "same"), b"2", last=1, last_on_subject=0, pattern=pattern)


async def test_of_many_writers_with_one_expectation_one_wins(bus: Bus) -> None:
    async def write(number: int) -> bool:
        try:
            await bus.append(JOBS, subjects.job("a", f"t{number}"), b"x", last=0)
        except ConflictError:
            return False
        return True

    assert sum(await asyncio.gather(*(write(number) for number in range(50)))) == 1


async def test_a_lease_expires_and_its_revision_goes_on(bus: Bus) -> None:
    key, stream = subjects.lease("a"), subjects.LEASES_STREAM
    first = await bus.append(stream, key, b"one", last_on_subject=0, ttl_s=1)
    with pytest.raises(ConflictError):
        await bus.append(stream, key, b"two", last_on_subject=0, ttl_s=1)
    renewed = await bus.append(stream, key, b"one", last_on_subject=first, ttl_s=1)
    await asyncio.sleep(1.6)
    assert await bus.last(stream, key) is None
    assert await bus.append(stream, key, b"two", last_on_subject=0, ttl_s=1) > renewed


async def test_what_is_stored_survives_kill_9_and_the_bus_comes_back(bus: Bus, broker: Broker) -> None:
    back = asyncio.Event()
    bus.on_reconnect(back.set)
    await bus.append(JOBS, subjects.job("a", "one"), b"1")
    await broker.stop(kill=True)
    with pytest.raises((BusUnavailableError, BusTimeoutError)):
        await bus.append(JOBS, subjects.job("a", "two"), b"2", last=1, timeout_s=0.5)
    await broker.start()
    await asyncio.wait_for(back.wait(), 60)
    assert [r.data for r in await bus.read(JOBS, after=0)] == [b"1"]
    assert await bus.append(JOBS, subjects.job("a", "two"), b"2", last=1) == 2


async def test_publishing_while_disconnected_fails_at_once_and_leaves_no_ghost(
    bus: Bus, broker: Broker
) -> None:
    await broker.stop(kill=True)
    while bus.connected:
        await asyncio.sleep(0.01)
    with pytest.raises(BusUnavailableError):
        await bus.append(JOBS, subjects.job("a", "ghost"), b"1")
    back = asyncio.Event()
    bus.on_reconnect(back.set)
    await broker.start()
    await asyncio.wait_for(back.wait(), 60)
    await asyncio.sleep(0.2)
    assert await bus.read(JOBS, after=0) == []


async def test_an_append_whose_link_is_lost_ends_when_the_link_is_back(
    bus: Bus, broker: Broker, make_settings: Callable[..., Settings]
) -> None:
    """Who asked can then read at once whether it is stored."""
    async with lossy_link(broker.url) as link, asyncio.timeout(60):
        behind = await connect(make_settings(nats_url=link.url), name="test")
        link.deaf = True
        lost = asyncio.create_task(behind.append(JOBS, subjects.job("a", "one"), b"1", timeout_s=1e4))
        while not (stored := await bus.read(JOBS, after=0)):
            await asyncio.sleep(0.01)
        link.cut()
        with pytest.raises(BusTimeoutError, match=r"no answer on .* before the link was lost"):
            await lost
        assert await behind.read(JOBS, after=0) == stored
        await behind.close()


@pytest.mark.parametrize("close", [False, True])
async def test_a_read_whose_link_is_lost_ends_too(
    close: bool, bus: Bus, broker: Broker, make_settings: Callable[..., Settings]
) -> None:
    async with lossy_link(broker.url) as link, asyncio.timeout(60):
        behind = await connect(make_settings(nats_url=link.url), name="test")
        await behind.last(JOBS, subjects.ANY_JOB)
        link.deaf = True
        lost = asyncio.create_task(behind.read(JOBS, after=0, timeout_s=1e4))
        await asyncio.sleep(0.1)
        if close:
            await behind.close()
        else:
            link.cut()
        with pytest.raises(BusTimeoutError, match="reading JOBS: no answer before the link was lost"):
            await lost
        await behind.close()


async def test_no_server_is_a_clear_error(make_settings: Callable[..., Settings], broker: Broker) -> None:
    await broker.stop(kill=True)
    with pytest.raises(BusUnavailableError, match="no NATS server answers at"):
        await connect(make_settings(nats_connect_timeout_s=0.3), name="test")


async def test_bootstrap_is_idempotent_also_at_once(bus: Bus, settings: Settings) -> None:
    await asyncio.gather(*(bootstrap(bus, settings) for _ in range(4)))


async def test_bootstrap_refuses_a_stream_that_would_break_a_promise(settings: Settings) -> None:
    bus = await connect(settings, name="test")
    config = b'{"name": "JOBS", "subjects": ["podium.jobs.>"], "storage": "memory", "retention": "workqueue"}'
    await bus.request("$JS.API.STREAM.CREATE.JOBS", config)
    with pytest.raises(IncompatibleStreamError, match="stream JOBS exists with"):
        await bootstrap(bus, settings)
    await bus.close()


async def test_the_logs_can_not_be_purged(bus: Bus) -> None:
    await bus.append(JOBS, subjects.job("a", "one"), b"1")
    reply = await bus.request("$JS.API.STREAM.PURGE.JOBS")
    assert b"error" in reply.data
    assert len(await bus.read(JOBS, after=0)) == 1


async def test_reading_a_stream_that_is_not_there_is_an_error(bus: Bus) -> None:
    with pytest.raises(BusError):
        await bus.last("NOPE", "x")


async def test_a_task_that_is_cancelled_once_ends(bus: Bus) -> None:
    """Cancelled at any moment, also that in which an answer arrives."""

    async def ask_for_ever() -> None:
        while True:
            await bus.last(JOBS, subjects.jobs_of_slot("a"))
            await bus.read(JOBS, after=0)

    for trial in range(100):
        task = asyncio.create_task(ask_for_ever())
        await asyncio.sleep(0.002 + trial * 0.00005)
        task.cancel()
        _, running = await asyncio.wait({task}, timeout=20)
        assert not running, trial


class ClosedTransport:
    """A TLS transport of Python 3.11.2 after its close."""

    _ssl_protocol = None

    def abort(self) -> None:
        raise AttributeError("'NoneType' object has no attribute '_abort'")


async def test_a_link_that_is_closed_already_can_be_dropped() -> None:
    client = SimpleNamespace(
        _transport=SimpleNamespace(_io_writer=SimpleNamespace(transport=ClosedTransport()))
    )
    bus_module.drop_link(cast(Client, client))


@pytest.mark.parametrize("kill", [False, True])
async def test_a_link_whose_broker_hangs_or_died_closes_soon_and_quietly(
    kill: bool, bus: Bus, broker: Broker
) -> None:
    async def ignore(message: Any) -> None:
        pass

    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    await bus.subscribe("some", ignore)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGKILL if kill else signal.SIGSTOP)
    began = time.monotonic()
    await bus.close()
    assert time.monotonic() - began < 8  # 2.2 s; the library alone takes 12
    await asyncio.sleep(0.1)
    gc.collect()
    assert unheard == []


async def test_a_close_that_is_cancelled_leaves_no_open_link(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, reached = bus.client.close, asyncio.Event()
    writer = bus.client._transport._io_writer

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    async def skip() -> None:
        """The library closes the link when it has drained it."""

    monkeypatch.setattr(bus, "_drain", skip)
    monkeypatch.setattr(bus.client, "close", hang)
    closing = asyncio.create_task(bus.close())
    await reached.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert writer.transport.is_closing()
    monkeypatch.setattr(bus.client, "close", close)


async def test_a_connection_that_is_cancelled_leaves_no_open_link(
    settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker hangs after it has accepted the link."""
    closed, close = asyncio.Event(), Bus.close

    async def noted(bus: Bus) -> None:
        await close(bus)
        closed.set()

    monkeypatch.setattr(Bus, "close", noted)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    connecting = asyncio.create_task(connection.connect(settings, name="cancelled"))
    await asyncio.sleep(0.2)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert closed.is_set()


async def test_a_client_that_reconnects_no_more_ends_its_process(
    bus: Bus, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be there, and hear and say nothing, for ever."""

    def fail(client: Client) -> None:
        raise AttributeError("an error of ours in the library's task")

    monkeypatch.setattr(connection, "drop_link", fail)
    await broker.stop(kill=True)
    async with asyncio.timeout(60):
        await bus.closed.wait()


async def test_a_link_that_is_lost_again_while_it_comes_back_ends_no_process(
    bus: Bus, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's older task fails then, and a newer one reconnects."""
    flush, reached, back = bus.client.flush, asyncio.Event(), asyncio.Event()
    bus.on_reconnect(back.set)

    async def hang_once(timeout: float = 10) -> None:
        if not reached.is_set():
            reached.set()
            assert bus.client._reconnection_task_future is not None
            bus.client._reconnection_task_future.set_result(True)  # as a task does that was cancelled before
            await asyncio.Event().wait()
        await flush(timeout)

    monkeypatch.setattr(bus.client, "flush", hang_once)
    async with asyncio.timeout(60):
        for _ in range(2):
            await broker.stop(kill=True)
            await broker.start()
            await reached.wait()
        await back.wait()
    assert bus.connected
    assert not bus.closed.is_set()


async def test_a_link_that_is_reset_right_after_its_greeting_leaves_no_task(
    bus: Bus, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library makes new ones, and would keep both: each pings for ever."""
    greet, reset, back = bus.client._process_connect_init, False, asyncio.Event()
    bus.on_reconnect(back.set)

    async def reset_once() -> None:
        nonlocal reset
        await greet()
        if not reset:
            reset = True
            raise ConnectionResetError

    monkeypatch.setattr(bus.client, "_process_connect_init", reset_once)
    await broker.stop(kill=True)
    await broker.start()
    async with asyncio.timeout(60):
        await back.wait()
    await asyncio.sleep(0.1)
    assert reset
    names = [str(task.get_coro()) for task in asyncio.all_tasks()]
    for name in ("_ping_interval", "_read_loop", "_flusher"):
        assert sum(name in each for each in names) == 1, name
