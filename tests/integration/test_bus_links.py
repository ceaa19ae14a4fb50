"""Links to the broker that are lost, cancelled or closed: nothing waits for ever, nothing stays open."""

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
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.errors import (
    BusTimeoutError,
)
from shared.settings import Settings
from tests.integration.lossy_link import lossy_link

JOBS = subjects.JOBS_STREAM


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
