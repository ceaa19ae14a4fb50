"""Compare a start with what was accepted. Pure."""

from __future__ import annotations

from shared.messages import BareOffer, Offer

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
