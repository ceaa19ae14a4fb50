"""The upgrade of a real broker with one log of all states: nothing is lost, wherever it is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg

from gateway.server import listening_socket, running
from gateway.state.ledger import Ledger
from gateway.state.mirror_file import Header, encode_line, read_mirror
from podium.local import nats_server
from podium.local.nats_server import Broker
from podium.local.nats_server import bootstrap as bootstrap_as_admin
from podium.local.restoration import restore
from podium.security.key_files import make_users
from shared import subjects
from shared.broker import state_upgrade
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN, GATEWAY, trainer
from shared.broker.jetstream import Record
from shared.broker.stream_requests import create_stream, find_stream, update_stream
from shared.broker.stream_specs import state_log
from shared.broker.streams import bootstrap, ready
from shared.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConflictError,
    DeniedError,
    IncompatibleStreamError,
    NobodyAnswersError,
)
from shared.messages import Claimed, Decision, Job, Offer, Result, ResultStatus, Submitting, TaskType, encode
from shared.settings import Settings

JOBS, OLD = subjects.JOBS_STREAM, subjects.OLD_STATE_STREAM
STATE_A, STATE_B, STATE_C = map(subjects.state_stream, "abc")
T = TypeVar("T")
LARGE = b"x" * 3_900_000  # nearly the most that the broker takes


@pytest.fixture
async def empty(settings: Settings) -> AsyncIterator[Bus]:
    """Connected to a broker without streams."""
    bus = await connect(settings, name="test")
    yield bus
    await bus.close()


def old_config(settings: Settings) -> dict[str, Any]:
    """The log of states as it was for all slots."""
    return state_log(settings, "a").config | {"name": OLD, "subjects": [subjects.ANY_STATE]}


def job(task: str, slot: str) -> Job:
    return Job(
        record_id=f"job-{task}",
        task_id=task,
        task=task,
        slot=slot,
        gateway="g",
        offer=Offer(task_id=task, task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1.0, dataset="d"),
        decision=Decision(task_id=task, task=task, accepted=True, reason="", slot=slot),
        received_at=0.0,
        deadline_at=4e9,
    )


def claimed(task: str, slot: str) -> Claimed:
    return Claimed(record_id=f"c-{task}", task=task, slot=slot, node="n", epoch=7, attempt=1)


def result(task: str, slot: str) -> Result:
    return Result(record_id=f"r-{task}", task=task, task_id=task, slot=slot, status=ResultStatus.FAILED)


def submitting(task: str, slot: str) -> Submitting:
    return Submitting(record_id=f"s-{task}", task=task, slot=slot, node="n", epoch=7, digest="d")


async def make_old(bus: Bus, settings: Settings, *strays: str) -> list[Record]:
    """Make what a broker of an older version holds; return the records of STATE.

    A job runs on each slot, and slot c, which the settings no longer have, has ended one.
    """
    await create_stream(bus, old_config(settings))
    jobs = state_log(settings, "a").config | {
        "name": JOBS,
        "subjects": [subjects.ANY_JOB, subjects.ANY_RESERVATION],
    }
    await create_stream(bus, jobs)
    for task, slot in (("one", "a"), ("two", "b"), ("gone", "c")):
        await bus.append(JOBS, subjects.job(slot, task), encode(job(task, slot)))
        await bus.append(OLD, subjects.state(slot, task), encode(claimed(task, slot)), last_on_subject=0)
    await bus.append(OLD, subjects.state("c", "gone"), encode(result("gone", "c")))
    await bus.append(OLD, subjects.state("a", "large"), LARGE)
    await bus.append(OLD, "podium.state.b.odd.one", b"no json")
    for subject in strays:
        await bus.append(OLD, subject, b"{}")
    return await bus.read(OLD, 0)


def of_slot(records: list[Record], slot: str) -> list[Record]:
    return [record for record in records if subjects.slot_in(record.subject) == slot]


async def must_be_upgraded(bus: Bus, settings: Settings, old: list[Record]) -> None:
    """Each slot's log has its slot's records under their sequences and times, and is like a new one."""
    for slot in "abc":
        assert await bus.read(subjects.state_stream(slot), 0) == of_slot(old, slot)
        found = await find_stream(bus, subjects.state_stream(slot))
        assert found is not None
        wanted = state_log(settings, slot).config
        assert {name: found.config.get(name) for name in wanted} == wanted
        assert (found.config.get("mirror"), found.config.get("mirror_direct")) == (None, False)
    assert await bootstrap(bus, settings) == []


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
    following = encode(submitting("two", "b"))
    stored = await empty.append(STATE_B, last.subject, following, last_on_subject=last.sequence)
    assert stored > max(record.sequence for record in of_slot(old, "b"))


async def test_an_old_log_without_records_becomes_new_ones(empty: Bus, settings: Settings) -> None:
    await create_stream(empty, old_config(settings))
    assert {STATE_A, STATE_B} < set(await bootstrap(empty, settings))
    assert await find_stream(empty, OLD) is None
    assert await empty.append(STATE_A, subjects.state("a", "t"), b"{}", last_on_subject=0) == 1


class Cut(Exception):
    """The process that upgrades ends here."""


def interrupt(bus: Bus, number: int, *, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process at its `number`th change of a stream: before it is sent, or after that."""
    request, changes = bus.request, 0

    async def cut(subject: str, *args: Any, **kwargs: Any) -> Msg:
        nonlocal changes
        if subject.startswith(("$JS.API.STREAM.CREATE", "$JS.API.STREAM.UPDATE", "$JS.API.STREAM.DELETE")):
            changes += 1
            if changes == number:
                if sent:
                    await request(subject, *args, **kwargs)
                raise Cut
        return await request(subject, *args, **kwargs)

    monkeypatch.setattr(bus, "request", cut)


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


