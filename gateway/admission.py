"""Decide on offers. An offer becomes a reservation or a job only here: storing it is the acceptance."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from gateway.errors import MismatchedStartError, NoSlotError, NotAcceptedError
from gateway.offers import AskedOffer, Records
from gateway.policy.house import free_slot
from gateway.policy.interface import Policy, PolicyView, Verdict
from gateway.policy.recent_validators import RecentValidators
from gateway.policy.start_check import difference, is_foreign, slot_of_start
from gateway.policy.view import PolicyViews
from gateway.state.jobs_writer import JobsWriter
from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from gateway.telemetry.decision_log import DecisionLog
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusTimeoutError
from shared.logs import get_logger
from shared.messages.jobs import Job, Reservation
from shared.messages.offers import BareOffer, Decision, DecisionKind, Offer
from shared.settings import Settings

ANSWER_S = 2.5  # upstream waits 3 s

T = TypeVar("T")

log = get_logger()


class Admission:
    """Decide on offers, and store what is accepted exactly once."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        ledger: Ledger,
        log_reader: LogReader,
        decisions: DecisionLog,
        views: PolicyViews,
        *,
        policy: Policy,
        look: Callable[[str], Awaitable[None]],
        full: Callable[[], str | None],
    ) -> None:
        self._settings = settings
        self._records = Records(settings)
        self._ledger = ledger
        self.writer = JobsWriter(bus, ledger, log_reader)
        self._log_reader = log_reader
        self._decisions = decisions
        self._policy = policy
        self._full = full  # how full JOBS is, if it has hardly any room
        self._look = look
        self.views = views
        self._recent_validators = RecentValidators(settings.reservation_s)
        self._log = log.bind()  # made once: the module's makes a logger for every line

    async def decide(
        self,
        offer: BareOffer,
        received_at: float,
        *,
        within_s: float = ANSWER_S,
        before: Callable[[], Awaitable[None]] | None = None,
        validator: str = "",
    ) -> Decision:
        """Answer one offer; `received_at` is when its first byte arrived, `validator` who sent it.

        `before` is awaited before anything is stored or answered as accepted; its errors are raised. So is
        `look`, which finds out about the offer's model.

        An accepted offer with its data becomes a job, one without a reservation. Raises BusError if nothing
        can be decided now. Then it may still have been stored: the same offer sent again answers accepted
        if it was.
        """
        asked = AskedOffer(offer, subjects.task_key(offer.task_id), received_at, validator)
        self._recent_validators.note(validator)
        decision = self._at_once(asked)
        if decision is None or (decision.accepted and before is not None):
            decision = await _within(within_s, self._decide(asked, before))
        if decision.accepted:
            log.info("offer accepted", task=asked.key, slot=decision.slot, reason=decision.reason)
        self._decisions.add(decision, offer)
        return decision

    async def start(
        self,
        task_id: str,
        request: Callable[[BareOffer | None], Offer],
        received_at: float,
        *,
        within_s: float = ANSWER_S,
        validator: str = "",
    ) -> Job:
        """Return the job of an accepted offer whose data has arrived; the same job if it was started before.

        `request` makes the job's offer from the one that was accepted. Raises NotAcceptedError,
        MismatchedStartError and NoSlotError (nothing is stored), and BusError: then it may be stored, and
        asking again is safe.
        """
        return await _within(within_s, self._start(task_id, request, received_at, validator))

    async def move(self, key: str) -> Job | None:
        """Store a job that was taken off its slot for a free and live one; None if there is none now."""
        await self._log_reader.catch_up()

        def make() -> tuple[Job | None, Job | None]:
            task = self._ledger.task(key)
            slot = free_slot(self.views.now())
            if task is None or task.job is None or slot is None or task.job not in self._ledger.unclaimed():
                return None, None
            moved = self._records.moved(task.job, slot.slot)
            return moved, moved

        async with self.writer.exclusive():
            return await self.writer.store(make)

    def _at_once(self, asked: AskedOffer) -> Decision | None:
        """Answer without reading the logs, which were read a moment ago; most offers are answered so.

        Accepted tasks stay accepted, and a refusal changes nothing; only accepting needs the logs' very end.
        """
        if not self._log_reader.fresh:
            return None
        if self._ledger.task(asked.key) is not None:
            known = self._known(asked)
            return None if isinstance(asked.offer, Offer) and self._is_reserved(asked.key) else known
        verdict = self._judge(asked, self.views.recent())
        return None if verdict.accepted else self._rejected(asked, verdict)

    def _judge(self, asked: AskedOffer, view: PolicyView) -> Verdict:
        """Return the policy's verdict, unless JOBS is full, or the validator has its share already."""
        verdict = self._policy(asked.offer, view)
        if verdict.accepted and (full := self._full()):
            reason = f"{full}: a job's records might not be stored"
            return msgspec.structs.replace(verdict, slot=None, kind=DecisionKind.LOG_FULL, reason=reason)
        if not (verdict.accepted and asked.validator):
            return verdict
        held = self._ledger.reserved_for(asked.validator, time.time())
        if held is None or not self._recent_validators.has_other_than(asked.validator):
            return verdict
        reason = f"This validator holds a reservation already (task {held.task_id[:100]!r}), and others ask"
        return msgspec.structs.replace(verdict, slot=None, kind=DecisionKind.RESERVED, reason=reason)

    def _rejected(self, asked: AskedOffer, verdict: Verdict) -> Decision:
        decision, key = self._records.decision(asked, verdict), asked.key
        if verdict.warning:
            self._log.warning(verdict.warning, task=key, kind=verdict.kind, reason=verdict.reason)
        else:
            self._log.info("offer rejected", task=key, kind=verdict.kind, reason=verdict.reason)
        return decision

    async def _decide(self, asked: AskedOffer, before: Callable[[], Awaitable[None]] | None) -> Decision:
        await self._log_reader.catch_up()
        if before is not None:
            await before()
        offer = asked.offer
        await self._look(offer.model)
        while True:
            if known := self._known(asked):
                if not (known.accepted and isinstance(offer, Offer) and self._is_reserved(asked.key)):
                    return known
                with suppress(NoSlotError):  # its reservation lapsed meanwhile: judge it as a new offer
                    started = self._start(offer.task_id, lambda _: offer, asked.received_at, asked.validator)
                    return (await started).decision
            verdict = self._judge(asked, self.views.recent())
            if not verdict.accepted:
                return self._rejected(asked, verdict)
            if self.writer.idle:
                async with self.writer.exclusive():
                    return await self._admit(asked)
            # All waiters check again as soon as a record is stored: of hundreds that arrive together, all but
            # two are refused then. In a lock's queue each would wait for all those before it.
            await self.writer.wait()

    async def _admit(self, asked: AskedOffer) -> Decision:
        """Judge on the newest state, and store an accepted offer."""

        def make() -> tuple[Job | Reservation | None, Decision]:
            if known := self._known(asked):
                return None, known
            verdict = self._judge(asked, self.views.now())
            if not verdict.accepted:
                return None, self._rejected(asked, verdict)
            decision = self._records.decision(asked, verdict)
            return self._records.accepted(asked, decision), decision

        return await self.writer.store(make)

    async def _start(
        self,
        task_id: str,
        request: Callable[[BareOffer | None], Offer],
        received_at: float,
        validator: str,
    ) -> Job:
        key = subjects.task_key(task_id)
        await self._log_reader.catch_up()

        def make() -> tuple[Job | None, Job]:
            task = self._ledger.task(key)
            if task is None or task.record.task_id != task_id:
                raise NotAcceptedError(f"task {task_id[:100]!r} was not accepted: offer it first")
            if is_foreign(task.record.decision.validator, validator):
                raise MismatchedStartError(f"task {task_id[:100]!r} was offered by another validator")
            if task.job is not None:
                return None, task.job
            started = self._begin(task.record, request, received_at)
            return started, started

        async with self.writer.exclusive():
            job = await self.writer.store(make)
        log.info("job started", task=key, slot=job.slot, deadline_at=job.deadline_at)
        return job

    def _begin(
        self, reserved: Job | Reservation, request: Callable[[BareOffer | None], Offer], received_at: float
    ) -> Job:
        """Return the job that a reservation becomes. Raises MismatchedStartError and NoSlotError."""
        assert isinstance(reserved, Reservation)  # a task without a job
        offer = request(reserved.offer)
        if differs := difference(reserved.offer, offer, self._settings.max_hours):
            raise MismatchedStartError(f"the start of {reserved.task} is not what was accepted: {differs}")
        slot, late_s = self._slot_for(reserved)
        if late_s is not None:
            log.warning("late start", task=reserved.task, slot=slot, late_s=round(late_s))
        decision = msgspec.structs.replace(
            reserved.decision, slot=slot, deadline_at=self._records.deadline(offer, received_at)
        )
        return self._records.job(offer, decision, received_at)

    def _slot_for(self, reservation: Reservation) -> tuple[str, float | None]:
        """Return a start's slot, and how late it is if its reservation lapsed. Raises NoSlotError."""
        now, view = time.time(), self.views.now()
        holder = self._ledger.holder(reservation.slot, now)
        # Lapsed by this gateway's clock, or by another's, which gave the slot away.
        lapsed = holder is None or holder.reservation is not reservation
        late_s = max(0.0, now - reservation.expires_at)
        slot = slot_of_start(view, None if lapsed else reservation.slot)
        if slot is None:
            raise NoSlotError(
                f"the reservation of {reservation.task} lapsed {late_s:.0f} s ago, and no slot is free"
            )
        return slot, late_s if lapsed else None

    def _is_reserved(self, key: str) -> bool:
        task = self._ledger.task(key)
        return task is not None and task.job is None

    def _known(self, asked: AskedOffer) -> Decision | None:
        """Return the decision on a task that was accepted before: its own, or that its key is taken."""
        known, offer = self._ledger.accepted(asked.key, time.time()), asked.offer
        if known is None:
            return None
        if known.task_id != offer.task_id:
            reason = f"This task id has the same key as another accepted task, {known.task_id!r}"
        elif is_foreign(known.validator, asked.validator):
            reason = "Task id is that of a task accepted from another validator"
        else:
            return known
        judged = self._policy(offer, self.views.now())
        verdict = Verdict(
            reason=f"{reason}; offer it under another id",
            kind=DecisionKind.KEY_TAKEN,
            priority=judged.priority,
            terms=judged.terms,
            policy=judged.policy,
        )
        return self._rejected(asked, verdict)


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; raise BusTimeoutError if it takes longer than upstream waits."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise BusTimeoutError(f"NATS did not confirm within {seconds:.1f} s") from error
