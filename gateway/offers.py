"""Bytes from outside -> offer, with errors that say what to do."""

from __future__ import annotations

from shared.errors import PodiumError
from shared.messages import Offer, decode_offer

NEEDED = "an offer is a JSON object with task_id, task_type, model, hours_to_complete (above 0) and dataset"


class MalformedOfferError(PodiumError):
    """What was sent is no offer; nothing was decided."""


def parse_offer(body: bytes) -> Offer:
    """Decode one offer; raises MalformedOfferError naming the field."""
    try:
        return decode_offer(body)
    except RecursionError as error:
        raise MalformedOfferError(f"the JSON is nested too deeply; {NEEDED}") from error
    except ValueError as error:  # msgspec's errors, and bytes that are not UTF-8
        raise MalformedOfferError(f"{error}; {NEEDED}") from error
