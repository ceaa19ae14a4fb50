"""A broker that died while it wrote a stream's configuration: the stream and its records come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg

from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.stream_requests import WRITTEN, delete_stream, find_stream
from shared.broker.streams import bootstrap, when_usable
from shared.errors import BusError, BusTimeoutError, BusUnavailableError
from shared.settings import Settings
from tests.integration.lost_disk import break_config_file
from tests.integration.old_states import (
    OLD,
    Cut,
    act_before,
    interrupt,
    make_old,
    must_be_upgraded,
    until_answered,
)

LOGS = [subjects.JOBS_STREAM, subjects.state_stream("a"), subjects.SCORES_STREAM, subjects.LEASES_STREAM]


async def restart_with_broken_file(broker: Broker, stream: str) -> None:
    await broker.stop(kill=True)
    break_config_file(broker, stream)
    await broker.start()


@pytest.mark.fault("F3")
async def test_a_log_and_its_sequences_come_back_and_stay(
    bus: Bus, broker: Broker, settings: Settings
) -> None:
    subject = subjects.job("a", "one")
    await bus.append(subjects.JOBS_STREAM, subject, b"{}", last_on_subject=0)
    await bus.append(subjects.JOBS_STREAM, subject, b"[]", last_on_subject=1)
    records = await bus.read(subjects.JOBS_STREAM, 0)
    await restart_with_broken_file(broker, subjects.JOBS_STREAM)
    assert await until_answered(lambda: find_stream(bus, subjects.JOBS_STREAM)) is None
    assert subjects.JOBS_STREAM in await bootstrap(bus, settings)
    await broker.stop(kill=True)  # a broker that is well now has the stream by itself
    await broker.start()
    assert await until_answered(lambda: bus.read(subjects.JOBS_STREAM, 0)) == records
    assert await bus.append(subjects.JOBS_STREAM, subject, b"{}", last_on_subject=2) == 3


def lose_updates(bus: Bus, stream: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose each update of a stream before the broker has it."""
    request = bus.request

    async def lost(subject: str, *args: Any, **kwargs: Any) -> Msg:
        if subject == f"$JS.API.STREAM.UPDATE.{stream}":
            raise error("lost")
        return await request(subject, *args, **kwargs)

    monkeypatch.setattr(bus, "request", lost)


