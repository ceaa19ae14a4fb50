"""Many who wait for the logs' end share one reading of them, and its failure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.stream_requests import create_stream
from shared.broker.stream_specs import state_log
from shared.errors import BusError
from shared.messages.encoding import encode
from shared.messages.jobs import Job
from shared.messages.offers import Decision, Offer, TaskType
from shared.settings import Settings

MANY = 300


async def turns_until(done: asyncio.Future[Any]) -> int:
    """Turns of the loop from the first end among many until all have ended."""
    count = 0
    while not done.done():
        await asyncio.sleep(0)
        count += 1
    return count


async def test_all_who_wait_go_on_in_the_same_moment(bus: Bus) -> None:
    reader = LogReader(bus, Ledger(), poll_s=60.0)
    first = asyncio.create_task(reader.catch_up())
    await asyncio.sleep(0)  # it has begun, so that those after it need another one
    waiting = [asyncio.create_task(reader.catch_up()) for _ in range(MANY)]
    await first
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert await turns_until(asyncio.gather(*waiting)) < MANY / 10
    assert reader.current


async def test_all_who_wait_learn_that_it_failed(broker: Broker, bus: Bus) -> None:
    reader = LogReader(bus, Ledger(), poll_s=60.0)
    await reader.catch_up()
    await broker.stop(kill=True)
    ends = await asyncio.gather(*(reader.catch_up() for _ in range(MANY)), return_exceptions=True)
    assert all(isinstance(end, BusError) for end in ends)
    await broker.start()
    async with asyncio.timeout(20):
        while True:
            try:
                await reader.catch_up()
                break
            except BusError:
                await asyncio.sleep(0.1)
    assert reader.current


async def test_a_gateway_says_that_the_log_of_a_removed_slot_is_gone(
    bus: Bus, settings: Settings, start_gateway: Any
) -> None:
    """It decides nothing: without that log the slot's tasks would look as if they had not ended."""
    job = Job(
        record_id="j",
        task_id="t",
        task="t",
        slot="gone",
        gateway="g",
        offer=Offer(task_id="t", task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1, dataset="d"),
        decision=Decision(task_id="t", task="t", accepted=True, reason=""),
        received_at=0.0,
        deadline_at=4e9,
    )
    await bus.append(subjects.JOBS_STREAM, subjects.job("gone", "t"), encode(job))
    async with start_gateway() as api:
        body = await api.until("/readyz", lambda body: "STATE-gone" in body.get("detail", ""))
        assert "chains of slot gone" in body["detail"]
        assert "`podium restore`" in body["detail"]
        await create_stream(bus, state_log(settings, "gone").config)
        await api.until_ready()


async def test_one_who_gives_up_in_the_middle_is_no_end_for_later_ones(bus: Bus) -> None:
    reader = LogReader(bus, Ledger(), poll_s=60.0)
    first = asyncio.create_task(reader.catch_up())
    await asyncio.sleep(0)
    later = [asyncio.create_task(reader.catch_up()) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await asyncio.gather(*later)
    assert reader.current


async def test_who_has_no_time_left_takes_nobody_with_it(bus: Bus) -> None:
    """The one that folds is cut short; those who wait for its very fold go on with one of their own."""
    reader = LogReader(bus, Ledger(), poll_s=60.0)
    first = asyncio.create_task(reader.catch_up())
    await asyncio.sleep(0)
    folds = asyncio.create_task(reader.catch_up())  # waits for the first's end, then folds
    waiting = [asyncio.create_task(reader.catch_up()) for _ in range(3)]
    while reader._begun < 2:
        await asyncio.sleep(0)
    assert first.done()
    folds.cancel()
    with pytest.raises(asyncio.CancelledError):
        await folds
    await asyncio.gather(*waiting)
    assert reader.current
