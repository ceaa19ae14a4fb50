"""A taken-over node that fills STATE: what it stops, what it can't, and how the other half gets on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace

from podium.local.nats_server import Broker, bootstrap
from podium.security.key_files import make_users
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN, GATEWAY, trainer
from shared.broker.streams import find_stream
from shared.errors import DeniedError, StoreFullError
from shared.settings import Settings

STATE, ROOM = subjects.STATE_STREAM, 1 << 20


@pytest.fixture
async def fleet(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> AsyncIterator[tuple[Settings, dict[str, Bus]]]:
    """A broker with users whose logs have little room, and a connection of each user."""
    keys = tmp_path / "keys"
    make_users(keys, ("a", "b"))
    broker = Broker(tmp_path / "nats", keys=keys)
    await broker.start()
    settings = make_settings(nats_url=broker.url, nats_nkey_seed_file=str(keys), log_max_bytes=ROOM)
    await bootstrap(settings)
    async with AsyncExitStack() as stack:
        buses = {}
        for user in (ADMIN, GATEWAY, trainer("a"), trainer("b")):
            buses[user] = await connect(settings, name=f"test {user}", user=user)
            stack.push_async_callback(buses[user].close)
        yield settings, buses
    await broker.stop(kill=True)


async def fill(bus: Bus) -> int:
    """Write what the user of slot a may until no more is stored; return how many records were."""
    count = 0
    for size in (20_000, 1_000, 1):  # until the last gap is filled
        for _ in range(1000):
            try:
                await bus.append(STATE, subjects.state("a", f"t{count}"), b"x" * size)
            except StoreFullError:
                break
            count += 1
        else:
            raise AssertionError("it never gets full")
    return count


async def test_a_full_state_stops_records_and_nothing_else_until_it_has_more_room(
    fleet: tuple[Settings, dict[str, Bus]],
) -> None:
    settings, buses = fleet
    taken_over, other, gateway = buses[trainer("a")], buses[trainer("b")], buses[GATEWAY]
    claim = await other.append(STATE, subjects.state("b", "t"), b"claimed", last_on_subject=0)
    count = await fill(taken_over)
    with pytest.raises(StoreFullError, match="raise log_max_bytes"):
        await other.append(STATE, subjects.state("b", "t"), b"submitting", last_on_subject=claim)
    # Leases, jobs, and what is stored stay; the other slot's own subjects stay closed.
    await other.append(subjects.LEASES_STREAM, subjects.lease("b"), b"held")
    await gateway.append(subjects.JOBS_STREAM, subjects.job("b", "next"), b"job")
    with pytest.raises(DeniedError):
        await taken_over.append(STATE, subjects.state("b", "t"), b"forged")

    assert await bootstrap(replace(settings, log_max_bytes=4 * ROOM)) == []
    await other.append(STATE, subjects.state("b", "t"), b"submitting", last_on_subject=claim)
    found = await find_stream(buses[ADMIN], STATE)
    assert found is not None
    assert (found.config["max_bytes"], found.messages) == (4 * ROOM, count + 2)
    assert found.config["deny_purge"]
    assert found.config["subjects"] == [subjects.ANY_STATE]


async def test_a_limit_only_grows_and_never_beyond_the_brokers_store(
    fleet: tuple[Settings, dict[str, Bus]],
) -> None:
    settings, buses = fleet
    for wanted, kept in ((2 * ROOM, 2 * ROOM), (ROOM, 2 * ROOM), (1 << 40, 2 * ROOM)):
        assert await bootstrap(replace(settings, log_max_bytes=wanted)) == []
        found = await find_stream(buses[ADMIN], STATE)
        assert found is not None
        assert found.config["max_bytes"] == kept
    assert await buses[trainer("b")].append(STATE, subjects.state("b", "t"), b"claimed") == 1
