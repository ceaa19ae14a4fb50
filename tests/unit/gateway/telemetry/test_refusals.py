"""Refusals are counted by reason, shown for an hour and logged at a bounded rate."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.telemetry import refusals
from gateway.telemetry.refusals import KEPT_S, LOGGED_PER_MINUTE, MOST_CALLERS, RefusalReason, Refusals

STAKE, CLOCK = RefusalReason.STAKE, RefusalReason.CLOCK


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    class Log:
        def warning(self, event: str, **values: Any) -> None:
            found.append({"event": event, **values})

    monkeypatch.setattr(refusals, "log", Log())
    return found


def test_a_caller_is_one_entry_for_each_reason(lines: list[dict[str, Any]]) -> None:
    seen = Refusals()
    for at in (1000.0, 1001.0, 1002.0):
        seen.refused("5A", STAKE, "too little", at)
    seen.refused("5A", CLOCK, "too late", 1003.0)
    first, second = seen.recent(1003.0)
    assert (first.validator, first.reason, first.requests) == ("5A", "little_stake", 3)
    assert (first.first_at, first.last_at) == (1000.0, 1002.0)
    assert (second.reason, second.requests) == ("nonce_time", 1)
    assert seen.counts == {STAKE: 3, CLOCK: 1}
    assert [(line["validator"], line["reason"], line["detail"]) for line in lines] == [
        ("5A", STAKE, "too little"),
        ("5A", CLOCK, "too late"),
    ]


def test_after_an_hour_it_is_forgotten_and_logged_again(lines: list[dict[str, Any]]) -> None:
    seen = Refusals()
    seen.refused("5A", STAKE, "too little", 0.0)
    assert not seen.recent(KEPT_S + 1)
    seen.refused("5A", STAKE, "too little", KEPT_S + 1)
    assert [caller.requests for caller in seen.recent(KEPT_S + 1)] == [1]
    assert len(lines) == 2


def test_a_flood_of_addresses_is_bounded_in_log_and_memory(lines: list[dict[str, Any]]) -> None:
    seen = Refusals()
    for number in range(10_000):
        seen.refused(f"{number}" + "x" * 5000, STAKE, "too little", 1000.0)
    assert len(lines) == LOGGED_PER_MINUTE
    assert len(seen.recent(1000.0)) == MOST_CALLERS
    assert len(seen.recent(1000.0)[-1].validator) == refusals.LONGEST_ADDRESS
    assert seen.counts[STAKE] == 10_000
    seen.refused("5A", STAKE, "too little", 1061.0)
    assert lines[-1]["not_logged_before"] == 10_000 - LOGGED_PER_MINUTE
