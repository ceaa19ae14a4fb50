"""The secured broker: who may do what, who gets in, and what is said when something is wrong."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import signal
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.conformance.permission_table import GUESTS, KINDS
from bench.conformance.permissions import measure, table
from podium.local.nats_server import Broker, bootstrap, take_over_open_store
from podium.security.key_files import make_certificates, make_users
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN, GATEWAY, seed_path
from shared.broker.streams import bootstrap as make_streams
from shared.broker.streams import ready
from shared.errors import BusUnavailableError, DeniedError, RefusedError, SettingsError
from shared.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    make_users(folder, ("a", "b"))
    return folder


@pytest.fixture
async def secured(tmp_path: Path, keys: Path) -> AsyncIterator[Broker]:
    """A broker with users and without TLS, as `podium up` runs it; its store is empty."""
    broker = Broker(tmp_path / "secured", keys=keys)
    await broker.start()
    yield broker
    await broker.stop(kill=True)


@pytest.fixture
def secured_settings(make_settings: Callable[..., Settings], secured: Broker, keys: Path) -> Settings:
    return make_settings(nats_url=secured.url, nats_nkey_seed_file=str(keys), nats_connect_timeout_s=5.0)


@pytest.mark.timeout(240)
@pytest.mark.fault("F16")
async def test_every_user_may_do_what_it_must_and_nothing_else(tmp_path: Path) -> None:
    report = await measure(tmp_path)
    assert report.wrong == []
    rows = [row for kind in KINDS for row in kind]
    assert report.allowed == sum(len(row.users) for row in rows)
    assert report.allowed + report.denied == len(rows) * len(GUESTS)
    assert (report.reflected, report.rolled_up, report.refused) == (109, 6, 4)


def test_the_published_table_is_the_one_that_is_tried() -> None:
    assert table() in (DOCS / "security.md").read_text()


async def test_missing_streams_are_named_with_the_command_that_makes_them(secured_settings: Settings) -> None:
    bus = await connect(secured_settings, name="test", user=GATEWAY)
    needed = [(subjects.JOBS_STREAM, subjects.ANY_JOB)]
    with pytest.raises(BusUnavailableError, match=r"stream JOBS does not exist.*`podium bootstrap`"):
        await ready(bus, secured_settings, needed)
    assert "JOBS" in await bootstrap(secured_settings)
    assert await bootstrap(secured_settings) == []
    await ready(bus, secured_settings, needed)
    await bus.close()


async def test_a_denial_ends_a_service_that_starts_and_is_counted_later(secured_settings: Settings) -> None:
    await bootstrap(secured_settings)
    bus = await connect(secured_settings, name="test", user="trainer-a")
    bus.entered_at = float("-inf")  # long ago
    for count in (1, 2):
        with pytest.raises(DeniedError, match=r"user trainer-a publish to podium.jobs.a.x: .*`podium keys`"):
            await bus.append(subjects.JOBS_STREAM, "podium.jobs.a.x", b"{}", timeout_s=60.0)
        assert bus.denied.total() == count
    assert not bus.closed.is_set()
    await bus.close()
    starting = await connect(secured_settings, name="test", user="trainer-a")
    await starting.publish("podium.state.b.x", b"{}")
    async with asyncio.timeout(60):
        await starting.closed.wait()
    with pytest.raises(DeniedError, match=r"trainer-a publish to podium.state.b.x"):
        raise starting.why_closed()
    await starting.close()


@pytest.mark.fault("F16")
async def test_another_users_key_is_refused_before_anything_is_sent(
    secured_settings: Settings, keys: Path
) -> None:
    wrong = replace(secured_settings, nats_nkey_seed_file=str(seed_path(keys, "trainer-b")))
    with pytest.raises(SettingsError, match=r"is the key of trainer-b; the key of trainer-a is needed"):
        await connect(wrong, name="test", user="trainer-a")


@pytest.mark.fault("F16")
async def test_no_key_and_no_tls_are_told_apart_in_one_line(
    secured_settings: Settings, keys: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"wants a key: set PODIUM_NATS_NKEY_SEED_FILE"):
        await connect(replace(secured_settings, nats_nkey_seed_file=None), name="test")
    make_certificates(keys, [], ())
    asks_for_tls = replace(secured_settings, nats_ca_file=str(keys / "ca" / "ca.crt"))
    with pytest.raises(RefusedError, match=r"doesn't speak TLS, and PODIUM_NATS_CA_FILE asks for it"):
        await connect(asks_for_tls, name="test", user=GATEWAY)
    broker = Broker(tmp_path / "tls", keys=keys)
    await broker.start()
    over_tls = replace(asks_for_tls, nats_url=broker.url)
    await (await connect(over_tls, name="test", user=GATEWAY)).close()
    with pytest.raises(RefusedError, match=r"wants TLS: set PODIUM_NATS_CA_FILE"):
        await connect(replace(over_tls, nats_ca_file=None), name="test", user=GATEWAY)
    elsewhere = tmp_path / "elsewhere"
    make_certificates(elsewhere, [], ())
    another_ca = replace(over_tls, nats_ca_file=str(elsewhere / "ca" / "ca.crt"))
    with pytest.raises(RefusedError, match=r"certificate of the broker .* does not verify with .*elsewhere"):
        await connect(another_ca, name="test", user=GATEWAY)
    await broker.stop(kill=True)


@asynccontextmanager
async def slow_link(broker: Broker, delays: Iterator[float]) -> AsyncIterator[str]:
    """The address of a link to the broker that holds back what clients send, or ends (inf), by connection."""
    links: list[asyncio.Task[Any]] = []

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError), closing(target):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link, delay = asyncio.current_task(), next(delays, 0.0)
        assert link is not None
        links.append(link)
        from_broker, to_broker = await asyncio.open_connection("127.0.0.1", broker.port)

        async def ask() -> None:
            await asyncio.sleep(0.0 if math.isinf(delay) else delay)
            await forward(reader, to_broker)

        if math.isinf(delay):
            await reader.read(1)
            to_broker.close()
            writer.close()
        else:
            await asyncio.gather(ask(), forward(from_broker, writer))
        for each in (writer, to_broker):
            with suppress(ConnectionError):
                await each.wait_closed()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield f"nats://localhost:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*links)


@pytest.mark.parametrize("first", [1.5, math.inf])
async def test_a_handshake_that_comes_too_late_or_is_cut_off_is_tried_again(
    first: float, make_settings: Callable[..., Settings], keys: Path, tmp_path: Path
) -> None:
    """A broker with TLS that waited long enough greets in plain text, as one without TLS does."""
    make_certificates(keys, [], ())
    broker = Broker(tmp_path / "tls", keys=keys)
    await broker.start()
    delays = iter([first])
    async with slow_link(broker, delays) as url:
        settings = make_settings(
            nats_url=url,
            nats_nkey_seed_file=str(keys),
            nats_ca_file=str(keys / "ca" / "ca.crt"),
            nats_connect_timeout_s=30.0,
        )
        bus = await connect(settings, name="test", user=GATEWAY)
        assert next(delays, None) is None
        await bus.close()
        await broker.stop(kill=True)


async def test_a_link_that_is_always_too_slow_is_named(
    make_settings: Callable[..., Settings], keys: Path, tmp_path: Path
) -> None:
    make_certificates(keys, [], ())
    broker = Broker(tmp_path / "tls", keys=keys)
    await broker.start()
    # Every second connection asks the broker whether it has TLS.
    async with slow_link(broker, itertools.cycle([1.5, 0.0])) as url:
        settings = make_settings(
            nats_url=url,
            nats_nkey_seed_file=str(keys),
            nats_ca_file=str(keys / "ca" / "ca.crt"),
            nats_connect_timeout_s=6.0,
        )
        with pytest.raises(BusUnavailableError, match=r"no TLS handshake .* came in time \(waited 6 s\)"):
            await connect(settings, name="test", user=GATEWAY)
        await broker.stop(kill=True)


async def test_a_rotated_key_is_worth_nothing_after_a_reload_and_the_new_one_is_taken_by_itself(
    secured_settings: Settings, secured: Broker, keys: Path, tmp_path: Path
) -> None:
    stolen = tmp_path / "stolen.nk"
    stolen.touch(0o600)
    stolen.write_text(seed_path(keys, "trainer-a").read_text())
    thief = replace(secured_settings, nats_nkey_seed_file=str(stolen))
    buses = [await connect(secured_settings, name="test", user=user) for user in ("trainer-a", "trainer-b")]
    await (await connect(thief, name="thief")).close()
    back = asyncio.Event()
    buses[0].on_reconnect(back.set)
    make_users(keys, ("a", "b"), rotate=["trainer-a"])
    assert secured.process is not None
    os.kill(secured.process.pid, signal.SIGHUP)
    async with asyncio.timeout(60):
        await back.wait()
    with pytest.raises(RefusedError, match="doesn't know the key of trainer-a"):
        await connect(thief, name="thief")
    for bus in buses:
        assert bus.connected
        await bus.close()


async def test_what_a_broker_without_users_stored_is_there_with_users(
    broker: Broker, settings: Settings, bus: Bus, keys: Path
) -> None:
    await bus.append(subjects.JOBS_STREAM, subjects.job("a", "one"), b"{}")
    await bus.close()
    await broker.stop()
    assert take_over_open_store(broker.folder)
    assert not take_over_open_store(broker.folder)
    broker.keys = keys
    await broker.start()
    secured = replace(settings, nats_nkey_seed_file=str(keys))
    admin = await connect(secured, name="test", user=ADMIN)
    assert await make_streams(admin, secured) == ["PROGRESS", "DECISIONS"]  # in memory
    record = await admin.last(subjects.JOBS_STREAM, subjects.job("a", "one"))
    assert record is not None
    assert record.sequence == 1
    await admin.close()


def test_nothing_secret_is_in_what_the_broker_reads_of_users(keys: Path) -> None:
    text = (keys / "broker" / "users.conf").read_text()
    for path in keys.rglob("*.nk"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        seed: Any = re.search(r"^SU\w+$", path.read_text(), re.MULTILINE)
        assert seed[0] not in text
