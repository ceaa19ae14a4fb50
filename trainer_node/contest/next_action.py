"""What the runner does next, from what it sees. Pure.

A worker that ends without an outcome is started again from its checkpoint, as a node would do. When it fails
MOST_ATTEMPTS times without a new checkpoint, the next profile gets the rest of the time: a contest has no
operator who could choose another one.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus

MOST_ATTEMPTS: Final = 3
# Another start, or another profile, would end the same way.
HOPELESS: Final = frozenset(
    {
        ErrorCode.BAD_DATA,
        ErrorCode.DATA_UNAVAILABLE,
        ErrorCode.MODEL_UNAVAILABLE,
        ErrorCode.UNSUPPORTED,
        ErrorCode.TOO_LATE,
    }
)
# Trying the same again would end the same way; a smaller profile may not.
PROFILE_IS_AT_FAULT: Final = frozenset({ErrorCode.DOES_NOT_FIT, ErrorCode.OUT_OF_MEMORY})


class RunObservation(Struct, frozen=True, kw_only=True):
    """What the runner sees of the run under way."""

    worker_alive: bool
    outcome: Outcome | None
    deaths: int  # ends of the worker since the newest checkpoint appeared
    profiles_left: int  # that were not tried yet
    time_left: bool


class Wait(Struct, frozen=True):
    """The worker runs."""


class StartWorker(Struct, frozen=True):
    """Start a worker on the run folder."""


class NextProfile(Struct, frozen=True):
    """Begin another run, with the next profile."""

    reason: str


class TakeExport(Struct, frozen=True):
    """The worker's export becomes the submission."""


class End(Struct, frozen=True):
    """Nothing better can come."""

    reason: str


Action = Wait | StartWorker | NextProfile | TakeExport | End


def next_action(seen: RunObservation) -> Action:
    """Return the one thing to do now."""
    outcome = seen.outcome
    if outcome is not None and outcome.status is OutcomeStatus.READY:
        return TakeExport()
    if seen.worker_alive:
        return Wait()
    if not seen.time_left:
        return End("the time is over")
    reason = (outcome.error if outcome is not None else None) or "its worker ended without an outcome"
    if outcome is not None and outcome.status is OutcomeStatus.FAILED:
        if outcome.code in HOPELESS:
            return End(reason)
        if outcome.code in PROFILE_IS_AT_FAULT and seen.deaths:
            return _after(reason, seen)
    if seen.deaths >= MOST_ATTEMPTS:
        return _after(reason, seen)
    return StartWorker()


def _after(reason: str, seen: RunObservation) -> Action:
    return NextProfile(reason) if seen.profiles_left else End(reason)


def export_due(
    *, now: float, ready_by: float, started_at: float, last_at: float | None, last_s: float, news: bool
) -> bool:
    """Return whether to export what the run has reached: there is something new, and time for it.

    The first one at once; later ones every tenth of the time, and less often where one takes long: at most a
    tenth of the time goes into them.
    """
    if not news or now + 1.5 * last_s >= ready_by:
        return False
    if last_at is None:
        return True
    return now - last_at >= max((ready_by - started_at) / 10.0, 10.0 * last_s)
