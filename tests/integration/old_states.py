"""What a broker of an older version holds, how its upgrade is cut off, and what an upgraded one must hold."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg

from shared import subjects
from shared.broker.bus import Bus
from shared.broker.jetstream import Record
from shared.broker.stream_requests import create_stream, find_stream
from shared.broker.stream_specs import state_log
from shared.broker.streams import bootstrap
from shared.errors import BusTimeoutError, BusUnavailableError
from shared.messages.encoding import encode
from shared.settings import Settings
from tests.log_records import claimed, job, result

JOBS, OLD = subjects.JOBS_STREAM, subjects.OLD_STATE_STREAM
STATE_A, STATE_B, STATE_C = map(subjects.state_stream, "abc")
T = TypeVar("T")
EPOCH = 7
LARGE = b"x" * 3_900_000  # nearly the most that the broker takes


def old_config(settings: Settings) -> dict[str, Any]:
    """The log of states as it was for all slots."""
    return state_log(settings, "a").config | {"name": OLD, "subjects": [subjects.ANY_STATE]}


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
        await bus.append(JOBS, subjects.job(slot, task), encode(replace(job(task, slot), deadline_at=4e9)))
        await bus.append(
            OLD, subjects.state(slot, task), encode(claimed(task, slot, EPOCH)), last_on_subject=0
        )
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


def act_before(
    bus: Bus, subject: str, act: Callable[[], Awaitable[object]], patch: pytest.MonkeyPatch
) -> list[str]:
    """Act once, before the first request on `subject` is sent; return a list that has it once that was so."""
    request, acted = bus.request, list[str]()

    async def late(asked: str, *args: Any, **kwargs: Any) -> Msg:
        if asked == subject and not acted:
            acted.append(asked)
            await act()
        return await request(asked, *args, **kwargs)

    patch.setattr(bus, "request", late)
    return acted


async def until_answered(act: Callable[[], Awaitable[T]]) -> T:
    async with asyncio.timeout(60):
        while True:
            with suppress(BusUnavailableError, BusTimeoutError):
                return await act()
            await asyncio.sleep(0.05)
