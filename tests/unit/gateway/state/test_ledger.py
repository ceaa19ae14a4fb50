"""The fold: what the logs say of tasks and slots, in whatever order the two are read."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from gateway.state.ledger import Ledger, TaskState
from shared import subjects
from shared.broker.jetstream import Record
from shared.messages.encoding import encode
from shared.messages.jobs import Reservation, ResultStatus, SlotDrain
from tests.log_records import (
    JOBS,
    NOW,
    STATE_A,
    claimed,
    decision,
    job,
    ledger_of,
    records,
    reservation,
    result,
    state_logs,
    state_of,
    submitting,
)


@pytest.mark.parametrize(
    ("states", "shown", "busy"),
    [
        ([], TaskState.QUEUED, True),
        ([claimed("t", "a")], TaskState.RUNNING, True),
        ([claimed("t", "a"), submitting("t", "a")], TaskState.SUBMITTING, True),
        # a new epoch takes over after `submitting`: still submitting, for a gateway must not end it now
        ([claimed("t", "a"), submitting("t", "a"), claimed("t", "a", 2)], TaskState.SUBMITTING, True),
        ([claimed("t", "a"), submitting("t", "a"), result("t", "a")], TaskState.SUBMITTED, False),
        ([result("t", "a", ResultStatus.FAILED)], TaskState.FAILED, False),
        ([result("t", "a", ResultStatus.EXPIRED)], TaskState.EXPIRED, False),
        ([result("t", "a", ResultStatus.CANCELLED)], TaskState.CANCELLED, False),
    ],
)
def test_states_shown_and_when_a_slot_is_busy(states: list[Struct], shown: TaskState, busy: bool) -> None:
    ledger = ledger_of([job("t", "a")], states)
    assert state_of(ledger, "t") is shown
    assert (ledger.holder("a", NOW) is not None) is busy
    assert ledger.holder("b", NOW) is None
    assert [open_job.task for open_job in ledger.open_jobs()] == (["t"] if busy else [])


def test_the_newest_job_decides() -> None:
    ledger = ledger_of([job("one", "a"), job("two", "a")], [result("one", "a")])
    holder = ledger.holder("a", NOW)
    assert holder is not None
    assert holder.record.task == "two"
    assert [task.record.task for task in ledger.tasks()] == ["two", "one"]


def test_a_reservation_holds_a_slot_until_it_lapses_or_becomes_a_job() -> None:
    ledger = ledger_of([reservation("t", "a", expires_at=NOW + 10)])
    assert state_of(ledger, "t") is TaskState.RESERVED
    assert ledger.holder("a", NOW) is ledger.task("t")
    assert ledger.accepted("t", NOW) == decision("t", "a")
    assert ledger.holder("a", NOW + 10) is None
    assert state_of(ledger, "t", NOW + 10) is TaskState.LAPSED
    assert ledger.accepted("t", NOW + 10) is None


def test_the_newest_drain_counts_and_touches_no_task() -> None:
    ledger = ledger_of([job("t", "a")])
    drained = list[str]()
    ledger.on_drain = drained.append
    for number, on in enumerate((True, True, False, True), start=2):
        record = SlotDrain(record_id=f"d{number}", slot="a", drained=on, reason=f"r{number}")
        ledger.apply(JOBS, Record(number, subjects.drain("a"), encode(record)))
        assert (ledger.drain_of("a") == record) is on
    assert drained == ["a"] * 4
    assert ledger.drain_of("b") is None
    assert state_of(ledger, "t") is TaskState.QUEUED
    assert ledger.malformed == 0
    stray = SlotDrain(record_id="x", slot="b", drained=True)
    ledger.apply(JOBS, Record(6, subjects.drain("a"), encode(stray)))
    ledger.apply(JOBS, Record(7, subjects.drain("a"), b"{}"))
    assert (ledger.malformed, ledger.drain_of("b")) == (2, None)


def test_no_task_has_the_subject_of_a_drain() -> None:
    for task_id in ("@drain", "drain", "a.@drain"):
        assert not subjects.is_drain(subjects.reservation("a", subjects.task_key(task_id)))
    assert subjects.is_drain(subjects.drain("box2-a"))


def test_a_reserved_task_may_start_on_another_slot() -> None:
    ledger = ledger_of([reservation("t", "a", expires_at=NOW + 10), job("t", "b")])
    assert ledger.holder("a", NOW) is None
    assert ledger.holder("b", NOW) is ledger.task("t")
    assert ledger.accepted("t", NOW + 99) == decision("t", "b")


def test_a_task_reserved_anew_elsewhere_leaves_its_old_slot() -> None:
    ledger = ledger_of(
        [reservation("t", "a", expires_at=NOW - 10), reservation("t", "b", expires_at=NOW + 10)]
    )
    assert ledger.holder("a", NOW) is None
    assert ledger.holder("b", NOW) is ledger.task("t")


def test_an_accepted_task_stays_accepted_after_its_result() -> None:
    ledger = ledger_of([job("t", "a")], [result("t", "a", ResultStatus.FAILED)])
    assert ledger.accepted("t", NOW) == decision("t", "a")
    assert ledger.accepted("other", NOW) is None


def test_the_first_result_counts_and_the_chain_knows_its_last_sequence() -> None:
    ledger = ledger_of([job("t", "a")], [result("t", "a"), result("t", "a", ResultStatus.FAILED)])
    chain = ledger.chain_of(job("t", "a"))
    assert chain.result == result("t", "a")
    assert chain.sequence == 2
    assert ledger.malformed == 1


def test_a_record_is_folded_once() -> None:
    ledger = ledger_of([job("one", "a"), job("two", "b")])
    (first, _) = records([job("one", "a"), job("two", "b")])
    ledger.apply(JOBS, first)
    assert ledger.folded[JOBS] == 2
    assert ledger.malformed == 0


@pytest.mark.parametrize(
    ("stream", "subject", "data"),
    [
        (JOBS, "podium.jobs.a.t", b"no json"),
        (JOBS, "podium.jobs.a.t", b"[" * 100_000),
        (JOBS, "podium.jobs.a.t", b'{"kind": "claimed"}'),
        (JOBS, "podium.jobs.a.other", encode(job("t", "a"))),
        (JOBS, "podium.jobs.b.t", encode(job("t", "a"))),
        (JOBS, "podium.reservations.a.t", encode(job("t", "a"))),
        (JOBS, "podium.jobs.a.t", encode(reservation("t", "a", NOW))),
        (STATE_A, "podium.state.a.t", b""),
        (STATE_A, "podium.state.a.t.u", encode(claimed("t", "a"))),
        (subjects.state_stream("b"), "podium.state.b.t", encode(claimed("t", "a"))),
        (STATE_A, "podium.state.a.t", encode(job("t", "a"))),
    ],
)
def test_malformed_records_are_counted_and_passed_over(stream: str, subject: str, data: bytes) -> None:
    ledger = ledger_of([job("good", "b")])
    ledger.apply(stream, Record(7, subject, data))
    assert ledger.malformed == 1
    assert ledger.folded[stream] == 7
    assert [task.record.task for task in ledger.tasks()] == ["good"]
    assert ledger.open_jobs() == [job("good", "b")]


def test_the_log_of_each_slot_that_got_a_job_is_read() -> None:
    ledger = Ledger(("a", "b"))
    assert ledger.folded == {JOBS: 0, "STATE-a": 0, "STATE-b": 0}
    for number, subject in enumerate(("podium.jobs.d.t", "podium.jobs.c.t"), 1):  # the first is malformed
        ledger.apply(JOBS, Record(number, subject, encode(job("t", "c"))))
    assert ledger.folded == {JOBS: 2, "STATE-a": 0, "STATE-b": 0, "STATE-c": 0}


def test_a_second_job_for_a_task_changes_nothing() -> None:
    ledger = ledger_of([job("t", "a"), job("t", "b")])
    assert ledger.malformed == 1
    assert ledger.holder("b", NOW) is None


messages_of_jobs = st.lists(
    st.one_of(
        st.builds(job, st.sampled_from("tuvw"), st.sampled_from("ab")),
        st.builds(
            reservation, st.sampled_from("tuvw"), st.sampled_from("ab"), st.sampled_from([NOW - 1, NOW + 1])
        ),
    ),
    max_size=8,
)
messages_of_state = st.lists(
    st.one_of(
        st.builds(claimed, st.sampled_from("tuvw"), st.sampled_from("ab")),
        st.builds(submitting, st.sampled_from("tuvw"), st.sampled_from("ab")),
        st.builds(result, st.sampled_from("tuvw"), st.sampled_from("ab")),
    ),
    max_size=12,
)


def everything(ledger: Ledger) -> Any:
    tasks = [
        (task.first, task.job, task.reservation, ledger.state(task, NOW), ledger.chain_of(task.record))
        for task in ledger.tasks()
    ]
    held = [holder.record if (holder := ledger.holder(slot, NOW)) else None for slot in "ab"]
    accepted = [ledger.accepted(token, NOW) for token in "tuvw"]
    return tasks, held, accepted, ledger.open_jobs(), ledger.folded, ledger.malformed


@given(jobs=messages_of_jobs, states=messages_of_state, data=st.data())
def test_how_the_logs_are_interleaved_does_not_matter(
    jobs: list[Any], states: list[Any], data: st.DataObject
) -> None:
    one_after_the_other = ledger_of(jobs, states)
    logs = {JOBS: records(jobs), **state_logs(states)}
    turns = data.draw(st.permutations([name for name, each in logs.items() for _ in each]))
    mixed = Ledger()
    left = {name: iter(each) for name, each in logs.items()}
    for stream in turns:
        record = next(left[stream])
        for _ in itertools.repeat(
            None, data.draw(st.integers(1, 2))
        ):  # read once, or twice after a lost answer
            mixed.apply(stream, record)
    assert everything(mixed) == everything(one_after_the_other)


def test_a_validators_active_reservation_is_found() -> None:
    def reserved(task: str, slot: str, validator: str, expires_at: float) -> Reservation:
        made = reservation(task, slot, expires_at)
        return msgspec.structs.replace(
            made, decision=msgspec.structs.replace(made.decision, validator=validator)
        )

    ledger = ledger_of([reserved("t", "a", "v", NOW + 10), reserved("u", "b", "w", NOW + 10)])
    held = ledger.reserved_for("v", NOW)
    assert held is not None
    assert held.task == "t"
    assert ledger.reserved_for("v", NOW + 11) is None  # lapsed
    assert ledger.reserved_for("x", NOW) is None


@pytest.mark.parametrize("data", [b"\x00\x00", b"[" * 100_000, encode(claimed("other", "a"))])
def test_a_chain_that_ends_with_a_record_that_can_not_be_read_says_so(data: bytes) -> None:
    ledger, told = ledger_of([job("t", "a")], [claimed("t", "a")]), list[str]()
    ledger.on_task = told.append
    ledger.apply(STATE_A, Record(7, "podium.state.a.t", data))
    chain = ledger.chain_of(job("t", "a"))
    assert chain.damaged
    assert (chain.sequence, told) == (7, ["t"])
    assert state_of(ledger, "t") is TaskState.RUNNING
    ledger.apply(STATE_A, Record(8, "podium.state.a.t", encode(result("t", "a"))))
    assert chain.damaged is None
    ledger.apply(STATE_A, Record(9, "podium.state.a.t", data))
    assert chain.damaged is None  # the result stands
    assert (told, ledger.malformed) == (["t", "t"], 2)
