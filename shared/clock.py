"""Injected time: the wall clock in production, a token clock for runs that must repeat exactly."""

from __future__ import annotations

import time
from typing import Final, Protocol

DAY_S: Final = 86400.0


class Clock(Protocol):
    """The source of time for schedules and deadlines."""

    def time(self) -> float:
        """Unix seconds."""
        ...

    def advance(self, tokens: int) -> None:
        """Count `tokens` as trained."""
        ...


class WallClock:
    """Real time; tokens don't move it."""

    def time(self) -> float:
        """Unix seconds of this machine."""
        return time.time()

    def advance(self, tokens: int) -> None:
        """Do nothing: real time moves by itself."""


class TokenClock:
    """Time as trained tokens: two runs on it see the same times at the same steps.

    `start` is Unix seconds at zero tokens, `rate` tokens per simulated second of all devices together. One of
    `devices` that trains alone takes that many times as long: its tokens count so often.
    """

    def __init__(self, start: float, rate: float, devices: int = 1) -> None:
        if rate <= 0:
            raise ValueError(f"a token clock needs a positive rate, got {rate}")
        self.start = start
        self.rate = rate
        self.devices = devices
        self.tokens = 0

    def time(self) -> float:
        """Start plus tokens over rate."""
        return self.start + self.tokens / self.rate

    def advance(self, tokens: int) -> None:
        """Move on by `tokens`."""
        self.tokens += self.devices * tokens
