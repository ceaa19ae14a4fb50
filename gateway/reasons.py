"""Decisions by what decided: a few classes, where the reasons themselves carry numbers and names."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from shared.messages import Decision, Terms


class ReasonClass(StrEnum):
    """Why an offer was taken or not."""

    ACCEPTED = "accepted"
    AGAIN = "again"  # it was accepted before: the same answer
    CAPACITY = "capacity"
    TOO_LONG = "too_long"
    TOKEN_TAKEN = "token_taken"  # another accepted task has the same token
    PLAN = "plan"  # unsupported, too short, or too large for memory or deadline
    HARDWARE = "hardware"  # no slot is free, live and shows what is expected
    PRIORITY = "priority"  # the learned rates
    OTHER = "other"


_BEGINNINGS: Final = (
    ("At maximum accuracy capacity", ReasonClass.CAPACITY),
    ("Job duration too long", ReasonClass.TOO_LONG),
    ("Task id is the token of another", ReasonClass.TOKEN_TAKEN),
)


def reason_class(decision: Decision, received_at: float) -> ReasonClass:
    """What decided on an offer that was received at that time."""
    if decision.accepted:
        return ReasonClass.AGAIN if decision.decided_at < received_at else ReasonClass.ACCEPTED
    for beginning, found in _BEGINNINGS:
        if decision.reason.startswith(beginning):
            return found
    if decision.terms is None or not decision.reason.startswith("Priority "):
        return ReasonClass.OTHER
    return _weakest(decision.terms)


def _weakest(terms: Terms) -> ReasonClass:
    """The bonus that was not earned; the plan first, which no other slot would make fit."""
    if not terms.maximum_accuracy_bonus.value:
        return ReasonClass.PLAN
    return ReasonClass.PRIORITY if terms.h100_maximum_bonus.value else ReasonClass.HARDWARE
