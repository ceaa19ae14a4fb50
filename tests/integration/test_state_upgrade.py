"""The upgrade of a real broker with one log of all states: nothing is lost, wherever it is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg

from gateway.state.ledger import Ledger
from podium.local import nats_server
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker import state_upgrade
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.jetstream import Record
from shared.broker.stream_requests import create_stream, find_stream, update_stream
from shared.broker.stream_specs import state_log
from shared.broker.streams import bootstrap
from shared.errors import BusError, BusUnavailableError, ConflictError, IncompatibleStreamError
from shared.messages.encoding import encode
from shared.settings import Settings
from tests.integration.old_states import (
    EPOCH,
    JOBS,
    OLD,
    STATE_A,
    STATE_B,
    STATE_C,
    Cut,
    act_before,
    interrupt,
    make_old,
    must_be_upgraded,
    of_slot,
    old_config,
    until_answered,
)
from tests.log_records import submitting


def fold(logs: dict[str, list[Record]]) -> Ledger:
    ledger = Ledger()
    for stream, records in logs.items():
        for record in records:
            ledger.apply(stream, record)
    return ledger


def told(ledger: Ledger) -> Any:
    chains = {task.record.task: ledger.chain_of(task.record) for task in ledger.tasks()}
    return chains, ledger.open_jobs(), ledger.malformed


async def test_records_keep_their_places_and_times_and_chains_go_on(empty: Bus, settings: Settings) -> None:
    old = await make_old(empty, settings)
    jobs = await empty.read(JOBS, 0)
    made = await bootstrap(empty, settings)
    assert made[:3] == [STATE_A, STATE_B, STATE_C]
    await must_be_upgraded(empty, settings, old)
    assert await find_stream(empty, OLD) is None
    logs = {name: await empty.read(name, 0) for name in (JOBS, STATE_A, STATE_B, STATE_C)}
    assert told(fold(logs)) == told(fold({JOBS: jobs, OLD: old}))

    last = await empty.last(STATE_B, subjects.state("b", "two"))
    assert last is not None
    with pytest.raises(ConflictError):
        await empty.append(STATE_B, last.subject, b"{}", last_on_subject=0)
    following = encode(submitting("two", "b", EPOCH))
    stored = await empty.append(STATE_B, last.subject, following, last_on_subject=last.sequence)
    assert stored > max(record.sequence for record in of_slot(old, "b"))


async def test_an_old_log_without_records_becomes_new_ones(empty: Bus, settings: Settings) -> None:
    await create_stream(empty, old_config(settings))
    assert {STATE_A, STATE_B} < set(await bootstrap(empty, settings))
    assert await find_stream(empty, OLD) is None
    assert await empty.append(STATE_A, subjects.state("a", "t"), b"{}", last_on_subject=0) == 1


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("number", range(1, 9))  # freeze, three copies, three promotions, delete
async def test_an_upgrade_that_was_cut_off_is_ended_by_the_next_one(
    number: int,
    sent: bool,
    empty: Bus,
    broker: Broker,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = await make_old(empty, settings)
    with monkeypatch.context() as patched:
        interrupt(empty, number, sent=sent, monkeypatch=patched)
        with pytest.raises(Cut):
            await bootstrap(empty, settings)
    await broker.stop(kill=True)
    await broker.start()
    await until_answered(lambda: bootstrap(empty, settings))
    await must_be_upgraded(empty, settings, old)
    assert await find_stream(empty, OLD) is None


async def test_several_services_may_upgrade_at_the_same_time(empty: Bus, settings: Settings) -> None:
    old = await make_old(empty, settings)
    others = [await connect(settings, name="test") for _ in range(3)]
    await asyncio.gather(*(until_answered(partial(bootstrap, bus, settings)) for bus in others))
    await must_be_upgraded(empty, settings, old)
    assert await find_stream(empty, OLD) is None
    for bus in others:
        await bus.close()


@pytest.mark.parametrize(
    "request_", ["UPDATE.STATE", "CREATE.STATE-c", "MSG.GET.STATE", "UPDATE.STATE-b", "DELETE.STATE"]
)
async def test_a_service_that_is_slower_than_another_one_goes_on(
    request_: str, empty: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not fail, however late it is: services try again for `nats_connect_timeout_s` only."""
    old = await make_old(empty, settings)
    late = await connect(settings, name="test")
    subject = f"$JS.API.STREAM.{request_}"
    ended = act_before(late, subject, lambda: bootstrap(empty, settings), monkeypatch)
    try:
        await bootstrap(late, settings)
    finally:
        await late.close()
    assert ended
    await must_be_upgraded(empty, settings, old)
    assert await find_stream(empty, OLD) is None


async def test_a_copy_that_was_begun_after_the_old_log_had_gone_is_a_log(
    empty: Bus, settings: Settings
) -> None:
    """A service that read of STATE before another ended the upgrade makes a copy of nothing."""
    copy = state_log(settings, "a").config | {
        "mirror": {"name": OLD, "filter_subject": subjects.states_of_slot("a")}
    }
    del copy["subjects"]
    await create_stream(empty, copy)
    await bootstrap(empty, settings)
    assert await empty.append(STATE_A, subjects.state("a", "t"), b"{}", last_on_subject=0) == 1


