"""A course as rows of a tracker."""

from __future__ import annotations

import pytest

from gateway.views.run import RunPoint, run_view
from podium.tracking.rows import TrackedRow, result_row, rows_of, score_row
from shared.messages.jobs import Score
from shared.messages.offers import TaskType
from shared.messages.runs import Metrics, Phase

BEGAN = 1000.0


def point(at: float, step: int, **fields: float) -> RunPoint:
    return RunPoint(at=BEGAN + at, phase=Phase.TRAIN, step=step, **fields)  # type: ignore[arg-type]


def test_each_point_is_a_row_and_its_step_is_time() -> None:
    points = [
        RunPoint(at=BEGAN + 1, phase=Phase.BASELINE, base_loss=3.0, dev_loss=3.0),
        point(5.2, 1, loss=2.9, lr=1e-4),
        point(6.2, 2, loss=2.8, lr=2e-4, tokens_per_s=50.0, progress=0.5),
        point(9.7, 1, loss=2.9, dev_loss=2.5),  # resumed from an earlier step
    ]
    rows = rows_of(run_view("t", points, 100), BEGAN)
    assert rows == [
        TrackedRow("train-1005200", 1005.2, 5, {"train/step": 1, "train/loss": 2.9} | rates(1e-4)),
        TrackedRow("train-1006200", 1006.2, 6, {"train/step": 2, "train/loss": 2.8} | rates(2e-4, 50.0, 0.5)),
        TrackedRow("train-1009700", 1009.7, 9, {"train/step": 1, "train/loss": 2.9, "train/progress": 0.0}),
        TrackedRow("dev-1001000", 1001.0, 1, {"dev/loss": 3.0, "train/step": 0}),
        TrackedRow("dev-1009700", 1009.7, 9, {"dev/loss": 2.5, "train/step": 1}),
    ]
    assert rows[0].timestamp == "1970-01-01T00:16:45.200000+00:00"


def rates(rate: float, tokens_per_s: float | None = None, progress: float = 0.0) -> dict[str, float]:
    known = {} if tokens_per_s is None else {"train/tokens_per_s": tokens_per_s}
    return {"train/learning_rate": rate, "train/progress": progress} | known


def test_a_thinned_curve_has_the_rows_of_the_whole_one() -> None:
    """A store that has some of them gets none twice."""
    points = [point(step + 0.25, step, loss=2.0) for step in range(1000)]
    keys = [{row.key for row in rows_of(run_view("t", points, most), BEGAN)} for most in (1000, 70)]
    assert len(keys[0]) == 1000
    assert len(keys[1]) == 70
    assert keys[1] < keys[0]


def test_a_later_part_has_no_row_of_what_was_before() -> None:
    points = [point(step, step, loss=2.0, dev_loss=2.5 if step < 15 else 2.4) for step in range(20)]
    rows = rows_of(run_view("t", points, 100, BEGAN + 9), BEGAN)
    assert [row.step for row in rows] == [*range(10, 20), 15]


@pytest.mark.parametrize(
    ("metrics", "margin_s", "values"),
    [
        (None, None, {"submitted": 0.0}),
        (Metrics(base_loss=3.0, steps=7), None, {"submitted": 0.0, "base_loss": 3.0, "steps": 7}),
        (
            Metrics(base_loss=3.0, final_loss=2.5),
            -4.0,
            {"submitted": 1.0, "margin_s": -4.0, "held_out_loss": 2.5, "gain": 0.5},
        ),
    ],
)
def test_the_result_has_what_was_measured(
    metrics: Metrics | None, margin_s: float | None, values: dict[str, float]
) -> None:
    row = result_row(metrics, margin_s, BEGAN + 100.5, BEGAN)
    assert (row.key, row.step) == (f"result-{round(1000 * (BEGAN + 100.5))}", 100)
    assert row.values.items() >= {f"result/{name}": value for name, value in values.items()}.items()
    assert ("result/held_out_loss" in row.values) == (metrics is not None and metrics.final_loss is not None)
    assert ("result/base_loss" in row.values) == (metrics is not None)


def test_a_newer_score_is_a_row_of_its_own() -> None:
    scores = [
        Score(
            record_id=name,
            task_id="t",
            task="t",
            task_type=TaskType.INSTRUCT,
            model="m",
            quality_score=quality,
            at=BEGAN + 5,
        )
        for name, quality in (("one", 0.0), ("two", 3.0))
    ]
    rows = [score_row(score, BEGAN) for score in scores]
    assert [(row.key, row.values) for row in rows] == [
        ("score-one", {"score/quality_score": 0.0}),
        ("score-two", {"score/quality_score": 3.0}),
    ]
