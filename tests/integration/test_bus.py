"""Bus against a real nats-server: compare-and-set, reading, leases, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from podium.local.nats_server import Broker
from shared import subjects
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