@pytest.mark.fault("F3")
@pytest.mark.parametrize("error", [BusUnavailableError, BusTimeoutError, Cut])
async def test_a_log_whose_update_was_lost_stays_after_the_next_bootstrap(
    error: type[Exception], bus: Bus, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link drops, or its process is killed, between the stream's creation and its update."""
    subject = subjects.job("a", "one")
    await bus.append(subjects.JOBS_STREAM, subject, b"{}", last_on_subject=0)
    records = await bus.read(subjects.JOBS_STREAM, 0)
    await restart_with_broken_file(broker, subjects.JOBS_STREAM)
    assert await until_answered(lambda: find_stream(bus, subjects.JOBS_STREAM)) is None
    with monkeypatch.context() as patched:
        lose_updates(bus, subjects.JOBS_STREAM, error, patched)
        with pytest.raises(error):
            await bootstrap(bus, settings)
    assert subjects.JOBS_STREAM not in await bootstrap(bus, settings)
    await broker.stop(kill=True)
    await broker.start()
    assert await until_answered(lambda: bus.read(subjects.JOBS_STREAM, 0)) == records


@pytest.mark.fault("F3")
async def test_the_old_log_that_was_found_again_stays_though_its_update_was_lost(
    empty: Bus, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the copies that were begun of it would become the slots' logs without all of its records."""
    old = await make_old(empty, settings)
    await restart_with_broken_file(broker, OLD)
    assert await until_answered(lambda: find_stream(empty, OLD)) is None
    with monkeypatch.context() as patched:
        lose_updates(empty, OLD, Cut, patched)
        with pytest.raises(Cut):
            await bootstrap(empty, settings)
    with monkeypatch.context() as patched:
        interrupt(empty, 3, sent=False, monkeypatch=patched)  # after the update and the first copy
        with suppress(Cut):
            await bootstrap(empty, settings)
    await broker.stop(kill=True)
    await broker.start()
    assert await until_answered(lambda: find_stream(empty, OLD)) is not None
    await until_answered(lambda: bootstrap(empty, settings))
    await must_be_upgraded(empty, settings, old)


@pytest.mark.parametrize("stream", LOGS)
async def test_a_log_of_an_earlier_version_is_updated_once_and_keeps_its_room(
    stream: str, bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = await config_of(bus, stream)
    config |= {"metadata": {"mine": "stays"}}
    if "max_bytes" in config and config["max_bytes"] > 0:
        config["max_bytes"] *= 2
    reply = await bus.request(f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(config).encode())
    assert b'"error"' not in reply.data
    assert await bootstrap(bus, settings) == []
    found = await config_of(bus, stream)
    assert found["metadata"].items() >= ({"mine": "stays"} | WRITTEN).items()
    assert found | {"metadata": None} == config | {"metadata": None}
    lose_updates(bus, stream, AssertionError, monkeypatch)
    assert await bootstrap(bus, settings) == []


async def test_a_broker_that_refuses_the_update_stops_no_service(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = await config_of(bus, subjects.JOBS_STREAM)
    reply = await bus.request("$JS.API.STREAM.UPDATE.JOBS", json.dumps(config | {"metadata": {}}).encode())
    assert b'"error"' not in reply.data
    lose_updates(bus, subjects.JOBS_STREAM, BusError, monkeypatch)
    assert await bootstrap(bus, settings) == []


async def config_of(bus: Bus, stream: str) -> dict[str, Any]:
    found = await find_stream(bus, stream)
    assert found is not None
    return found.config


@pytest.mark.fault("F3")
@pytest.mark.parametrize("stream", LOGS)
async def test_a_broker_that_dies_while_a_log_gets_more_room(
    stream: str, bus: Bus, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies() -> None:
        await restart_with_broken_file(broker, stream)
        raise BusTimeoutError("no answer")

    update = f"$JS.API.STREAM.UPDATE.{subjects.JOBS_STREAM}"
    died = act_before(bus, update, dies, monkeypatch)
    more = replace(settings, log_max_bytes=2 * settings.log_max_bytes)
    await when_usable(bus, settings, lambda: bootstrap(bus, more))
    assert died
    assert await find_stream(bus, stream) is not None
    jobs = await find_stream(bus, subjects.JOBS_STREAM)
    assert jobs is not None
    assert jobs.config["max_bytes"] == more.log_max_bytes


@pytest.mark.fault("F3")
async def test_the_only_slots_log_comes_back(
    empty: Bus, broker: Broker, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(slots=("a",))
    await bootstrap(empty, settings)
    await empty.append(subjects.JOBS_STREAM, subjects.job("a", "one"), b"{}")
    states, subject = subjects.state_stream("a"), subjects.state("a", "one")
    for last in range(5):
        await empty.append(states, subject, b"{}", last_on_subject=last)
    records = await empty.read(states, 0)
    await restart_with_broken_file(broker, states)
    await until_answered(lambda: bootstrap(empty, settings))
    assert await empty.read(states, 0) == records
    assert await empty.append(states, subject, b"{}", last_on_subject=5) == 6
    assert await find_stream(empty, OLD) is None


@pytest.mark.fault("F3")
async def test_a_broker_that_dies_while_the_old_log_is_frozen(
    empty: Bus, broker: Broker, settings: Settings
) -> None:
    old = await make_old(empty, settings)
    await restart_with_broken_file(broker, OLD)
    await until_answered(lambda: bootstrap(empty, settings))
    await must_be_upgraded(empty, settings, old)
    assert await find_stream(empty, OLD) is None


async def test_jobs_without_any_log_of_states_get_empty_logs(bus: Bus, settings: Settings) -> None:
    await bus.append(subjects.JOBS_STREAM, subjects.job("c", "one"), b"{}")
    for slot in settings.slots:
        await delete_stream(bus, subjects.state_stream(slot))
    await bootstrap(bus, settings)
    for slot in (*settings.slots, "c"):
        log = await find_stream(bus, subjects.state_stream(slot))
        assert log is not None
        assert (log.messages, log.config.get("mirror")) == (0, None)
    assert await find_stream(bus, OLD) is None
