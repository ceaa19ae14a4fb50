"""Compare a start with what was accepted, and choose its slot. Pure."""

from __future__ import annotations

from gateway.policy.house import free_slot
from gateway.policy.interface import PolicyView
from shared.messages.offers import BareOffer, Offer

ROUNDING_HOURS = 1e-6


def difference(accepted: BareOffer | None, start: Offer, max_hours: float) -> str | None:
    """Return how a start asks for another task than the one that was accepted, or None.

    Only what was offered was judged: another model, type or more hours may not fit. Fewer hours only bring
    the deadline forward. `accepted` is None in reservations of older versions.
    """
    if start.hours_to_complete > max_hours + ROUNDING_HOURS:
        return f"it is for {start.hours_to_complete:g} hours, and the limit is {max_hours:g}"
    if accepted is None:
        return None
    if start.model != accepted.model:
        return f"its model is {start.model[:200]!r}, and {accepted.model[:200]!r} was offered"
    if start.task_type is not accepted.task_type:
        return f"its columns are those of {start.task_type}, and {accepted.task_type} was offered"
    if start.hours_to_complete > accepted.hours_to_complete + ROUNDING_HOURS:
        return f"it is for {start.hours_to_complete:g} hours, and {accepted.hours_to_complete:g} were offered"
    return None


def is_foreign(owner: str, validator: str) -> bool:
    """Return whether a task of one validator is another's business; an empty name is an operator's."""
    return bool(owner) and bool(validator) and owner != validator


def slot_of_start(view: PolicyView, reserved: str | None) -> str | None:
    """Return the slot of a start; None if all are taken.

    It is the reserved one, or any free one if the reservation lapsed. A slot that is down or failed its
    self-test gets the job only while no other is free: its node may come back. A slot that is drained or
    whose log is full gets only what was reserved for it before, and only while no other is free.
    """
    slots = {facts.slot: facts for facts in view.slots}
    if reserved in slots and slots[reserved].healthy:
        return reserved
    if (better := free_slot(view)) is not None:
        return better.slot
    if reserved is not None:
        return reserved
    free = [facts for facts in view.slots if not facts.busy and facts.open]
    return min(free, key=lambda facts: (not facts.healthy, not facts.live)).slot if free else None
