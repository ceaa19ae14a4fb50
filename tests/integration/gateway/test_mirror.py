"""The mirror of a real gateway, and the recovery of both after the broker has lost its disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.server import listening_socket, running
from gateway.state.ledger import Ledger
from gateway.state.mirror_file import encode_line, read_mirror
from podium.local import restoration
from podium.local.nats_server import Broker
from podium.local.restoration import NotEmptyError, restore
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.jetstream import Record
from shared.broker.stream_requests import delete_stream
from shared.broker.streams import bootstrap
from shared.errors import BusError, BusUnavailableError, ConflictError
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed, Result, ResultStatus, Submitting
from shared.messages.slots import Lease
from shared.settings import Settings
from tests.integration.lost_disk import remove_store

JOBS, LEASES = subjects.JOBS_STREAM, subjects.LEASES_STREAM
STATE_A, STATE_B = map(subjects.state_stream, "ab")
LOGS = (STATE_A, STATE_B, JOBS)
EPOCH = 4711
CPU = Hardware(device="cpu", count=1, memory_bytes=1 << 30)


async def stored(bus: Bus, stream: str) -> list[Record]:
    return await bus.read(stream, 0)


async def until_mirrored(bus: Bus, path: Path) -> None:
    """Wait until the file holds what the logs do, each record once and in order."""
    wanted = {stream: await stored(bus, stream) for stream in LOGS}
    async with asyncio.timeout(60):
        while mirrored(path) != wanted:
            await asyncio.sleep(0.05)


def mirrored(path: Path) -> dict[str, list[Record]]:
    return {stream: read_mirror(path).of(stream) for stream in LOGS} if path.exists() else {}


async def until_back(bus: Bus, settings: Settings) -> None:
    """Wait for a broker whose store is gone, and make its streams."""
    async with asyncio.timeout(60):
        while True:
            try:
                await bootstrap(bus, settings)
            except BusError:
                await asyncio.sleep(0.05)
            else:
                return


async def write(bus: Bus, message: Claimed | Submitting | Result) -> None:
    await bus.append(
        subjects.state_stream(message.slot), subjects.state(message.slot, message.task), encode(message)
    )


def claimed(task: str, slot: str) -> Claimed:
    return Claimed(record_id=f"c-{task}", task=task, slot=slot, node="n", epoch=EPOCH, attempt=2)


def fold(records: dict[str, list[Record]]) -> Ledger:
    ledger = Ledger()
    for stream in LOGS:
        for record in records[stream]:
            ledger.apply(stream, record)
    return ledger


def world(ledger: Ledger) -> Any:
    """All that a ledger says, but for the numbers of the records."""
    tasks = [(task.reservation, task.job, ledger.state(task, 0.0)) for task in ledger.tasks()]
    chains = [[each.record for each in ledger.chain_of(task.record).records] for task in ledger.tasks()]
    return tasks, chains, ledger.open_jobs(), ledger.malformed


@pytest.fixture
async def story(bus: Bus, start_gateway: Any, heartbeats: Any, make_offer: Any, tmp_path: Path) -> Path:
    """Three tasks in different states and a record that can't be read; the mirror that a gateway left."""
    heartbeats("a", "b")
    async with start_gateway() as api:
        await api.until_ready()
        await api.until_live("a", "b")
        for task, slot in (("one", "a"), ("two", "b")):
            assert (await api.offer(make_offer(task)))[1]["slot"] == slot
            await write(bus, claimed(task, slot))
        await write(bus, Submitting(record_id="s", task="one", slot="a", node="n", epoch=EPOCH, digest="d"))
        done = Result(record_id="r", task="one", task_id="one", slot="a", status=ResultStatus.SUBMITTED)
        await write(bus, done)
        await bus.append(STATE_A, "podium.state.a.odd", b'no json\n"at all"')
        await api.until("/v1/slots", lambda body: body["slots"][0]["state"] == "free")
        assert (await api.offer(make_offer("three")))[1]["slot"] == "a"
        path = tmp_path / "gateway" / "mirror" / "1.jsonl"
        await until_mirrored(bus, path)
    return path


async def test_gateways_that_share_a_folder_mirror_into_a_file_each(
    bus: Bus, story: Path, start_gateway: Any
) -> None:
    shared = str(story.parents[1])
    async with start_gateway("one", data_dir=shared) as one, start_gateway("two", data_dir=shared) as two:
        await one.until_ready()
        await two.until_ready()
        await write(bus, claimed("three", "a"))
        for number in (1, 2):
            await until_mirrored(bus, story.with_name(f"{number}.jsonl"))