async def test_a_copy_that_differs_is_never_taken_for_the_log(
    empty: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await make_old(empty, settings)
    wrong = Record(1, "podium.state.a.one", b"{}", "then")

    async def other(bus: Bus, stream: str, *place: Any) -> AsyncIterator[Record]:
        if stream == OLD:
            yield wrong

    with monkeypatch.context() as patched:
        patched.setattr(state_upgrade, "_records", other)
        with pytest.raises(BusError, match="STATE-a differs from STATE at 1: nothing was deleted"):
            await bootstrap(empty, settings)
    found = await find_stream(empty, OLD)
    assert found is not None
    assert found.messages == len(old)
    await bootstrap(empty, settings)
    await must_be_upgraded(empty, settings, old)


async def test_a_log_that_lacks_records_keeps_the_old_one(empty: Bus, settings: Settings) -> None:
    """Nobody makes such a log; if somebody did, STATE must not go."""
    await make_old(empty, settings)
    await create_stream(empty, state_log(settings, "a").config | {"subjects": ["elsewhere"]})
    with pytest.raises(BusError, match="STATE-a differs from STATE at 5: nothing was deleted"):
        await bootstrap(empty, settings)
    assert await find_stream(empty, OLD) is not None


async def test_a_copy_that_does_not_grow_is_reported(
    empty: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await make_old(empty, settings)
    monkeypatch.setattr(state_upgrade, "STILL_S", 0.2)

    async def ahead(bus: Bus, slot: str) -> int:
        return 99

    with monkeypatch.context() as patched:
        patched.setattr(state_upgrade, "_newest", ahead)
        with pytest.raises(BusUnavailableError, match=r"STATE-a has \d+ of 99 records of STATE"):
            await bootstrap(empty, settings)
    await bootstrap(empty, settings)
    await must_be_upgraded(empty, settings, old)


async def test_a_record_that_the_broker_stores_after_the_freeze_is_copied_too(
    empty: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have taken the record before."""
    await make_old(empty, settings)
    newest = state_upgrade._newest

    async def late(bus: Bus, slot: str) -> int:
        if slot == "c":  # the other slots' copies were compared
            frozen = old_config(settings) | {"subjects": [state_upgrade.FROZEN], "allow_direct": False}
            await update_stream(bus, frozen | {"subjects": [subjects.ANY_STATE]})
            await bus.append(OLD, subjects.state("a", "one"), encode(submitting("one", "a", EPOCH)))
            await update_stream(bus, frozen)
        return await newest(bus, slot)

    with monkeypatch.context() as patched:
        patched.setattr(state_upgrade, "_newest", late)
        with pytest.raises(BusUnavailableError, match="STATE has changed while it was copied"):
            await bootstrap(empty, settings)
    await bootstrap(empty, settings)
    (*_, last) = await empty.read(STATE_A, 0)
    assert last.data == encode(submitting("one", "a", EPOCH))
    assert await find_stream(empty, OLD) is None


async def test_what_was_compared_is_not_compared_again(
    empty: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STATE stays where it has records of no slot, and each start of a service looks at it."""
    await make_old(empty, settings, "podium.state.nowhere")
    for number in range(5):
        await empty.append(OLD, subjects.state("b", f"more{number}"), b"{}")
    await bootstrap(empty, settings)
    request, read = empty.request, 0

    async def counted(subject: str, *args: Any, **kwargs: Any) -> Msg:
        nonlocal read
        read += subject.startswith("$JS.API.STREAM.MSG.GET")
        return await request(subject, *args, **kwargs)

    monkeypatch.setattr(empty, "request", counted)
    await empty.append(STATE_A, subjects.state("a", "new"), b"{}", last_on_subject=0)
    read = 0
    await bootstrap(empty, settings)
    assert read == 3 * 4  # of each slot the newest record, in STATE again and in the log, and no more


async def test_records_of_no_slot_keep_the_old_log(empty: Bus, settings: Settings) -> None:
    old = await make_old(empty, settings, "podium.state.nowhere", "podium.state.sl!ot.t")
    for _ in range(2):
        await bootstrap(empty, settings)
        await must_be_upgraded(empty, settings, old)
        found = await find_stream(empty, OLD)
        assert found is not None
        assert found.messages == len(old)
    await empty.append(STATE_A, subjects.state("a", "new"), b"{}", last_on_subject=0)
    assert await bootstrap(empty, settings) == []
    assert len(await empty.read(STATE_A, 0)) == len(of_slot(old, "a")) + 1


async def test_a_stream_of_somebody_else_is_left_alone(empty: Bus, settings: Settings) -> None:
    await create_stream(empty, {"name": OLD, "subjects": ["mine.>"], "storage": "file"})
    with pytest.raises(IncompatibleStreamError, match=r"STATE exists with subjects=\['mine.>'\]"):
        await bootstrap(empty, settings)


async def test_a_broker_without_room_for_the_copies_keeps_the_records_until_it_has_more(
    empty: Bus, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(settings, log_max_bytes=3_000_000_000)  # twice that fit the store's 8 GB, three times not
    old = await make_old(empty, large)
    for _ in range(2):
        with pytest.raises(BusError, match="STATE-a can't be created: insufficient storage resources"):
            await bootstrap(empty, large)
    await broker.stop()
    monkeypatch.setattr(nats_server, "CONFIG", nats_server.CONFIG.replace("8GB", "80GB"))
    await broker.start()
    await until_answered(lambda: bootstrap(empty, large))
    await must_be_upgraded(empty, large, old)
