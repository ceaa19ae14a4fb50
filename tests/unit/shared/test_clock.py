"""The token clock moves with tokens only, the wall clock only by itself."""

from __future__ import annotations

import time

import pytest

from shared.clock import TokenClock, WallClock


def test_token_clock_is_tokens_over_rate() -> None:
    clock = TokenClock(start=100.0, rate=50.0)
    assert clock.time() == 100.0
    clock.advance(25)
    clock.advance(50)
    assert clock.time() == 101.5


def test_one_device_of_several_takes_as_many_times_as_long() -> None:
    clock = TokenClock(start=0.0, rate=100.0, devices=4)
    clock.advance(50)
    assert clock.time() == 2.0


def test_token_clock_needs_a_rate() -> None:
    with pytest.raises(ValueError, match="positive rate"):
        TokenClock(start=0.0, rate=0.0)


def test_wall_clock_is_the_machine_s_time() -> None:
    clock = WallClock()
    clock.advance(1_000_000)
    assert abs(clock.time() - time.time()) < 1.0
