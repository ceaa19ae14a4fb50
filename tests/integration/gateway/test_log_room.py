"""A log with hardly any room: no offer is accepted until there is room again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from gateway.state import log_room
from gateway.state.log_room import LogRoom, how_full
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.streams import StreamInfo, bootstrap, find_stream
from shared.settings import Settings

ROOM = 1 << 20


def info(used: int, limit: int) -> StreamInfo:
    return StreamInfo(
        config={"max_bytes": limit}, created="", now="", messages=1, bytes=used, first=1, last=1
    )


@pytest.mark.parametrize(
    ("used", "limit", "words"),
    [
        (0, ROOM, None),
        (94 << 20, 100 << 20, None),
        (95 << 20, 100 << 20, "STATE is 95% full (95 of 100 MiB)"),
        (100 << 20, 100 << 20, "STATE is 100% full (100 of 100 MiB)"),
        (1 << 40, -1, None),  # no limit
    ],
)
def test_how_full(used: int, limit: int, words: str | None) -> None:
    assert how_full("STATE", info(used, limit)) == words


async def test_what_was_found_last_stays_while_the_broker_is_silent(bus: Bus) -> None:
    room = LogRoom()
    room.full = "STATE is 99% full"
    await bus.close()
    task = asyncio.create_task(room.run(bus))
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert room.full == "STATE is 99% full"


@pytest.mark.parametrize("stream", [subjects.STATE_STREAM, subjects.JOBS_STREAM])
async def test_no_offer_is_accepted_whose_records_might_not_be_stored(
    bus: Bus,
    settings: Settings,
    start_gateway: Any,
    heartbeats: Callable[..., None],
    make_offer: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    stream: str,
) -> None:
    monkeypatch.setattr(log_room, "READ_S", 0.1)
    heartbeats("a", "b")
    async with start_gateway() as api:
        await api.until_live("a", "b")
        found = await find_stream(bus, stream)
        assert found is not None
        config = json.dumps(found.config | {"max_bytes": ROOM}).encode()
        assert "error" not in json.loads((await bus.request(f"$JS.API.STREAM.UPDATE.{stream}", config)).data)
        _, decision = await api.offer(make_offer("one"))
        assert decision["accepted"]
        junk = {"STATE": subjects.state("a", "x"), "JOBS": subjects.job("a", "x")}[stream]
        for _ in range(10):
            await bus.append(stream, junk, b"x" * 101_000)
        gateway = await api.until("/v1/gateway", lambda body: body["full_log"])
        assert gateway["full_log"].startswith(f"{stream} is 9")
        _, decision = await api.offer(make_offer("two"))
        assert (decision["accepted"], decision["kind"]) == (False, "log_full")
        assert "records might not be stored" in decision["reason"]
        assert (await api.offer(make_offer("one")))[1]["accepted"]  # what was accepted stays so
        assert any(
            "no offer is accepted" in alert["what"] for alert in (await api.get("/v1/alerts"))[1]["alerts"]
        )
        await bootstrap(bus, settings)
        await api.until("/v1/gateway", lambda body: body["full_log"] is None)
        assert (await api.offer(make_offer("two")))[1]["accepted"]
