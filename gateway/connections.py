"""Bound the gateway's connections: how long one may wait without a request, how many there may be.

aiohttp waits for a first request for ever, and for a client that reads no response too. A sweep every quarter
second closes what has waited too long and, above a limit, what has waited longest: a validator's new
connection sends its request at once, so under an attack it is the attackers' connections that are closed.
A connection waits for its client until all of a request has arrived, and again once there is a response.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final, Protocol

from aiohttp import web
from msgspec import Struct

from shared.logs import get_logger
from shared.net import is_loopback

SWEEP_S: Final = 0.25
WAIT_S: Final = 30.0  # of waiting for the client; upstream's clients close idle connections after 5 s
GRACE_S: Final = 1.0  # what is younger is not closed because of a limit: its request may be on its way
SPARE_FILES: Final = 256  # descriptors for NATS, files and connections that come between two sweeps
LOG_S: Final = 60.0  # between two lines about a limit
SLOW, TOO_MANY, TOO_MANY_OF_ADDRESS = "slow", "too_many", "too_many_of_address"
REASONS: Final = (SLOW, TOO_MANY, TOO_MANY_OF_ADDRESS)

log = get_logger()


class ConnectionLimits(Struct, frozen=True):
    """The most connections in all, and of one address that is not this machine's."""

    in_all: int
    of_address: int


class WaitingConnection(Struct, frozen=True):
    """A connection that waits for its client: no request is being handled."""

    key: int
    address: str
    since: float


def surplus(
    waiting: Sequence[WaitingConnection], busy: Mapping[str, int], limits: ConnectionLimits, now: float
) -> dict[int, str]:
    """Return the keys of the connections to close, with the reason; `busy` counts the others by address.

    Loopback has no limit of its own: a proxy on this machine brings everyone from there.
    """
    closed = {one.key: SLOW for one in waiting if now - one.since > WAIT_S}
    left = sorted((one for one in waiting if one.key not in closed), key=lambda one: one.since)
    by_address: dict[str, list[WaitingConnection]] = defaultdict(list)
    for one in left:
        by_address[one.address].append(one)
    for address, members in by_address.items():
        if not is_loopback(address):
            excess = len(members) + busy.get(address, 0) - limits.of_address
            closed |= {one.key: TOO_MANY_OF_ADDRESS for one in _longest(members, excess, now)}
    left = [one for one in left if one.key not in closed]
    excess = len(left) + sum(busy.values()) - limits.in_all
    return closed | {one.key: TOO_MANY for one in _longest(left, excess, now)}


def _longest(waiting: Sequence[WaitingConnection], count: int, now: float) -> list[WaitingConnection]:
    return [one for one in waiting[: max(0, count)] if now - one.since >= GRACE_S]


@lru_cache(maxsize=4096)
def owner_of(host: str) -> str:
    """Return the address that a limit counts: of IPv6 the network of 64 bits that one customer gets."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address) or address.is_loopback:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))


class Body(Protocol):
    """A request's body, as aiohttp's StreamReader."""

    def is_eof(self) -> bool:
        """Return whether all of it has arrived."""
        ...


class Connections:
    """The open connections of one gateway: which are busy with a request, and since when the others wait."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open = 0  # at the newest sweep
        self.closed: Counter[str] = Counter()  # by REASONS
        self._requests: dict[web.RequestHandler, Body] = {}  # under way
        self._active: set[web.RequestHandler] = set()  # began or ended a request since the newest sweep
        self._since: dict[web.RequestHandler, float] = {}
        self._logged_at = float("-inf")

    def begin(self, connection: web.RequestHandler, body: Body) -> None:
        """Note that a request is under way: its head has arrived, and perhaps not all of its body."""
        self._requests[connection] = body
        self._active.add(connection)

    def end(self, connection: web.RequestHandler) -> None:
        """Note that its response is made; it is still to be sent."""
        self._requests.pop(connection, None)
        self._active.add(connection)

    async def watch(self, connections: Callable[[], Sequence[web.RequestHandler]]) -> None:
        """Sweep for ever."""
        clock = asyncio.get_running_loop()
        while True:
            self.sweep(connections(), clock.time())
            await asyncio.sleep(SWEEP_S)

    def sweep(self, connections: Sequence[web.RequestHandler], now: float) -> None:
        """Close what waits too long, or is too much."""
        before, active = self._since, self._active
        busy = {connection for connection, body in self._requests.items() if body.is_eof()}
        self._since = {
            connection: now if connection in active else before.get(connection, now)
            for connection in connections
            if connection not in busy
        }
        self._active = set()
        self.open = len(connections)
        oldest = min(self._since.values(), default=now)
        if now - oldest <= WAIT_S and self.open <= min(self.limits.in_all, self.limits.of_address):
            return
        keys = dict(enumerate(self._since))
        waiting = [
            WaitingConnection(key, _owner(connection), self._since[connection])
            for key, connection in keys.items()
        ]
        busy_of = Counter(_owner(connection) for connection in connections if connection in busy)
        for key, reason in surplus(waiting, busy_of, self.limits, now).items():
            self._close(keys[key])
            self.closed[reason] += 1
            if reason != SLOW and now - self._logged_at > LOG_S:
                self._logged_at = now
                log.warning(
                    "too many connections, those that wait longest are closed",
                    open=self.open,
                    address=waiting[key].address,
                    reason=reason,
                )

    @staticmethod
    def _close(connection: web.RequestHandler) -> None:
        transport = connection.transport
        connection.force_close()
        if transport is not None:
            transport.abort()  # `close` waits for a client that reads nothing


def _owner(connection: web.RequestHandler) -> str:
    peer = connection.peername
    return owner_of(peer[0]) if isinstance(peer, tuple) else ""


def limits_of(in_all: int, of_address: int) -> ConnectionLimits:
    """Return the limits, and raise this process's limit of open files to what they need.

    A process without descriptors accepts no connection at all: if the limit can't be raised, the number of
    connections is lowered, and that is logged.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = in_all + SPARE_FILES
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        in_all = max(soft - SPARE_FILES, soft // 2)
        log.warning("few open files are allowed: fewer connections are held", files=soft, connections=in_all)
    return ConnectionLimits(in_all, of_address)
