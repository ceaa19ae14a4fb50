"""The clock's rules at any moment, without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.planning.throughput import Costs
from trainer_node.engine.time_budget import Part, affordable
from trainer_node.engine.train.schedule import FIRST_SAVE, SAVE_SHARE, Schedule, ScheduleState, Shape


def _schedule(
    costs: Costs | None = None,
    shape: Shape = Shape(0.03),  # noqa: B008
    most_steps: int | None = None,
    **changes: float,
) -> Schedule:
    given_ = {"start_at": 0.0, "ready_by": 1000.0, "max_tokens": 1e9, "interval_s": 60.0, **changes}
    return Schedule(
        ScheduleState(begun_at=20.0),
        costs or Costs(save_s=1.0, score_s=5.0, export_s=2.0, load_s=3.0, verify_s=4.0),
        start_at=given_["start_at"],
        ready_by=given_["ready_by"],
        max_tokens=given_["max_tokens"],
        shape=shape,
        most_steps=most_steps,
        expected_steps=100,
        interval_s=given_["interval_s"],
    )


def test_rate_warms_up_and_ends_at_exactly_zero() -> None:
    linear = Shape(0.03)
    assert [linear.at(progress) for progress in (0.0, 0.03, 1.0, 1.2)] == [0.0, 1.0, 0.0, 0.0]
    assert linear.at(0.515) == pytest.approx(0.5)
    assert Shape(0.0).at(0.0) == 1.0


def test_a_cosine_falls_to_its_floor() -> None:
    cosine = Shape(0.1, "cosine", 0.25)
    assert [cosine.at(progress) for progress in (0.0, 0.1, 1.0, 1.2)] == [0.0, 1.0, 0.25, 0.25]
    assert cosine.at(0.55) == pytest.approx(0.625)
    assert cosine.at(0.2) > Shape(0.1, "linear", 0.25).at(0.2)


def test_a_constant_rate_stays_at_its_peak() -> None:
    constant = Shape(0.2, "constant")
    assert [constant.at(progress) for progress in (0.1, 0.2, 0.9, 1.0)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_that_only_warms_up_reaches_its_peak_at_the_end() -> None:
    assert [Shape(1.0, "cosine").at(progress) for progress in (0.5, 0.99)] == [0.5, 0.99]


@given(st.floats(0, 1), st.floats(0, 0.5), st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 1))
def test_rate_stays_within_bounds(progress: float, warmup: float, decay: str, floor: float) -> None:
    assert 0.0 <= Shape(warmup, decay, floor).at(progress) <= 1.0


def test_a_limit_of_steps_ends_a_run_and_shapes_its_rate() -> None:
    schedule = _schedule(shape=Shape(1.0), most_steps=10)
    rates = []
    for step in range(10):
        assert schedule.update(20.0, 5 * step, step) < 1.0
        rates.append(schedule.rate())
    assert rates == pytest.approx([(step + 0.5) / 10 for step in range(10)])
    assert schedule.update(20.0, 50, 10) == 1.0


@given(
    st.lists(st.tuples(st.floats(0, 3000), st.integers(0, 2_000_000), st.floats(0, 100)), max_size=30),
    st.floats(0, 30),
)
def test_progress_never_goes_back(moments: list[tuple[float, int, float]], save_s: float) -> None:
    schedule = _schedule(max_tokens=1e6)
    seen = 0.0
    for now, tokens, step_s in moments:
        progress = schedule.update(now, tokens)
        assert seen <= progress <= 1.0
        seen = progress
        schedule.stepped(step_s)
        schedule.save_begun(now, save_s)
        schedule.saved(save_s, 0.0)


def test_progress_is_the_larger_share_of_time_and_tokens() -> None:
    schedule = _schedule(max_tokens=1000)
    assert schedule.update(20.0, 300) == pytest.approx(0.3)
    middle = (20.0 + schedule.end_at) / 2
    assert schedule.update(middle, 300) == pytest.approx(0.5)
    assert schedule.update(middle, 1000) == 1.0


def test_training_ends_before_the_closing_and_one_late_step() -> None:
    schedule = _schedule()
    schedule.stepped(8.0)
    end = schedule.end_at
    assert schedule.update(end - 1e-6, 0) < 1.0
    assert schedule.update(end, 0) == 1.0
    assert end + 8.0 + schedule.costs.closing_s <= 1000.0


def test_what_is_kept_in_reserve_pays_for_scoring_and_verifying() -> None:
    schedule = _schedule()
    schedule.stepped(8.0)
    last_step, freeing_s = 8.0, 0.9  # begun just before the end
    left = 1000.0 - (schedule.end_at + last_step + freeing_s)
    assert affordable(left, schedule.costs) >= {Part.VERIFY, Part.SCORE}


def test_one_slow_first_step_does_not_eat_the_budget() -> None:
    schedule = _schedule()
    schedule.stepped(90.0)
    for _ in range(4):
        schedule.stepped(2.0)
    assert schedule.step_s == 6.0


def test_reserve_is_replaced_by_what_is_measured() -> None:
    schedule = _schedule()
    before = schedule.end_at
    schedule.saved(21.0, 0.0)  # the last save is half of one, in parallel to 5 s of scoring
    assert schedule.end_at == pytest.approx(before - (1.25 * 10.5 - 5.0))


@pytest.mark.parametrize("step_s", [0.5, 5.0, 20.0])
@pytest.mark.parametrize("save_s", [0.1, 3.0])
def test_first_checkpoint_is_on_disk_by_a_tenth_of_the_budget(step_s: float, save_s: float) -> None:
    schedule = _schedule(Costs(save_s=save_s))
    now = schedule.state.begun_at
    while True:
        now += step_s
        schedule.stepped(step_s)
        if schedule.save_due(now):
            break
    assert now + save_s <= FIRST_SAVE * 1000.0


def test_the_first_checkpoint_waits_for_no_more_than_an_interval() -> None:
    schedule = _schedule(Costs(save_s=0.05), interval_s=10.0)
    begun = now = schedule.state.begun_at
    while not schedule.save_due(now):
        now += 0.5
        schedule.stepped(0.5)
    assert 10.0 <= now - begun < 11.0


def test_saves_keep_to_their_interval_and_share() -> None:
    schedule = _schedule(interval_s=10.0)
    now, saves = 20.0, 0
    while schedule.update(now, 0) < 1.0:
        now += 1.0
        schedule.stepped(1.0)
        if schedule.save_due(now):
            schedule.save_begun(now, 0.5)
            schedule.saved(2.0, 1.5)
            now += 2.0
            saves += 1
    assert saves > 3
    assert schedule.state.saving_s + 2.0 <= SAVE_SHARE * now + 2.0


def test_no_save_is_begun_that_the_last_one_would_wait_for() -> None:
    schedule = _schedule(Costs(save_s=8.0), interval_s=1.0)
    schedule.save_begun(20.0, 0.0)
    assert schedule.save_due(schedule.end_at - 11.0)
    assert not schedule.save_due(schedule.end_at - 9.0)


def test_closing_skips_in_the_stated_order() -> None:
    costs = Costs(load_s=4.0, score_s=20.0, export_s=4.0, verify_s=4.0)
    kept = [affordable(left, costs) for left in (0.0, 5.9, 16.1, 41.1, 66.1)]
    assert kept[0] == kept[1] == frozenset()
    assert kept[2] == {Part.VERIFY}
    assert kept[3] == {Part.VERIFY, Part.SCORE}
    assert kept[4] == {Part.VERIFY, Part.SCORE, Part.AVERAGE}


def test_first_and_last_step_are_not_wasted() -> None:
    schedule = _schedule()
    assert schedule.rate() > 0.1
    schedule.state.step_s = [10.0]
    schedule.state.progress = 1.0 - 10.0 / (schedule.end_at - 20.0)
    assert 0.0 < schedule.rate() < 0.01
