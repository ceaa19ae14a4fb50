"""Waiting that can be cut short."""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def pause(seconds: float, wake: asyncio.Event) -> None:
    """Wait until `wake` is set, at most `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wake.wait()
