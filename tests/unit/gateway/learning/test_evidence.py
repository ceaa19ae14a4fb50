"""Learned rates: what counts as what, how it fades, and that the order of evidence doesn't matter."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.learning.delivery import Counts
from gateway.learning.evidence import (
    Case,
    Evidence,
    Observation,
    Tally,
    among_first_four,
    observations,
)
from gateway.policy.model_family import model_family
from shared.clock import DAY_S
from shared.messages.jobs import ResultStatus, Score
from shared.messages.offers import TaskType
from shared.messages.runs import ErrorCode

NOW = 1_800_000_000.0
HALF_LIFE_S = 30 * DAY_S
INSTRUCT = TaskType.INSTRUCT
SUBMITTED, FAILED, EXPIRED, CANCELLED = (
    ResultStatus.SUBMITTED,
    ResultStatus.FAILED,
    ResultStatus.EXPIRED,
    ResultStatus.CANCELLED,
)


def score(quality: float, synth: float | None = None, **fields: Any) -> Score:
    values: dict[str, Any] = {
        "record_id": "r",
        "task_id": "t",
        "task": "t",
        "task_type": INSTRUCT,
        "model": "meta-llama/Llama-3.2-1B",
        "quality_score": quality,
        "synth_loss": synth,
        "scored_at": NOW,
    }
    return Score(**(values | fields))


def evidence(**fields: Any) -> Evidence:
    values: dict[str, Any] = {"prior_strength": 10.0, "half_life_s": HALF_LIFE_S, "family": model_family}
    return Evidence(**(values | fields))


def outcomes(case: Case) -> dict[str, bool]:
    return {each.table: each.success for each in observations(case, "llama")}


@pytest.mark.parametrize(
    ("status", "scored", "expected"),
    [
        (SUBMITTED, None, {"task_success": True}),
        (FAILED, None, {"task_success": False}),
        (EXPIRED, None, {"task_success": False}),
        (CANCELLED, None, {}),
        (CANCELLED, score(-1), {}),
        (None, None, {}),
        (SUBMITTED, score(3, 1.2), {"task_weight": True, "model_performance": True, "task_success": True}),
        (SUBMITTED, score(0, 1.2), {"task_weight": False, "model_performance": True, "task_success": True}),
        (
            SUBMITTED,
            score(0, 1000.0),
            {"task_weight": False, "model_performance": False, "task_success": True},
        ),
        # a penalty takes back what we believed to be submitted
        (SUBMITTED, score(-1), {"task_weight": False, "model_performance": False, "task_success": False}),
        # a place on the podium proves that something was there, whatever we saw of our own upload
        (FAILED, score(3), {"task_weight": True, "model_performance": True, "task_success": True}),
        (FAILED, score(0), {"task_weight": False, "model_performance": False, "task_success": False}),
        # what this fleet never ran
        (None, score(0, 1.2), {"task_weight": False, "model_performance": True, "task_success": True}),
        (None, score(-1), {"task_weight": False, "model_performance": False, "task_success": False}),
    ],
)
def test_what_a_task_says_of_the_three_rates(
    status: ResultStatus | None, scored: Score | None, expected: dict[str, bool]
) -> None:
    assert outcomes(Case(task_type=INSTRUCT, model="m", status=status, score=scored)) == expected


@pytest.mark.parametrize("code", [None, *ErrorCode])
def test_only_a_failure_for_its_data_says_nothing_of_delivery(code: ErrorCode | None) -> None:
    """Whatever else a job fails for, a missing model included, may be our own fault."""
    failed = Case(task_type=INSTRUCT, model="m", status=FAILED, code=code)
    assert outcomes(failed) == ({} if code is ErrorCode.BAD_DATA else {"task_success": False})
    others_could = msgspec.structs.replace(failed, score=score(-1))
    assert outcomes(others_could)["task_success"] is False


def test_jobs_with_unusable_data_do_not_touch_the_rates_until_upstream_scores_them() -> None:
    learned = evidence()
    for number in range(20):
        learned.note_result(f"t{number}", INSTRUCT, "org/llama", FAILED, NOW, ErrorCode.BAD_DATA)
    tables = learned.tables(NOW)
    assert tables.task_success.rate(INSTRUCT).value == tables.delivery_of(INSTRUCT, "llama").value == 0.90
    assert (learned.results, learned.unused) == (0, 20)
    learned.note_score(score(-1, task="t3"))
    assert (learned.results, learned.unused) == (1, 19)
    tables = learned.tables(NOW)
    assert tables.task_success.rate(INSTRUCT).value == pytest.approx(9 / 11)
    assert tables.delivery_of(INSTRUCT, "llama").value == pytest.approx(9 / 11)
    learned.forget_scores()
    assert learned.tables(NOW).delivery_of(INSTRUCT, "llama").value == 0.90


@pytest.mark.parametrize(
    ("quality", "synth", "first_four"),
    [
        (3, None, True),
        (0, 2.5, True),
        (0, 1000.0, False),
        (0, None, False),
        (0, float("nan"), False),
        (0, float("inf"), False),
        (-1, 0.3, False),  # the worst quarter of a large pool has measured losses and a penalty
    ],
)
def test_who_was_among_the_first_four(quality: float, synth: float | None, first_four: bool) -> None:
    assert among_first_four(score(quality, synth)) is first_four


def test_counts_and_prior_are_in_the_cause() -> None:
    learned = evidence()
    for number in range(3):
        status = FAILED if number == 0 else SUBMITTED
        learned.note_result(f"t{number}", INSTRUCT, "org/llama", status, NOW)
    rate = learned.tables(NOW).task_success.rate(INSTRUCT)
    assert msgspec.structs.astuple(rate) == (
        pytest.approx((9 + 2) / (10 + 3)),
        "2.0 of 3.0 delivered (evidence halves every 30 days), prior 9 of 10",
        pytest.approx(2.0),
        pytest.approx(3.0),
        0.0,
    )
    assert learned.tables(NOW).task_success.rate("DpoTask").value == 0.90
    half = learned.tables(NOW + HALF_LIFE_S).task_success.rate(INSTRUCT)
    assert half.value == pytest.approx((9 + 1) / (10 + 1.5))
    assert half.cause.startswith("1.0 of 1.5 delivered")
    assert (
        learned.tables(NOW + 20 * HALF_LIFE_S).task_success.rate(INSTRUCT).cause
        == "house value for InstructTextTask"
    )


def test_each_table_has_its_own_key_and_prior() -> None:
    learned = evidence(prior_strength=4.0)
    learned.note_score(score(3, 1.0))
    tables = learned.tables(NOW)
    assert tables.task_weight.rate(INSTRUCT).value == pytest.approx((1 + 1) / 5)
    assert tables.model_performance.rate("llama").value == pytest.approx((3 + 1) / 5)
    assert tables.task_success.rate(INSTRUCT).value == pytest.approx((3.6 + 1) / 5)
    assert set(tables.model_performance.learned) == {"llama"}


def test_the_same_again_changes_nothing_and_a_new_score_replaces_the_old_one() -> None:
    learned = evidence()
    learned.note_result("t", INSTRUCT, "org/qwen", SUBMITTED, NOW)
    learned.note_score(score(3))
    before, version = learned.tables(NOW), learned.version
    learned.note_score(score(3))
    learned.note_result("t", INSTRUCT, "org/qwen", SUBMITTED, NOW)
    assert (learned.tables(NOW), learned.version, learned.results, learned.scores) == (before, version, 1, 1)
    learned.note_score(score(-1))
    tables = learned.tables(NOW)
    assert tables.task_weight.rate(INSTRUCT).value == pytest.approx(2.5 / 11)
    assert tables.task_success.rate(INSTRUCT).value == pytest.approx(9 / 11)
    assert set(tables.model_performance.learned) == {"qwen"}  # the job's model, not the score's


def test_a_result_corrects_what_a_score_alone_had_said() -> None:
    learned = evidence()
    learned.note_score(score(0, 1.0, model="org/gemma", task_type=TaskType.DPO))
    learned.note_result("t", INSTRUCT, "org/qwen", SUBMITTED, NOW - HALF_LIFE_S)
    tables = learned.tables(NOW)
    assert set(tables.task_weight.learned) == set(tables.task_success.learned) == {"InstructTextTask"}
    assert set(tables.model_performance.learned) == {"qwen"}
    assert tables.task_success.rate(INSTRUCT).trials == pytest.approx(0.5)  # as old as the run


def test_forgotten_scores_leave_the_results() -> None:
    learned = evidence()
    learned.note_result("t", INSTRUCT, "org/llama", SUBMITTED, NOW)
    learned.note_score(score(-1))
    learned.forget_scores()
    tables = learned.tables(NOW)
    assert (learned.results, learned.scores) == (1, 0)
    assert tables.task_success.rate(INSTRUCT).value == pytest.approx(10 / 11)
    assert not tables.task_weight.learned
    assert not tables.model_performance.learned


def test_bad_luck_never_locks_a_type_out_for_ever() -> None:
    learned = evidence()
    for number in range(500):
        learned.note_result(f"t{number}", INSTRUCT, "org/llama", FAILED, NOW)
    success = [
        learned.tables(NOW + months * HALF_LIFE_S).task_success.rate(INSTRUCT).value for months in range(15)
    ]
    assert success[0] < 0.02
    assert success == sorted(success)
    assert success[-1] == pytest.approx(0.9, abs=0.01)


times = st.floats(NOW - 400 * DAY_S, NOW)
trials = st.lists(st.tuples(st.booleans(), times), max_size=20)


def tally(found: list[tuple[bool, float]]) -> Tally:
    made = Tally(HALF_LIFE_S)
    for success, at in found:
        made.add(Observation("task_success", "x", success, at))
    return made


@given(found=trials, house=st.floats(0, 1), strength=st.floats(1e-3, 1e6), later=st.floats(0, 4000))
def test_a_rate_lies_between_0_and_1_and_goes_back_to_the_house_value(
    found: list[tuple[bool, float]], house: float, strength: float, later: float
) -> None:
    counted = tally(found)
    now = Counts(*counted.counts(NOW)).posterior(house, strength)
    then = Counts(*counted.counts(NOW + later * DAY_S)).posterior(house, strength)
    assert 0 <= now <= 1
    assert 0 <= then <= 1
    assert abs(then - house) <= abs(now - house) + 1e-9
    assert Counts(*counted.counts(NOW + 1e5 * DAY_S)).posterior(house, strength) == pytest.approx(house)


@given(found=trials, more=times, house=st.floats(0, 1))
def test_a_success_never_lowers_a_rate_and_a_failure_never_raises_it(
    found: list[tuple[bool, float]], more: float, house: float
) -> None:
    before = Counts(*tally(found).counts(NOW)).posterior(house, 10)
    assert Counts(*tally([*found, (True, more)]).counts(NOW)).posterior(house, 10) >= before - 1e-9
    assert Counts(*tally([*found, (False, more)]).counts(NOW)).posterior(house, 10) <= before + 1e-9


@given(found=trials, data=st.data())
def test_the_order_of_evidence_does_not_matter_and_what_is_taken_back_leaves_nothing(
    found: list[tuple[bool, float]], data: Any
) -> None:
    shuffled = data.draw(st.permutations(found))
    counted = tally(list(shuffled))
    assert counted.counts(NOW) == pytest.approx(tally(found).counts(NOW))
    for success, at in data.draw(st.permutations(found)):
        counted.add(Observation("task_success", "x", success, at), -1)
    assert counted.counts(NOW) == pytest.approx((0, 0), abs=1e-9)


received = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.one_of(
            st.sampled_from(list(ResultStatus)),
            st.builds(score, st.sampled_from([3, 0, -1]), st.sampled_from([None, 1.5, 1000.0])),
        ),
    ),
    max_size=12,
    unique_by=lambda each: (each[0], isinstance(each[1], Score)),
)


@given(messages=received, data=st.data())
def test_tables_do_not_depend_on_what_was_heard_first(messages: list[tuple[str, Any]], data: Any) -> None:
    def learned(found: list[tuple[str, Any]]) -> Any:
        book = evidence()
        for task, message in found:
            if isinstance(message, Score):
                book.note_score(score(message.quality_score, message.synth_loss, task=task))
            else:
                book.note_result(task, INSTRUCT, "org/llama", message, NOW)
        tables = book.tables(NOW)
        return [
            {key: rate.value for key, rate in table.learned.items()}
            for table in (tables.task_weight, tables.model_performance, tables.task_success)
        ]

    ours, theirs = learned(messages), learned(list(data.draw(st.permutations(messages))))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other)
