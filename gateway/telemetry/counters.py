"""Counters for the metrics: plain numbers, so that counting costs a request next to nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

from aiohttp import web
from msgspec import Struct

from shared.messages.jobs import Result
from shared.messages.offers import Decision, DecisionKind

# An offer is to be answered within milliseconds, upstream waits 3 s, an operator's command takes up to 40.
BOUNDS_S: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    *(0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 45.0),
)
AGAIN: Final = "again"  # an offer that was accepted before and got the same answer
DECISIONS: Final = (*DecisionKind, AGAIN)  # what decisions are counted by
NOWHERE: Final = "none"  # the route of a request to a path that isn't there


class Latencies(Struct):
    """One histogram."""

    counts: list[int]  # by bucket, the last one has no bound
    seconds: float = 0.0


class Starts(Struct):
    """Jobs begun after their offer was accepted without data."""

    in_time: int = 0
    late: int = 0  # the reservation had lapsed, a slot was free
    refused: int = 0  # no slot was free, or the task was not accepted
    mismatched: int = 0  # refused: not what was offered, or not by its validator


class Measures:
    """Counts since this process started; `results` come from the logs, so they outlast it."""

    def __init__(self) -> None:
        self.decisions: Counter[str] = Counter()  # by DECISIONS
        self.newest: Decision | None = None
        self.starts = Starts()
        self.results: Counter[str] = Counter()  # by status
        self.late_submissions = 0
        self.malformed_offers = 0
        self.moved_jobs = 0  # that no node had claimed, by this gateway
        self.latencies: dict[tuple[str, int], Latencies] = {}  # by route and status
        self._by_route: dict[tuple[web.AbstractRoute, int], Latencies] = {}

    def decided(self, decision: Decision, received_at: float) -> None:
        """Count one decision on an offer that was received at that time."""
        counted: str = decision.kind
        if decision.accepted:  # also in a record without a kind
            counted = AGAIN if decision.decided_at < received_at else DecisionKind.ACCEPTED
        self.decisions[counted] += 1
        self.newest = decision

    def ended(self, result: Result) -> None:
        """Count one ended task."""
        self.results[result.status.value] += 1
        if result.deadline_margin_s is not None and result.deadline_margin_s < 0:
            self.late_submissions += 1

    def answered(self, route: web.AbstractRoute, status: int, seconds: float) -> None:
        """Count one answered request."""
        latencies = self._by_route.get((route, status)) or self._latencies(route, status)
        latencies.counts[bisect_left(BOUNDS_S, seconds)] += 1
        latencies.seconds += seconds

    def _latencies(self, route: web.AbstractRoute, status: int) -> Latencies:
        """Return a route's histogram: both spellings of a path count together, all unknown paths as one."""
        name = NOWHERE
        if route.resource is not None:
            name = route.resource.canonical.rstrip("/") or "/"
        new = Latencies([0] * (len(BOUNDS_S) + 1))
        latencies = self.latencies.setdefault((name, status), new)
        if route.resource is not None:  # else aiohttp made it for this one request
            self._by_route[route, status] = latencies
        return latencies
