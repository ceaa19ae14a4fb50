"""The upgrade of a real broker as others see it: older processes, services with keys, mirrors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.server import listening_socket, running
from gateway.state.mirror_file import Header, encode_line, read_mirror
from podium.local.nats_server import Broker
from podium.local.nats_server import bootstrap as bootstrap_as_admin
from podium.local.restoration import restore
from podium.security.key_files import make_users
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN, GATEWAY, trainer
from shared.broker.jetstream import Record
from shared.broker.stream_requests import create_stream, find_stream
from shared.broker.streams import bootstrap, ready
from shared.errors import BusError, BusUnavailableError, DeniedError, NobodyAnswersError
from shared.messages.encoding import encode
from shared.settings import Settings
from tests.integration.lost_disk import remove_store
from tests.integration.old_states import (
    EPOCH,
    JOBS,
    OLD,
    STATE_A,
    STATE_B,
    STATE_C,
    Cut,
    interrupt,
    make_old,
    must_be_upgraded,
    of_slot,
    old_config,
    until_answered,
)
from tests.log_records import submitting


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
        await empty.append(OLD, subjects.state("a", "one"), encode(submitting("one", "a", EPOCH)))
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
            await empty.append(STATE_A, subjects.state("a", "one"), encode(submitting("one", "a", EPOCH)))
            while read_mirror(path).of(STATE_A)[-1].data != encode(submitting("one", "a", EPOCH)):
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
    remove_store(broker)
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
