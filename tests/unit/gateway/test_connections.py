"""Which connections are closed: those that wait too long, and above a limit those that wait longest."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from aiohttp import web

from gateway import connections
from gateway.connections import (
    SLOW,
    TOO_MANY,
    TOO_MANY_OF_ADDRESS,
    WAIT_S,
    ConnectionLimits,
    Connections,
    WaitingConnection,
    limits_of,
    owner_of,
    surplus,
)

NOW = 1000.0
LIMITS = ConnectionLimits(in_all=5, of_address=3)
FAR, OTHER, HERE = "192.0.2.1", "192.0.2.2", "127.0.0.1"


def waiting(*ages: float, address: str = FAR, first: int = 0) -> list[WaitingConnection]:
    return [WaitingConnection(first + number, address, NOW - age) for number, age in enumerate(ages)]


@pytest.mark.parametrize(
    ("found", "busy", "closed"),
    [
        (waiting(5, 4, 3), {}, {}),
        (waiting(WAIT_S + 1, WAIT_S - 1), {}, {0: SLOW}),
        (waiting(2, 9, 5, 3), {}, {1: TOO_MANY_OF_ADDRESS}),  # the one that waits longest
        (waiting(2, 9), {FAR: 3}, {0: TOO_MANY_OF_ADDRESS, 1: TOO_MANY_OF_ADDRESS}),
        (waiting(2, 9, 5, 3, address=HERE), {}, {}),  # a proxy brings everyone from there
        (waiting(2, 9, 5, 3, 4, 8, address=HERE), {}, {1: TOO_MANY}),
        (waiting(9, 8, 7) + waiting(5, 6, 4, address=OTHER, first=3), {}, {0: TOO_MANY}),
        (waiting(0.5, 0.4, 0.3, 0.2), {}, {}),  # their requests may be on their way
        (waiting(0.5, 2), {FAR: 9}, {1: TOO_MANY_OF_ADDRESS}),
        ([], {FAR: 9}, {}),  # none is closed amid a request
        (waiting(WAIT_S + 1, 9, 8, 7), {}, {0: SLOW}),  # what is slow no longer counts
    ],
)
def test_which_are_closed(
    found: list[WaitingConnection], busy: dict[str, int], closed: dict[int, str]
) -> None:
    assert surplus(found, busy, LIMITS, NOW) == closed


@pytest.mark.parametrize(
    ("host", "owner"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("::1", "::1"),
        ("no address", "no address"),
    ],
)
def test_whose_an_address_is(host: str, owner: str) -> None:
    assert owner_of(host) == owner


class Transport:
    aborted = False

    def abort(self) -> None:
        self.aborted = True


class Connection:
    """What a sweep sees of aiohttp's handler."""

    def __init__(self, address: str = FAR) -> None:
        self.peername = (address, 1)
        self.transport: Transport | None = Transport()

    def force_close(self) -> None:
        self.transport = None


class Body:
    """A request's body, of which a part may be missing."""

    def __init__(self, arrived: bool = True) -> None:
        self.arrived = arrived

    def is_eof(self) -> bool:
        return self.arrived


def test_a_request_begins_the_waiting_anew() -> None:
    open_, served, busy = Connection(), Connection(), Connection()
    transports = [each.transport for each in (open_, served, busy)]
    all_: Any = [open_, served, busy]
    kept = Connections(ConnectionLimits(in_all=9, of_address=9))
    kept.begin(all_[2], Body())
    kept.sweep(all_, NOW)
    kept.begin(all_[1], Body())
    kept.end(all_[1])
    kept.sweep(all_, NOW + 20)
    kept.sweep(all_, NOW + WAIT_S + 1)
    assert [transport.aborted for transport in transports if transport] == [True, False, False]
    assert (kept.open, kept.closed) == (3, {SLOW: 1})
    kept.sweep(all_[1:], NOW + 20 + WAIT_S + 1)
    assert [transport.aborted for transport in transports if transport] == [True, True, False]


def test_clients_that_send_bodies_slowly_are_limited_too() -> None:
    """A body is no work for the gateway: its client can hold the connection like a silent one."""
    all_: Any = [Connection() for _ in range(6)]
    kept = Connections(LIMITS)
    for connection in all_[:5]:
        kept.begin(connection, Body(arrived=False))
    kept.begin(all_[5], Body())
    kept.sweep(all_, NOW)
    kept.sweep(all_, NOW + 2)
    assert kept.closed == {TOO_MANY_OF_ADDRESS: 3}
    assert all_[5].transport is not None


def test_a_body_that_begins_after_a_pause_has_its_own_time() -> None:
    connection: Any = Connection()
    kept = Connections(LIMITS)
    kept.sweep([connection], NOW)
    kept.begin(connection, Body(arrived=False))
    kept.sweep([connection], NOW + WAIT_S - 1)
    kept.sweep([connection], NOW + WAIT_S + 5)
    assert connection.transport is not None


def test_a_limit_is_kept_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []

    class Log:
        def warning(self, event: str, **values: Any) -> None:
            lines.append(values)

    monkeypatch.setattr(connections, "log", Log())
    many: Any = [Connection() for _ in range(8)]
    kept = Connections(LIMITS)
    for second in range(3):
        kept.sweep([each for each in many if each.transport], NOW + second)
    assert kept.closed == {TOO_MANY_OF_ADDRESS: 5}
    assert [each.transport is None for each in many] == [True] * 5 + [False] * 3
    assert lines == [{"open": 8, "address": FAR, "reason": TOO_MANY_OF_ADDRESS}]


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "in_all"),
    [
        (1024, 65536, 2304, 2048),
        (4096, 4096, None, 2048),
        (1024, resource.RLIM_INFINITY, 2304, 2048),
        (256, 1024, 1024, 768),
        (256, 256, 256, 128),
    ],
)
def test_open_files_allow_the_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, in_all: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: seen.append(limits[0]))
    assert limits_of(2048, 512) == ConnectionLimits(in_all=in_all, of_address=512)
    assert seen == ([] if raised is None else [raised])


def test_aiohttp_has_what_a_sweep_needs() -> None:
    for name in ("peername", "transport", "force_close"):
        assert hasattr(web.RequestHandler, name)
    assert hasattr(web.Server, "connections")
