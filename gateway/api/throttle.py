"""Limit the requests per event-loop iteration, so that broker messages are handled in between.

A burst makes hundreds of connections ready at once: 0.2 s of work if one iteration serves them all. A read
from the broker needs a dozen iterations, so without a limit requests that wait for one took 1 to 2 s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

MOST: Final = 2  # requests per iteration; the loop accepts one new connection in each


class LoopThrottle:
    """Admits `most` requests per event-loop iteration, in the order they came."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._left = most  # in this iteration
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False  # whether `_next` is scheduled

    async def take(self) -> None:
        """Wait for an iteration that has room."""
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next, loop)
        if self._left > 0 and not self._waiting:
            self._left -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._left == self._most and not self._waiting:
            self._counting = False  # no request came in this iteration
            return
        self._left = self._most
        while self._waiting and self._left > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # not cancelled while it waited
                turn.set_result(None)
                self._left -= 1
        loop.call_soon(self._next, loop)
