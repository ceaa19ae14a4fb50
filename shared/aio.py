"""Helpers for asyncio: wait for an event or a timeout, run tasks together, cancel tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any


async def pause(seconds: float, wake: asyncio.Event) -> None:
    """Wait until `wake` is set, at most `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wake.wait()


async def cancel_all(tasks: Iterable[asyncio.Task[Any]], again_s: float = 0.2) -> None:
    """Cancel tasks until each has ended.

    Once is not enough: `asyncio.wait_for` of Python 3.11, which the NATS client is full of, drops a
    cancellation that comes in the same moment as the result.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again_s)


async def run_until_one_ends(work: Mapping[str, Coroutine[Any, Any, None]], again_s: float = 0.2) -> None:
    """Run all of `work`, by name; when one ends, cancel the others and raise what it raised."""
    tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in work.items()]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        await cancel_all(tasks, again_s)
