"""What the chain allows next, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from shared.messages.jobs import Claimed, Job, Moved, Result, ResultStatus, StateRecord, Submitting
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus
from trainer_node.job.actions import (
    Action,
    Claim,
    Deliver,
    Done,
    FindSubmission,
    Finish,
    JobObservation,
    Leave,
    Start,
    StartOver,
    Submit,
    Watch,
    next_action,
)

ME, EPOCH, DEADLINE = "me", 7, 100.0
DECISION = Decision(task_id="t", task="t", accepted=True, reason="")
OFFER = Offer(task_id="t", task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1, dataset="d")
JOB = Job(
    record_id="j",
    task_id="t",
    task="t",
    slot="a",
    gateway="g",
    offer=OFFER,
    decision=DECISION,
    received_at=0,
    deadline_at=DEADLINE,
)
READY = Outcome(status=OutcomeStatus.READY, digest="d1", export="export")
STOPPED = Outcome(status=OutcomeStatus.STOPPED)
DONE = Result(record_id="r", task="t", task_id="t", slot="a", status=ResultStatus.CANCELLED)


def claimed(node: str = ME, epoch: int = EPOCH, attempt: int = 1) -> Claimed:
    return Claimed(record_id="c", task="t", slot="a", node=node, epoch=epoch, attempt=attempt)


def submitting(digest: str = "d1", node: str = ME, epoch: int = EPOCH) -> Submitting:
    return Submitting(record_id="s", task="t", slot="a", node=node, epoch=epoch, digest=digest)


def failed(code: ErrorCode) -> Outcome:
    return Outcome(status=OutcomeStatus.FAILED, code=code, error="why")


def decide(last: StateRecord | None, **seen: Any) -> Action:
    usual: dict[str, Any] = {"node": ME, "epoch": EPOCH, "now": 50.0, "stored": False}
    return next_action(JOB, last, JobObservation(**(usual | seen)), max_attempts=3)


@pytest.mark.parametrize(
    ("last", "seen", "step"),
    [
        # nothing there yet
        (None, {}, Start(1)),
        (None, {"worker_alive": True, "attempt": 2}, Claim(2)),
        (None, {"outcome": READY}, Claim(1)),
        # claimed by this node in this epoch
        (claimed(), {}, Start(1)),
        (claimed(), {"worker_alive": True}, Watch()),
        (claimed(), {"outcome": STOPPED}, Start(1)),
        (claimed(), {"outcome": STOPPED, "worker_alive": True}, Watch()),
        (claimed(), {"outcome": READY}, Submit("d1")),
        (claimed(), {"outcome": READY, "worker_alive": True}, Submit("d1")),
        # claimed before a restart, or by another node: claim again before anything else
        (claimed(epoch=6, attempt=2), {}, Start(2)),
        (claimed(epoch=6, attempt=2), {"worker_alive": True, "attempt": 2}, Claim(2)),
        (claimed(epoch=6), {"outcome": READY}, Claim(1)),
        (claimed(node="other", attempt=2), {}, Start(2)),
        (claimed(node="other", epoch=9), {"outcome": READY}, Claim(1)),
        # submitting: the store is read first, whichever node wrote the record
        (submitting(), {"stored": True}, Deliver()),
        (submitting(node="other", epoch=6), {"stored": True}, Deliver()),
        (submitting("d2", epoch=6), {"stored": True, "outcome": READY}, Deliver()),
        # nothing stored: this node's own digest is stored if it is the announced one, else announced
        (submitting(), {"outcome": READY}, Deliver()),
        (submitting("d2"), {"outcome": READY}, Submit("d1")),
        (submitting(epoch=6), {"outcome": READY}, Submit("d1")),
        (submitting("d2", node="other"), {"outcome": READY}, Submit("d1")),
        # nothing stored and nothing to store: train again
        (submitting(node="other", epoch=6), {}, Start(1)),
        (submitting(epoch=6), {"attempt": 2}, Start(2)),
        (submitting(epoch=6), {"worker_alive": True}, Claim(1)),
        # a result ends everything
        (DONE, {}, Done(DONE)),
        (DONE, {"outcome": READY, "worker_alive": True, "stored": True}, Done(DONE)),
    ],
)
def test_what_the_chain_allows(last: StateRecord | None, seen: dict[str, object], step: Action) -> None:
    assert decide(last, **seen) == step


@pytest.mark.parametrize(("attempt", "step"), [(1, Start(2)), (2, Start(3))])
def test_a_death_without_progress_is_counted(attempt: int, step: Action) -> None:
    assert decide(claimed(attempt=attempt), failure="boom") == step


def test_the_last_death_fails_the_job_with_its_error() -> None:
    assert decide(claimed(attempt=3), failure="boom") == Finish(
        ResultStatus.FAILED, "boom", ErrorCode.INTERNAL
    )
    out_of_memory = failed(ErrorCode.OUT_OF_MEMORY)
    assert decide(claimed(attempt=3), failure="why", outcome=out_of_memory) == Finish(
        ResultStatus.FAILED, "why", ErrorCode.OUT_OF_MEMORY
    )


def test_deaths_of_an_earlier_life_are_not_forgotten() -> None:
    assert decide(claimed(epoch=6, attempt=3), failure="boom") == Claim(3)
    assert decide(claimed(node="other", attempt=3), attempt=1) == Start(3)


@pytest.mark.parametrize(
    "code", ["bad_data", "data_unavailable", "model_unavailable", "unsupported", "does_not_fit"]
)
def test_a_failure_that_would_repeat_is_final(code: str) -> None:
    seen = failed(ErrorCode(code))
    assert decide(claimed(), outcome=seen) == Finish(ResultStatus.FAILED, "why", ErrorCode(code))
    assert decide(None, outcome=seen) == Claim(1)


@pytest.mark.parametrize("code", ["out_of_memory", "device", "disk_full", "internal"])
def test_a_failure_that_may_pass_is_tried_again(code: str) -> None:
    assert decide(claimed(), outcome=failed(ErrorCode(code)), failure="why") == Start(2)
    assert decide(claimed(), outcome=failed(ErrorCode(code))) == Start(1)  # it had made progress


def test_too_late_is_expired_not_failed() -> None:
    seen = failed(ErrorCode.TOO_LATE)
    assert decide(claimed(), outcome=seen) == Finish(ResultStatus.EXPIRED, "why", ErrorCode.TOO_LATE)


def test_after_the_deadline_only_what_can_still_be_submitted_counts() -> None:
    late = {"now": DEADLINE}
    assert decide(claimed(), has_checkpoint=True, **late) == Start(1)
    assert decide(claimed(), stored=True, **late) == Deliver()
    assert decide(claimed(), outcome=READY, **late) == Submit("d1")
    assert decide(claimed(), worker_alive=True, **late) == Watch()
    expired = decide(claimed(), **late)
    assert isinstance(expired, Finish)
    assert expired.status is ResultStatus.EXPIRED
    assert decide(None, **late) == Claim(1)


@pytest.mark.parametrize(
    ("last", "seen", "step"),
    [
        (claimed(), {"worker_alive": True}, StartOver()),
        (claimed(attempt=3), {}, StartOver()),
        (claimed(epoch=6, attempt=2), {"worker_alive": True}, StartOver()),
        (None, {}, StartOver()),
        # what is about to end the task goes on: a finished task is never opened again
        (claimed(), {"outcome": READY}, Submit("d1")),
        (claimed(attempt=3), {"failure": "boom"}, Finish(ResultStatus.FAILED, "boom", ErrorCode.INTERNAL)),
        (submitting(), {"outcome": READY}, Deliver()),
        (submitting(), {"worker_alive": True}, Watch()),
        (submitting(node="other"), {}, Start(1)),
        (DONE, {"worker_alive": True}, Done(DONE)),
    ],
)
def test_an_operator_may_have_it_begin_anew_before_it_ends(
    last: StateRecord | None, seen: dict[str, object], step: Action
) -> None:
    assert decide(last, requeue=True, **seen) == step


def test_after_a_requeue_attempts_count_from_1_although_the_folder_remembers_more() -> None:
    assert decide(claimed(epoch=6, attempt=1), attempt=3) == Start(1)


@pytest.mark.parametrize(
    ("last", "seen", "step"),
    [
        (submitting(), {}, FindSubmission()),
        (submitting(node="other", epoch=6), {}, FindSubmission()),
        (submitting("d2"), {"outcome": READY}, FindSubmission()),
        (submitting(epoch=6), {"worker_alive": True}, FindSubmission()),
        (submitting(), {"outcome": failed(ErrorCode.BAD_DATA)}, FindSubmission()),
        (claimed(), {"now": DEADLINE}, FindSubmission()),
        (None, {"now": DEADLINE}, FindSubmission()),
        # it doesn't depend on that: what a store can't tell must not be in the way
        (submitting(), {"outcome": READY}, Deliver()),
        (claimed(), {"outcome": READY}, Submit("d1")),
        (claimed(), {}, Start(1)),
        (claimed(), {"worker_alive": True, "now": DEADLINE}, Watch()),
        (DONE, {}, Done(DONE)),
    ],
)
def test_what_nobody_looked_at_is_not_taken_for_empty(
    last: StateRecord | None, seen: dict[str, object], step: Action
) -> None:
    assert decide(last, **(seen | {"stored": None})) == step


@pytest.mark.parametrize("seen", [{}, {"worker_alive": True}, {"outcome": READY}, {"requeue": True}])
def test_a_job_that_was_moved_to_another_slot_is_left_alone(seen: dict[str, Any]) -> None:
    assert decide(Moved(record_id="m", task="t", slot="a", gateway="g"), **seen) == Leave()
