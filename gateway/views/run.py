"""Build the view of a run's course: a curve of bounded length, development points, phases and messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Final

from msgspec import Struct

from shared.messages.runs import Phase

LONGEST_CURVE: Final = 10_000  # points that one answer may have
MOST_MESSAGES: Final = 2000
GAP_S: Final = 20.0  # without a report; a run reports every second, and is noted every ten seconds at least
GAP_INTERVALS: Final = 5.0  # of a run whose reports are further apart, for example one per slow step


class RunPoint(Struct, frozen=True, array_like=True):
    """One point of a run; a line of the file is its fields as a JSON array."""

    at: float
    phase: Phase
    step: int = 0
    progress: float = 0.0
    tokens: int = 0
    loss: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    base_loss: float | None = None
    dev_loss: float | None = None
    message: str | None = None


class Curve(Struct, frozen=True):
    """The training points of a run as columns of equal length, oldest first."""

    at: list[float] = []
    step: list[int] = []
    progress: list[float] = []
    loss: list[float | None] = []
    lr: list[float | None] = []
    tokens_per_s: list[float | None] = []


class DevelopmentPoint(Struct, frozen=True):
    """One measurement of the development rows."""

    at: float
    step: int
    loss: float


class PhaseStart(Struct, frozen=True):
    """When a phase of a run began. A phase that begins again is a new attempt, or a resumed run."""

    at: float
    phase: Phase


class RunMessage(Struct, frozen=True):
    """Something the run said to people."""

    at: float
    phase: Phase
    step: int
    text: str


class Gap(Struct, frozen=True):
    """A time without a report: the node, the broker or the gateway was down, or the worker was silent."""

    from_at: float  # the last report before it
    to_at: float  # the first one after it


class RunView(Struct, frozen=True, kw_only=True):
    """The course of a task's run, as far as this gateway received it."""

    task: str
    points: int  # of the curve before it was thinned
    base_loss: float | None
    curve: Curve
    development: list[DevelopmentPoint]
    phases: list[PhaseStart]
    messages: list[RunMessage]  # the newest, oldest first
    gaps: list[Gap] = []  # oldest first
    gap_after_s: float = GAP_S  # how long this run must be silent for a gap


def run_view(task: str, points: Sequence[RunPoint], most: int, after: float = -math.inf) -> RunView:
    """Return the view, with at most `most` points of the curve; only of what came later than `after`."""
    training = [
        point
        for point in points
        if point.phase is Phase.TRAIN and point.loss is not None and point.at > after
    ]
    said = [RunMessage(each.at, each.phase, each.step, each.message) for each in points if each.message]
    after_s = gap_after(points)
    gaps = [Gap(one.at, next_.at) for one, next_ in pairwise(points) if next_.at - one.at > after_s]
    return RunView(
        gaps=[gap for gap in gaps if gap.to_at > after],
        gap_after_s=after_s,
        task=task,
        points=len(training),
        base_loss=next((point.base_loss for point in points if point.base_loss is not None), None),
        curve=curve_of(thinned(training, most)),
        # of the whole run first: whether a loss or a phase is a new one depends on what was before
        development=[each for each in development_of(points) if each.at > after],
        phases=[each for each in phases_of(points) if each.at > after],
        messages=[each for each in said if each.at > after][-MOST_MESSAGES:],
    )


def gap_after(points: Sequence[RunPoint]) -> float:
    """Return how many seconds without a report are a gap in this run."""
    usual_s = median([next_.at - one.at for one, next_ in pairwise(points)] or [0.0])
    return max(GAP_S, GAP_INTERVALS * usual_s)


def curve_of(points: Sequence[RunPoint]) -> Curve:
    """Return points as columns."""
    return Curve(**{name: [getattr(each, name) for each in points] for name in Curve.__struct_fields__})


def thinned(points: Sequence[RunPoint], most: int) -> list[RunPoint]:
    """Return at most `most` points at equal distances, with the first and the last."""
    if len(points) <= most:
        return list(points)
    if most == 1:
        return [points[-1]]
    stride = (len(points) - 1) / (most - 1)
    return [points[round(number * stride)] for number in range(most)]


def development_of(points: Sequence[RunPoint]) -> list[DevelopmentPoint]:
    """Return the measurements: every change of the loss, which progress repeats until the next one."""
    found: list[DevelopmentPoint] = []
    last: float | None = None
    for point in points:
        if point.dev_loss is not None and point.dev_loss != last:
            last = point.dev_loss
            found.append(DevelopmentPoint(point.at, point.step, point.dev_loss))
    return found


def phases_of(points: Sequence[RunPoint]) -> list[PhaseStart]:
    """Return when each phase began."""
    found: list[PhaseStart] = []
    for point in points:
        if not found or found[-1].phase is not point.phase:
            found.append(PhaseStart(point.at, point.phase))
    return found
