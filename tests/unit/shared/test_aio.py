from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from shared.aio import cancel_all, pause, run_until_one_ends


async def test_a_pause_ends_by_itself_or_with_the_event() -> None:
    wake = asyncio.Event()
    await pause(0.01, wake)
    assert not wake.is_set()
    began = time.monotonic()
    asyncio.get_running_loop().call_later(0.01, wake.set)
    await pause(60.0, wake)
    await pause(60.0, wake)  # set already
    assert time.monotonic() - began < 30.0


async def test_a_cancelled_pause_raises() -> None:
    task = asyncio.create_task(pause(60.0, asyncio.Event()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_tasks_are_cancelled_until_they_end() -> None:
    async def stubborn() -> None:
        with suppress(asyncio.CancelledError):  # as wait_for of Python 3.11 may drop it
            await asyncio.sleep(60.0)
        await asyncio.sleep(60.0)

    async def ended() -> None: ...

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(ended())]
    await asyncio.sleep(0.01)
    await cancel_all(tasks, again_s=0.01)
    assert [task.cancelled() for task in tasks] == [True, False]


async def test_what_runs_together_ends_together() -> None:
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.set()

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        await run_until_one_ends({"endless": endless(), "failing": failing()})
    assert ended.is_set()
