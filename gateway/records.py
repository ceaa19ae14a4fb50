"""What is kept of an offer: the decision, and of an accepted one a job or a reservation. Pure."""

from __future__ import annotations

import time
import uuid

from gateway.policy.house import Verdict
from shared.messages import BareOffer, Decision, Job, Offer, Reservation
from shared.settings import Settings


class Records:
    """Makes the records of one gateway."""

    def __init__(self, settings: Settings) -> None:
        self._gateway = settings.gateway_name
        self._reservation_s = settings.reservation_s
        self._margin_s = settings.deadline_margin_s

    def decision(self, offer: BareOffer, token: str, verdict: Verdict, received_at: float) -> Decision:
        """The answer to an offer. Without its data its time has not begun: the start is yet to come."""
        begun = verdict.accepted and isinstance(offer, Offer)
        return Decision(
            task_id=offer.task_id,
            task=token,
            accepted=verdict.accepted,
            reason=verdict.reason,
            kind=verdict.kind,
            slot=verdict.slot,
            priority=verdict.priority,
            terms=verdict.terms,
            policy=verdict.policy,
            deadline_at=self.deadline(offer, received_at) if begun else None,
            decided_at=time.time(),
            gateway=self._gateway,
        )

    def accepted(self, offer: BareOffer, decision: Decision, received_at: float) -> Reservation | Job:
        """What an accepted offer becomes: with its data a job, without it a slot kept for a while."""
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
        """An accepted offer with its data; its time runs from `received_at`."""
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

    def deadline(self, offer: BareOffer, received_at: float) -> float:
        """Our own deadline, before upstream's."""
        return received_at + offer.hours_to_complete * 3600 - self._margin_s


def _chosen(decision: Decision) -> str:
    if decision.slot is None:
        raise ValueError("only an accepted offer has a slot")
    return decision.slot
