"""The one way an offer becomes a job: storing the job is the acceptance."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

from gateway.decisions import DecisionLog
from gateway.families import model_family
from gateway.follower import Follower
from gateway.ledger import Ledger
from gateway.policy import Policy, PolicyView, SlotFacts, Verdict, maximum_accuracy
from gateway.presence import Presence
from gateway.tables import Tables
from shared import subjects
from shared.bus import Bus, Record
from shared.errors import BusError, BusTimeoutError, BusUnavailableError, ConflictError
from shared.logs import get_logger
from shared.messages import BareOffer, Decision, Hardware, Job, Offer, encode
from shared.plan import Feasibility, check_offer
from shared.settings import Settings

JOBS = subjects.JOBS_STREAM
ANSWER_S = 2.5  # upstream waits 3 s
APPEND_TIMEOUT_S = 0.9
TRIES = 8  # each lost to another gateway's job, of which a fleet stores one per free slot

log = get_logger()


class Admission:
    """Decides on offers, and stores a job for each accepted one, exactly once."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        ledger: Ledger,
        follower: Follower,
        presence: Presence,
        decisions: DecisionLog,
        *,
        expected: Hardware,
        tables: Callable[[], Tables] = Tables,
        family: Callable[[str], str] = model_family,
        policy: Policy = maximum_accuracy,
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._ledger = ledger
        self._follower = follower
        self._presence = presence
        self._decisions = decisions
        self._tables = tables
        self._family = family
        self._policy = policy
        self._expected = expected
        self._lock = asyncio.Lock()

    async def decide(self, offer: Offer, received_at: float, *, within_s: float = ANSWER_S) -> Decision:
        """Answer one offer; `received_at` is when its first byte was here.

        Raises BusError if nothing can be decided now. Then the job may still have been stored: the same
        offer sent again answers accepted if it was.
        """
        try:
            async with asyncio.timeout(within_s):
                decision = await self._decide(offer, received_at)
        except TimeoutError as error:
            raise BusTimeoutError(f"NATS did not confirm within {within_s:.1f} s") from error
        self._decisions.add(decision, offer)
        log.info(
            "offer accepted" if decision.accepted else "offer rejected",
            task=decision.task,
            slot=decision.slot,
            reason=decision.reason,
        )
        return decision

    async def _decide(self, offer: Offer, received_at: float) -> Decision:
        token = subjects.task_token(offer.task_id)
        await self._follower.catch_up()
        if known := self._known(offer, token, received_at):
            return known
        verdict = self._judge(offer)
        if not verdict.accepted:
            return self._decision(offer, token, verdict, received_at)
        async with self._lock:
            return await self._store(offer, token, received_at)

    async def _store(self, offer: Offer, token: str, received_at: float) -> Decision:
        """Judge on the newest state and append, until the log's end is the one that was judged."""
        job: Job | None = None
        expected = -1
        cause: BusError | None = None
        for _ in range(TRIES):
            if known := self._known(offer, token, received_at):
                return known
            if job is None or expected != self._ledger.folded[JOBS]:
                # A job sent for an older end of the log can't be stored any more: decide anew. While the
                # end is the same, a job whose answer was lost may still be: send it again as it was.
                verdict = self._judge(offer)
                if not verdict.accepted:
                    return self._decision(offer, token, verdict, received_at)
                job = self._job(offer, token, verdict, received_at)
                expected = self._ledger.folded[JOBS]
            try:
                await self._append(job, expected)
            except (ConflictError, BusTimeoutError) as error:
                cause = error
                await self._follower.catch_up()
                continue
            return job.decision
        raise BusUnavailableError(f"the job could not be stored in {TRIES} tries: {cause}") from cause

    def _known(self, offer: Offer, token: str, received_at: float) -> Decision | None:
        known = self._ledger.accepted(token, time.time())
        if known is None or known.task_id == offer.task_id:
            return known
        reason = (
            f"Task id is the token of another accepted task, {known.task_id!r}; offer it under another id"
        )
        judged = self._judge(offer)
        verdict = Verdict(reason=reason, priority=judged.priority, terms=judged.terms, policy=judged.policy)
        return self._decision(offer, token, verdict, received_at)

    async def _append(self, job: Job, expected: int) -> None:
        subject, data = subjects.job(job.slot, job.task), encode(job)
        sequence = await self._bus.append(
            JOBS,
            subject,
            data,
            last=expected,
            last_on_subject=0,
            pattern=subjects.job_on_any_slot(job.task),
            timeout_s=APPEND_TIMEOUT_S,
        )
        self._ledger.apply(JOBS, Record(sequence, subject, data))

    def _judge(self, offer: Offer) -> Verdict:
        verdict = self._policy(offer, self.view())
        if verdict.warning:
            log.warning(verdict.warning)
        return verdict

    def view(self) -> PolicyView:
        """What the policy may know, now."""
        now = time.time()
        return PolicyView(
            slots=tuple(self._facts(slot, now) for slot in self._settings.slots),
            tables=self._tables(),
            family=self._family,
            min_points_per_hour=self._settings.min_points_per_hour,
            expected=self._expected,
            max_hours=self._settings.max_hours,
            deadline_margin_s=self._settings.deadline_margin_s,
            feasible=self._feasible,
        )

    def _facts(self, slot: str, now: float) -> SlotFacts:
        sign = self._presence.sign(slot)
        return SlotFacts(
            slot=slot,
            busy=self._ledger.holder(slot, now) is not None,
            live=self._presence.live(slot),
            hardware=sign.hardware if sign is not None else None,
        )

    def _feasible(self, offer: BareOffer, hours: float, hardware: Hardware) -> Feasibility:
        return check_offer(
            offer.model, offer.model_params_count, offer.task_type, hours, hardware, self._settings.profile
        )

    def _job(self, offer: Offer, token: str, verdict: Verdict, received_at: float) -> Job:
        decision = self._decision(offer, token, verdict, received_at)
        if verdict.slot is None or decision.deadline_at is None:
            raise ValueError("a job needs an accepting verdict")
        return Job(
            record_id=uuid.uuid4().hex,
            task_id=offer.task_id,
            task=token,
            slot=verdict.slot,
            gateway=self._settings.gateway_name,
            offer=offer,
            decision=decision,
            received_at=received_at,
            deadline_at=decision.deadline_at,
        )

    def _decision(self, offer: Offer, token: str, verdict: Verdict, received_at: float) -> Decision:
        deadline_at = received_at + offer.hours_to_complete * 3600 - self._settings.deadline_margin_s
        return Decision(
            task_id=offer.task_id,
            task=token,
            accepted=verdict.accepted,
            reason=verdict.reason,
            slot=verdict.slot,
            priority=verdict.priority,
            terms=verdict.terms,
            policy=verdict.policy,
            deadline_at=deadline_at if verdict.accepted else None,
            decided_at=time.time(),
            gateway=self._settings.gateway_name,
        )