@pytest.mark.parametrize("cut", [1, 40])
async def test_a_mirror_whose_last_line_was_cut_by_a_kill_goes_on_without_doubles(
    cut: int, bus: Bus, start_gateway: Any, heartbeats: Any, make_offer: Any, tmp_path: Path
) -> None:
    heartbeats("a", "b")
    path = tmp_path / "gateway" / "mirror" / "1.jsonl"
    async with start_gateway() as api:
        await api.until_ready()
        await api.until_live("a", "b")
        assert (await api.offer(make_offer("one")))[1]["accepted"]
        await until_mirrored(bus, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    async with start_gateway() as api:
        await api.until_ready()
        await until_mirrored(bus, path)
        await write(bus, claimed("one", "a"))
        await until_mirrored(bus, path)
    assert path.read_bytes().startswith(whole)
    assert path.stat().st_mode & 0o777 == 0o600  # the addresses of data are signed URLs


async def test_a_damaged_mirror_is_kept_and_written_anew(bus: Bus, story: Path, start_gateway: Any) -> None:
    replace(story, b'"JOBS"', b'"JOKES"')
    async with start_gateway() as api:
        await api.until_ready()
        await until_mirrored(bus, story)
    assert len(list(story.parent.glob("1-*.jsonl"))) == 1


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


async def test_a_broker_that_lost_its_disk_is_restored_and_work_goes_on(
    bus: Bus,
    broker: Broker,
    settings: Settings,
    story: Path,
    start_gateway: Any,
    make_offer: Any,
) -> None:
    before = {stream: await stored(bus, stream) for stream in LOGS}
    content = read_mirror(story)

    await broker.stop(kill=True)
    remove_store(broker)
    await broker.start()
    await until_back(bus, settings)
    async with start_gateway() as api:  # it decides nothing, and goes on once everything is there again
        await until_it_misses_records(api)
        assert (await api.offer(make_offer("four")))[0] == 503
        assert await stored(bus, JOBS) == []
        restored = await restore(bus, settings, content)
        await must_be_the_same_world(bus, before)
        await api.until("/readyz", lambda body: body.get("status") == "ready", timeout_s=60)
        await api.until_live("a", "b")
        assert (await api.get("/v1/tasks/one"))[1]["state"] == "submitted"
        assert (await api.offer(make_offer("two")))[1] == (await api.get("/v1/tasks/two"))[1]["decision"]
        assert (await api.offer(make_offer("four")))[1]["reason"].startswith("At maximum accuracy capacity")
        await until_mirrored(bus, story)
    assert restored.records == {JOBS: 3, STATE_A: 4, STATE_B: 1}
    assert restored.tasks == {"queued": 1, "running": 1, "submitted": 1}
    (kept,) = story.parent.glob("1-*.jsonl")
    assert read_mirror(kept) == content


async def test_the_lost_log_of_a_slot_that_is_gone_is_missed_and_restored(
    bus: Bus, settings: Settings, story: Path, start_gateway: Any
) -> None:
    """Nobody makes the log of a slot that the settings don't have."""
    gone = Record(1, "podium.state.gone.t", b"{}")
    replace(story, b"\n", b"\n" + encode_line("STATE-gone", gone))
    async with start_gateway() as api:
        await until_it_misses_records(api)
        assert (await restore(bus, settings, read_mirror(story))).written == 1
        await api.until("/readyz", lambda body: body.get("status") == "ready", timeout_s=60)


async def until_it_misses_records(api: Any) -> None:
    await api.until("/readyz", lambda body: "podium restore" in body.get("detail", ""), timeout_s=60)


async def must_be_the_same_world(bus: Bus, before: dict[str, list[Record]]) -> None:
    """The same ledger, under numbers of which none was one of the old world: who expects one is refused."""
    after = {stream: await stored(bus, stream) for stream in LOGS}
    assert world(fold(after)) == world(fold(before))
    for stream in LOGS:
        assert after[stream][0].sequence == before[stream][-1].sequence + 1
        for expected in (0, before[stream][-1].sequence):
            with pytest.raises(ConflictError):
                await bus.append(stream, before[stream][0].subject, b"{}", last_on_subject=expected)
    assert await bus.append(LEASES, subjects.lease("a"), b"{}", last_on_subject=0) > EPOCH


async def test_restore_goes_on_where_it_was_killed_and_refuses_what_is_not_its_own(
    bus: Bus, broker: Broker, settings: Settings, story: Path
) -> None:
    content = read_mirror(story)
    lost = Record(99, "podium.jobs.a.lost", b"{}")
    with pytest.raises(NotEmptyError, match="JOBS holds 3 records, the file 2"):
        await restore(bus, settings, content_with(content, JOBS, content.records[JOBS][:2]))
    with pytest.raises(NotEmptyError, match=r"JOBS holds podium\.jobs\.a\.one at 1, the file .*lost"):
        await restore(bus, settings, content_with(content, JOBS, [lost]))
    assert (await restore(bus, settings, content)).written == 0  # nothing was lost: nothing is done

    await broker.stop(kill=True)
    remove_store(broker)
    await broker.start()
    await until_back(bus, settings)
    lease = Lease(slot="a", node="alive", epoch=0, hardware=CPU)
    revision = await bus.append(LEASES, subjects.lease("a"), encode(lease))
    with pytest.raises(NotEmptyError, match="node alive holds slot a"):
        await restore(bus, settings, content)
    await bus.append(LEASES, subjects.lease("a"), b"", last_on_subject=revision)

    part = content_with(content, STATE_A, content.records[STATE_A][:2])
    part = content_with(content_with(part, STATE_B, []), JOBS, [])
    await restore(bus, settings, part)  # as if killed after two records
    assert (await restore(bus, settings, content)).written == 6
    assert (await restore(bus, settings, content)).written == 0
    with_more = content_with(content, JOBS, [*content.records[JOBS], lost])
    assert (await restore(bus, settings, with_more)).records[JOBS] == 4


async def test_a_log_that_another_process_made_meanwhile_is_never_restored_into(
    bus: Bus, broker: Broker, settings: Settings, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = read_mirror(story)
    before = {stream: await stored(bus, stream) for stream in LOGS}
    await broker.stop(kill=True)
    remove_store(broker)
    await broker.start()
    await until_back(bus, settings)

    async def delete_and_be_late(bus: Bus, name: str) -> None:
        await delete_stream(bus, name)
        await bootstrap(bus, settings)

    with monkeypatch.context() as patched:
        patched.setattr(restoration, "delete_stream", delete_and_be_late)
        with pytest.raises(BusUnavailableError, match="another process has made STATE-a meanwhile"):
            await restore(bus, settings, content)
    assert await stored(bus, STATE_A) == []
    await restore(bus, settings, content)
    await must_be_the_same_world(bus, before)


def content_with(content: Any, stream: str, records: list[Record]) -> Any:
    return type(content)(content.records | {stream: records}, content.end, content.size)


async def test_a_gateway_whose_log_is_replaced_under_it_ends(
    bus: Bus, broker: Broker, settings: Settings, gateway_settings: Callable[..., Settings]
) -> None:
    """Else it would answer from a ledger of another world, or wait for ever for a sequence that is gone."""

    async def live() -> None:
        own = gateway_settings()
        async with running(own, listening_socket(own, {})) as (service, work):
            await write(bus, claimed("one", "a"))
            async with asyncio.timeout(60):
                while not service.ledger.folded[STATE_A]:
                    await asyncio.sleep(0.05)
            await broker.stop(kill=True)
            remove_store(broker)
            await broker.start()
            await until_back(bus, settings)
            await asyncio.wait([work], timeout=60)

    with pytest.raises(BusError, match="it is another log"):
        await live()


def flip(block: bytearray) -> None:
    block[len(block) // 2] ^= 1


def cut(block: bytearray) -> None:
    del block[-30:]


@pytest.mark.fault("F12")
@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("stream", LOGS)
async def test_a_damaged_block_is_noticed_and_restored(
    bus: Bus,
    broker: Broker,
    settings: Settings,
    story: Path,
    start_gateway: Any,
    stream: str,
    damage: Callable[[bytearray], None],
) -> None:
    """nats-server itself drops what it can't read, or all from there on, without a word to any client."""
    before = {stream: await stored(bus, stream) for stream in LOGS}
    content = read_mirror(story)
    await broker.stop()
    (path,) = broker.folder.rglob(f"{stream}/msgs/*.blk")
    block = bytearray(path.read_bytes())
    damage(block)
    path.write_bytes(block)
    await broker.start()
    await until_back(bus, settings)
    assert len(await stored(bus, stream)) < len(before[stream])
    async with start_gateway() as api:
        await until_it_misses_records(api)
    await broker.stop()
    remove_store(broker)
    await broker.start()
    await until_back(bus, settings)
    await restore(bus, settings, content)
    after = {stream: await stored(bus, stream) for stream in LOGS}
    assert world(fold(after)) == world(fold(before))
