"""Count what became of the jobs of each day (UTC)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from gateway.learning.evidence import first_place
from gateway.state.ledger import Ledger
from shared.messages.jobs import Result, ResultStatus, Score


class DayCounts(Struct, frozen=True, kw_only=True):
    """The jobs that ended on one day, and of the scored ones how many were first."""

    day: str  # 2026-11-27
    submitted: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    late: int = 0  # of the submitted ones, after the deadline
    scored: int = 0
    first: int = 0


class DayPage(Struct, frozen=True):
    """One entry per day with an end, oldest first."""

    days: list[DayCounts]


def day_of(at: float) -> str:
    """Return the UTC day of a time."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def day_counts(ends: Iterable[tuple[Result, Score | None]], since: float) -> list[DayCounts]:
    """Return the counts of every day with an end after `since`."""
    days: dict[str, DayCounts] = {}
    for result, score in ends:
        if result.at < since:
            continue
        day = day_of(result.at)
        counts = days.get(day) or DayCounts(day=day)
        late = result.status is ResultStatus.SUBMITTED and (result.deadline_margin_s or 0.0) < 0
        grown = {
            result.status.value: getattr(counts, result.status.value) + 1,
            "late": counts.late + late,
            "scored": counts.scored + (score is not None),
            "first": counts.first + (score is not None and first_place(score)),
        }
        days[day] = msgspec.structs.replace(counts, **grown)
    return [days[day] for day in sorted(days)]


def ends_of(ledger: Ledger, score_of: Callable[[str], Score | None]) -> list[tuple[Result, Score | None]]:
    """Return every result, with upstream's score of it."""
    found = []
    for task in ledger.tasks():
        result = ledger.chain_of(task.record).result
        if result is not None:
            found.append((result, score_of(task.record.task)))
    return found
