"""The course of a run as it is shown."""

from __future__ import annotations

import itertools

import pytest

from gateway.views.run import RunPoint, run_view, thinned
from shared.messages.runs import Phase


def training(count: int) -> list[RunPoint]:
    return [RunPoint(at=float(step), phase=Phase.TRAIN, step=step, loss=2.0) for step in range(count)]


@pytest.mark.parametrize(("count", "most", "kept"), [(0, 5, 0), (5, 5, 5), (10_000, 100, 100), (7, 1, 1)])
def test_a_curve_has_a_bounded_length_and_keeps_its_ends(count: int, most: int, kept: int) -> None:
    points = thinned(training(count), most)
    assert len(points) == kept
    assert all(before.step < after.step for before, after in itertools.pairwise(points))
    if kept:
        assert points[-1].step == count - 1
    if kept > 1:
        assert points[0].step == 0


@pytest.mark.parametrize(
    ("times", "gaps", "after_s"),
    [
        ([], [], 20.0),
        ([1.0], [], 20.0),
        ([0.0, 1.0, 2.0, 22.0], [], 20.0),  # a slow step or a compiler
        ([0.0, 1.0, 2.0, 22.5, 23.0, 60.0, 61.0], [(2.0, 22.5), (23.0, 60.0)], 20.0),
        ([0.0, 30.0, 60.0, 90.0, 230.0, 390.0], [(230.0, 390.0)], 150.0),  # a step takes half a minute
    ],
)
def test_a_time_without_a_report_is_a_gap(
    times: list[float], gaps: list[tuple[float, float]], after_s: float
) -> None:
    points = [RunPoint(at=at, phase=Phase.TRAIN, step=step, loss=2.0) for step, at in enumerate(times)]
    view = run_view("t", points, 3)
    assert ([(gap.from_at, gap.to_at) for gap in view.gaps], view.gap_after_s) == (gaps, after_s)


def test_other_phases_are_no_gap_in_the_curve() -> None:
    points = [RunPoint(at=10.0 * n, phase=Phase.TRAIN if n in (0, 6) else Phase.CHOOSE) for n in range(7)]
    assert run_view("t", points, 100).gaps == []


def test_development_points_are_changes_of_the_loss() -> None:
    base = RunPoint(at=0.0, phase=Phase.BASELINE, base_loss=3.0, dev_loss=3.0)
    points = [base]
    for step, dev in enumerate([3.0, 3.0, 2.5, 2.5, 2.7], 1):
        point = RunPoint(at=float(step), phase=Phase.TRAIN, step=step, loss=2.0, base_loss=3.0, dev_loss=dev)
        points.append(point)
    view = run_view("t", points, 100)
    assert [(each.step, each.loss) for each in view.development] == [(0, 3.0), (3, 2.5), (5, 2.7)]
    assert view.base_loss == 3.0
    assert view.points == len(view.curve.loss) == 5


def test_phases_begin_again_after_a_restart_and_messages_are_kept() -> None:
    order = [Phase.LOADING, Phase.TRAIN, Phase.LOADING, Phase.TRAIN, Phase.TRAIN, Phase.DONE]
    points = [RunPoint(at=float(at), phase=phase) for at, phase in enumerate(order)]
    points[2] = RunPoint(at=2.0, phase=Phase.LOADING, step=7, message="resumed from step 7")
    view = run_view("t", points, 100)
    assert [each.phase for each in view.phases] == [order[0], order[1], order[2], order[3], order[5]]
    assert [(each.step, each.text) for each in view.messages] == [(7, "resumed from step 7")]


def test_a_later_part_is_the_same_as_in_the_whole() -> None:
    """A loss that was known before is no new measurement, and a phase that goes on no new one."""
    points = [
        RunPoint(at=0.0, phase=Phase.LOADING, message="plan"),
        *(
            RunPoint(
                at=float(step), phase=Phase.TRAIN, step=step, loss=2.0, dev_loss=2.5 if step < 40 else 2.4
            )
            for step in (*range(1, 20), *range(40, 50))
        ),
        RunPoint(at=60.0, phase=Phase.DONE, dev_loss=2.4, message="over"),
    ]
    whole, later = run_view("t", points, 1000), run_view("t", points, 1000, after=10.0)
    assert later.curve.at == [at for at in whole.curve.at if at > 10]
    assert later.points == len(later.curve.at) == 19
    assert later.development == whole.development[1:] != []
    assert [phase.phase for phase in later.phases] == [Phase.DONE]
    assert [message.text for message in later.messages] == ["over"]
    assert (later.gaps, later.gap_after_s) == (whole.gaps, whole.gap_after_s)
    assert run_view("t", points, 5, after=10.0).curve.at[0] == 11.0  # thinned after the cut
    end = run_view("t", points, 1000, after=60.0)
    assert (end.points, end.development, end.phases, end.messages, end.gaps) == (0, [], [], [], [])
