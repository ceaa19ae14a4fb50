"""What a tracker stores of a run's course: rows of numbers, each with a key that no other row has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from msgspec import Struct

from gateway.views.run import RunView
from shared.messages.jobs import Score
from shared.messages.runs import Metrics

# The order in which a curve is read; its own names -> the tracker's.
CURVE = {
    "step": "train/step",
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "tokens_per_s": "train/tokens_per_s",
    "progress": "train/progress",
}
MEASURED = ("steps", "tokens", "tokens_per_s", "train_s")


class TrackedRow(Struct, frozen=True):
    """The numbers of one moment. A store keeps one row of a key, however often it gets it."""

    key: str  # within its run
    at: float
    step: int  # seconds since the run's time began: unlike an optimiser step it never goes back
    values: dict[str, float]

    @property
    def timestamp(self) -> str:
        """Return the time as ISO 8601, in UTC."""
        return datetime.fromtimestamp(self.at, UTC).isoformat()


def rows_of(course: RunView, began_at: float) -> list[TrackedRow]:
    """Return the points of a course: of its curve and of the development rows."""
    return [*_curve(course, began_at), *_development(course, began_at)]


def result_row(metrics: Metrics | None, margin_s: float | None, at: float, began_at: float) -> TrackedRow:
    """Return the row of one result; a run that is resumed may have another one later.

    `margin_s` is None if nothing was submitted.
    """
    values: dict[str, float | None] = {"result/submitted": float(margin_s is not None)}
    values["result/margin_s"] = margin_s
    if metrics is not None:
        values |= {"result/base_loss": metrics.base_loss, "result/held_out_loss": metrics.final_loss}
        if metrics.final_loss is not None:
            values["result/gain"] = metrics.base_loss - metrics.final_loss
        values |= {f"result/{name}": getattr(metrics, name) for name in MEASURED}
    return _row(f"result-{_milliseconds(at)}", at, began_at, values)


def score_row(score: Score, began_at: float) -> TrackedRow:
    """Return the row of upstream's score."""
    names = ("quality_score", "test_loss", "synth_loss")
    values = {f"score/{name}": getattr(score, name) for name in names}
    return _row(f"score-{score.record_id}", score.at, began_at, values)


def _curve(course: RunView, began_at: float) -> Iterator[TrackedRow]:
    curve = course.curve
    for index, at in enumerate(curve.at):
        values = {name: getattr(curve, field)[index] for field, name in CURVE.items()}
        yield _row(f"train-{_milliseconds(at)}", at, began_at, values)


def _development(course: RunView, began_at: float) -> Iterator[TrackedRow]:
    for point in course.development:
        values = {"dev/loss": point.loss, "train/step": point.step}
        yield _row(f"dev-{_milliseconds(point.at)}", point.at, began_at, values)


def _row(key: str, at: float, began_at: float, values: Mapping[str, float | None]) -> TrackedRow:
    known = {name: value for name, value in values.items() if value is not None}
    return TrackedRow(key, at, max(0, int(at - began_at)), known)


def _milliseconds(at: float) -> int:
    return round(at * 1000)
