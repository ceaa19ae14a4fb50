"""Counts of each day's ends."""

from __future__ import annotations

from typing import Any

from gateway.views.days import DayCounts, day_counts
from shared.clock import DAY_S
from shared.messages.jobs import Result, ResultStatus, Score
from shared.messages.offers import TaskType

DAY = 20_000 * DAY_S  # 2024-10-04


def result(at: float, status: ResultStatus = ResultStatus.SUBMITTED, **fields: Any) -> Result:
    return Result(record_id="r", task="t", task_id="t", slot="a", status=status, at=at, **fields)


def score(quality: float) -> Score:
    return Score(
        record_id="s", task_id="t", task="t", task_type=TaskType.CHAT, model="m", quality_score=quality
    )


def test_ends_are_counted_by_utc_day_with_late_and_first_ones() -> None:
    ends = [
        (result(DAY + 1, deadline_margin_s=5.0), score(3)),
        (result(DAY + DAY_S - 1, deadline_margin_s=-5.0), score(0)),
        (result(DAY + 7, ResultStatus.FAILED), None),
        (result(DAY + 8, ResultStatus.FAILED, deadline_margin_s=-1.0), None),
        (result(DAY + DAY_S, ResultStatus.EXPIRED), None),
        (result(DAY - 1, ResultStatus.CANCELLED), None),
    ]
    assert day_counts(ends, since=DAY) == [
        DayCounts(day="2024-10-04", submitted=2, failed=2, late=1, scored=2, first=1),
        DayCounts(day="2024-10-05", expired=1),
    ]
