"""Limit the requests per event-loop iteration, so that broker messages are handled in between.

A burst makes hundreds of connections ready at once: .2 s of work, if one turn serves them all. What is read
from the broker needs a dozen turns, so requests that wait for that waited 1 to 2 s, while others were
answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

MOST: Final = 2  # also because the loop accepts one new connection in a turn


class Turns:
    """Lets requests pass, first come first served."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._left = most  # of this turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False  # whether the next turn is awaited

    async def take(self) -> None:
        """Return when this turn, or a later one, has room."""
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
            self._counting = False  # nobody came in this turn
            return
        self._left = self._most
        while self._waiting and self._left > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # it was not cancelled meanwhile
                turn.set_result(None)
                self._left -= 1
        loop.call_soon(self._next, loop)