async def until_answered(act: Callable[[], Awaitable[T]]) -> T:
    async with asyncio.timeout(60):
        while True:
            with suppress(BusUnavailableError, BusTimeoutError):
                return await act()
            await asyncio.sleep(0.05)


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
    request, ended = late.request, False

    async def after_the_other(subject: str, *args: Any, **kwargs: Any) -> Msg:
        nonlocal ended
        if subject == f"$JS.API.STREAM.{request_}" and not ended:
            ended = True
            await bootstrap(empty, settings)
        return await request(subject, *args, **kwargs)

    monkeypatch.setattr(late, "request", after_the_other)
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
            await bus.append(OLD, subjects.state("a", "one"), encode(submitting("one", "a")))
            await update_stream(bus, frozen)
        return await newest(bus, slot)

    with monkeypatch.context() as patched:
        patched.setattr(state_upgrade, "_newest", late)
        with pytest.raises(BusUnavailableError, match="STATE has changed while it was copied"):
            await bootstrap(empty, settings)
    await bootstrap(empty, settings)
    (*_, last) = await empty.read(STATE_A, 0)
    assert last.data == encode(submitting("one", "a"))
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


@pytest.mark.parametrize("stage", ["frozen", "copied", "upgraded"])
async def test_a_process_of_an_older_version_is_refused(
    stage: str, empty: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await make_old(empty, settings)
    with monkeypatch.context() as patched:
        if stage != "upgraded":
            interrupt(empty, {"frozen": 2, "copied": 6}[stage], sent=False, monkeypatch=patched)
        with suppress(Cut):
            await bootstrap(empty, settings)
    # A node writes to its chain, reads it, and waits for its streams; a service makes what it misses.
    with pytest.raises(BusError):
        await empty.append(OLD, subjects.state("a", "one"), encode(submitting("one", "a")))
    with pytest.raises(NobodyAnswersError):
        await empty.last(OLD, subjects.state("a", "one"))
    with pytest.raises(BusError, match="reading STATE failed: 503"):
        await empty.read(OLD, 0)
    found = await find_stream(empty, OLD)
    if found is None:
        with pytest.raises(BusError, match="subjects overlap"):
            await create_stream(empty, old_config(settings))
    else:
        assert found.config["subjects"] != [subjects.ANY_STATE]  # an older version refuses such a stream
    await bootstrap(empty, settings)
    await must_be_upgraded(empty, settings, old)


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


def old_mirror(path: Path, jobs: list[Record], old: list[Record]) -> None:
    """Write the mirror that a gateway of an older version has of these logs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [encode_line(JOBS, record) for record in jobs] + [encode_line(OLD, record) for record in old]
    path.write_bytes(encode(Header(1, "g")) + b"\n" + b"".join(lines))


async def test_a_gateway_goes_on_with_the_mirror_of_an_older_version(
    empty: Bus, settings: Settings, tmp_path: Path
) -> None:
    old = await make_old(empty, settings, "podium.state.nowhere")
    path = tmp_path / "data" / "mirror" / "1.jsonl"
    old_mirror(path, await empty.read(JOBS, 0), old)
    before = path.read_bytes()
    async with running(settings, listening_socket(settings, {})) as (service, _):
        async with asyncio.timeout(60):
            while service.why_not_ready() is not None:
                await asyncio.sleep(0.05)
            await empty.append(STATE_A, subjects.state("a", "one"), encode(submitting("one", "a")))
            while read_mirror(path).of(STATE_A)[-1].data != encode(submitting("one", "a")):
                await asyncio.sleep(0.05)
        assert service.ledger.malformed == 2
        task = service.ledger.task("gone")
        assert task is not None
        assert service.ledger.chain_of(task.record).result is not None
    assert path.read_bytes().startswith(before)
    assert list(path.parent.glob("1-*.jsonl")) == []


@pytest.mark.parametrize("there", ["nothing", "a part of the old log"])
async def test_the_mirror_of_an_older_version_is_restored(
    there: str, empty: Bus, broker: Broker, settings: Settings, tmp_path: Path
) -> None:
    old = await make_old(empty, settings)
    jobs = await empty.read(JOBS, 0)
    old_mirror(tmp_path / "old.jsonl", jobs, old)
    await broker.stop(kill=True)
    broker.remove_store()
    await broker.start()
    if there != "nothing":
        await until_answered(lambda: create_stream(empty, old_config(settings)))
        for record in old[:2]:
            await empty.append(OLD, record.subject, record.data)
    content = read_mirror(tmp_path / "old.jsonl")
    restored = await until_answered(lambda: restore(empty, settings, content))
    assert restored.records == {STATE_A: 2, STATE_B: 2, STATE_C: 2, JOBS: 3}
    assert set(restored.missing.values()) == {0}
    logs = {name: await empty.read(name, 0) for name in (JOBS, STATE_A, STATE_B, STATE_C)}
    for name, records in logs.items():
        wanted = jobs if name == JOBS else of_slot(old, subjects.slot_of_log(name))
        assert [(each.subject, each.data) for each in records] == [
            (each.subject, each.data) for each in wanted
        ]
    assert await find_stream(empty, OLD) is None


async def test_with_users_the_admin_upgrades_and_services_say_what_they_wait_for(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(tmp_path / "keys", ("a", "b"))
    broker = Broker(tmp_path / "secured", keys=tmp_path / "keys")
    await broker.start()
    settings = make_settings(nats_url=broker.url, nats_nkey_seed_file=str(tmp_path / "keys"))
    buses = {user: await connect(settings, name="test", user=user) for user in (ADMIN, GATEWAY, trainer("a"))}
    old = await make_old(buses[ADMIN], settings)
    needed = [(STATE_A, subjects.state("a", "*"))]

    async def all_must_wait() -> None:
        for user in (GATEWAY, trainer("a")):
            with pytest.raises(
                BusUnavailableError, match=r"stream STATE-a does not exist.*`podium bootstrap`"
            ):
                await ready(buses[user], settings, needed)

    await all_must_wait()
    with monkeypatch.context() as patched:
        interrupt(buses[ADMIN], 6, sent=False, monkeypatch=patched)  # STATE-c is promoted, the others not
        with pytest.raises(Cut):
            await bootstrap(buses[ADMIN], settings)
    await all_must_wait()
    assert await buses[GATEWAY].read(STATE_C, 0) == of_slot(old, "c")
    assert subjects.LEASES_STREAM in await bootstrap_as_admin(settings)
    await must_be_upgraded(buses[ADMIN], settings, old)
    for user in (GATEWAY, trainer("a")):
        await ready(buses[user], settings, needed)
    assert await buses[GATEWAY].read(STATE_C, 0) == of_slot(old, "c")  # its jobs are still in JOBS
    with pytest.raises(DeniedError):
        await buses[trainer("a")].last(STATE_C, subjects.state("c", "gone"))
    for bus in buses.values():
        await bus.close()
    await broker.stop(kill=True)


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
