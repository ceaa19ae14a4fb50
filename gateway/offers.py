"""Parse offers, and make the records of an offer: its decision, and a job or a reservation. Pure."""

from __future__ import annotations

import time
import uuid

from msgspec import Struct
from msgspec.structs import replace

from gateway.errors import MalformedOfferError
from gateway.policy.interface import Verdict
from shared.messages.jobs import Job, Reservation
from shared.messages.offers import BareOffer, Decision, Offer, decode_offer
from shared.settings import Settings

NEEDED = "an offer is a JSON object with task_id, task_type, model, hours_to_complete (above 0) and dataset"


def parse_offer(body: bytes) -> Offer:
    """Decode one offer; raises MalformedOfferError naming the field."""
    try:
        return decode_offer(body)
    except ValueError as error:  # msgspec's errors, and bytes that are not UTF-8
        raise MalformedOfferError(f"{error}; {NEEDED}") from error


class AskedOffer(Struct, frozen=True):
    """An offer as it arrived."""

    offer: BareOffer
    key: str  # of its task
    received_at: float
    validator: str = ""  # ss58 address; empty if an operator sent it, or NATS brought it


class Records:
    """Make the records of one gateway."""

    def __init__(self, settings: Settings) -> None:
        self._gateway = settings.gateway_name
        self._reservation_s = settings.reservation_s
        self._margin_s = settings.deadline_margin_s

    def decision(self, asked: AskedOffer, verdict: Verdict) -> Decision:
        """Return the answer to an offer. A bare offer has no deadline yet: its time runs from the start."""
        offer = asked.offer
        begun = verdict.accepted and isinstance(offer, Offer)
        return Decision(
            task_id=offer.task_id,
            task=asked.key,
            accepted=verdict.accepted,
            reason=verdict.reason,
            kind=verdict.kind,
            slot=verdict.slot,
            priority=verdict.priority,
            terms=verdict.terms,
            policy=verdict.policy,
            deadline_at=self.deadline(offer, asked.received_at) if begun else None,
            decided_at=time.time(),
            gateway=self._gateway,
            validator=asked.validator,
        )

    def accepted(self, asked: AskedOffer, decision: Decision) -> Reservation | Job:
        """Return a job for an accepted offer with data, a reservation for one without."""
        offer, received_at = asked.offer, asked.received_at
        if isinstance(offer, Offer):
            return self.job(offer, decision, received_at)
        return Reservation(
            record_id=uuid.uuid4().hex,
            task_id=offer.task_id,
            task=decision.task,
            slot=_chosen(decision),
            gateway=self._gateway,
            reserved_at=received_at,
            expires_at=received_at + self._reservation_s,
            decision=decision,
            offer=offer,
        )

    def job(self, offer: Offer, decision: Decision, received_at: float) -> Job:
        """Return the job of an accepted offer with data; its time runs from `received_at`."""
        return Job(
            record_id=uuid.uuid4().hex,
            task_id=offer.task_id,
            task=decision.task,
            slot=_chosen(decision),
            gateway=self._gateway,
            offer=offer,
            decision=decision,
            received_at=received_at,
            deadline_at=self.deadline(offer, received_at),
        )

    def moved(self, job: Job, slot: str) -> Job:
        """Return an unclaimed job for another slot; its deadline stays."""
        return replace(
            job,
            record_id=uuid.uuid4().hex,
            slot=slot,
            gateway=self._gateway,
            decision=replace(job.decision, slot=slot),
            moved_from=job.slot,
            moved_at=time.time(),
        )

    def deadline(self, offer: BareOffer, received_at: float) -> float:
        """Return our own deadline, which is before upstream's."""
        return received_at + offer.hours_to_complete * 3600 - self._margin_s


def _chosen(decision: Decision) -> str:
    if decision.slot is None:
        raise ValueError("only an accepted offer has a slot")
    return decision.slot
