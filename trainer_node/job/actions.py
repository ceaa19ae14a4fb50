"""Decide a node's next action for a job, from the chain's last record and an observation. Pure."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from shared.messages.jobs import Claimed, Job, Moved, Result, ResultStatus, StateRecord, Submitting
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus

# A worker that failed for one of these would fail the same way again; any other failure is tried again
# and counts like a crash.
FINAL_CODES: Final = frozenset(
    {
        ErrorCode.BAD_DATA,
        ErrorCode.DATA_UNAVAILABLE,
        ErrorCode.MODEL_UNAVAILABLE,
        ErrorCode.UNSUPPORTED,
        ErrorCode.DOES_NOT_FIT,
        ErrorCode.TOO_LATE,
    }
)


class JobObservation(Struct, frozen=True, kw_only=True):
    """A node's own view of a job."""

    node: str
    epoch: int
    now: float
    attempt: int = 0  # of the newest worker this node started for the job; 0 = none
    worker_alive: bool = False
    failure: str | None = None  # the last error of a worker whose end counts against the limit
    failure_code: ErrorCode | None = None
    outcome: Outcome | None = None
    has_checkpoint: bool = False
    stored: bool | None = None  # something is stored under the task's submission name; None = not looked up
    requeue: bool = False  # an operator wants a restart


class Done(Struct, frozen=True):
    """The task has its result: clean up."""

    result: Result


class Leave(Struct, frozen=True):
    """A gateway moved the job to another slot: drop it."""


class Watch(Struct, frozen=True):
    """The worker is at it: nothing to write."""


class Claim(Struct, frozen=True):
    """Put this node's epoch into the chain without starting a worker."""

    attempt: int


class Start(Struct, frozen=True):
    """Claim, then start a worker."""

    attempt: int


class StartOver(Struct, frozen=True):
    """End the worker, claim with the attempts counted from 1, start from the newest checkpoint."""


class Submit(Struct, frozen=True):
    """Announce the digest that is about to be stored."""

    digest: str


class FindSubmission(Struct, frozen=True):
    """Look up whether something is stored under the task's submission name, then decide again."""


class Deliver(Struct, frozen=True):
    """Store the announced export unless something is there already, read it back, write the result."""


class Finish(Struct, frozen=True):
    """End the task without a submission."""

    status: ResultStatus
    reason: str
    code: ErrorCode | None = None


Action = Done | Leave | Watch | Claim | Start | StartOver | Submit | FindSubmission | Deliver | Finish


def next_action(job: Job, last: StateRecord | None, observation: JobObservation, max_attempts: int) -> Action:
    """Return the one thing to do now, given the chain's last record.

    A result ends everything. After `submitting` the store is read first, no matter which node wrote it.
    Anything else this node writes comes after a record of its own epoch.
    """
    if isinstance(last, Result):
        return Done(last)
    if isinstance(last, Moved):
        return Leave()
    step = _wanted(job, last, observation, max_attempts)
    if isinstance(last, Submitting) and not isinstance(step, Deliver):
        if observation.stored is None:
            return FindSubmission()
        if observation.stored:
            return Deliver()
    if isinstance(step, FindSubmission):
        return step
    if observation.requeue and isinstance(step, Watch | Start) and not isinstance(last, Submitting):
        return StartOver()
    if _is_mine(last, observation) or isinstance(step, Start):
        return step
    if isinstance(last, Submitting) and isinstance(step, Submit):
        return step
    return Claim(_attempt(last, observation))


def _wanted(job: Job, last: StateRecord | None, observation: JobObservation, max_attempts: int) -> Action:
    outcome = observation.outcome
    if outcome is not None and outcome.status is OutcomeStatus.READY and outcome.digest is not None:
        announced = (
            isinstance(last, Submitting) and last.digest == outcome.digest and _is_mine(last, observation)
        )
        return Deliver() if announced else Submit(outcome.digest)
    if outcome is not None and outcome.status is OutcomeStatus.FAILED and outcome.code in FINAL_CODES:
        late = outcome.code is ErrorCode.TOO_LATE
        status = ResultStatus.EXPIRED if late else ResultStatus.FAILED
        return Finish(status, outcome.error or "the worker gave no reason", outcome.code)
    if observation.worker_alive:
        return Watch()
    attempt = _attempt(last, observation)
    if observation.failure is not None:
        attempt += 1
        if attempt > max_attempts:
            code = (outcome.code if outcome is not None else None) or observation.failure_code
            return Finish(ResultStatus.FAILED, observation.failure, code or ErrorCode.INTERNAL)
    if observation.now >= job.deadline_at:
        if observation.stored:
            return Deliver()
        if not observation.has_checkpoint:
            if observation.stored is None:
                return FindSubmission()
            return Finish(
                ResultStatus.EXPIRED,
                "the deadline passed before there was anything to submit",
                ErrorCode.TOO_LATE,
            )
    return Start(attempt)


def _is_mine(last: StateRecord | None, observation: JobObservation) -> bool:
    return last is not None and last.node == observation.node and last.epoch == observation.epoch


def _attempt(last: StateRecord | None, observation: JobObservation) -> int:
    """Return the chain's attempt: every start was claimed, and only there a requeue counts from 1."""
    return last.attempt if isinstance(last, Claimed) else max(1, observation.attempt)
