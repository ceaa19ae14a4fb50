"""The gateway without its HTTP side: it waits for the broker, reports readiness, and stops in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from gateway.admission import ANSWER_S
from gateway.broker_link import reach
from gateway.errors import MismatchedStartError, NoSlotError, NotAcceptedError
from gateway.learning.score_form import ScoreForm
from gateway.nats_offers import OfferResponder
from gateway.operations import Operations
from gateway.parts import Background, BrokerParts, LocalParts
from gateway.views.alerts import Alert, alerts_of
from gateway.views.build import agreed_settings, table_views
from gateway.views.days import DayCounts, day_counts, ends_of
from gateway.views.schemas import GatewayInfo, MirrorInfo, ScoresTaken, TablesView
from shared import subjects
from shared.clock import DAY_S
from shared.errors import BusError, BusUnavailableError
from shared.logs import get_logger
from shared.messages.jobs import Job, Score
from shared.messages.offers import BareOffer, Decision, Offer
from shared.settings import Settings
from shared.version import version

START_S = 1.8  # how long a request waits for a gateway that is starting; part of ANSWER_S
START_ANSWER_S = 7.0  # of the 10 s that upstream waits for a start; the last try takes START_S more
START_RETRY_S = 0.25

log = get_logger()


class Service:
    """One gateway without its HTTP side; while NATS is away it reports that and decides nothing."""

    def __init__(self, settings: Settings) -> None:
        local = self._local = LocalParts(settings)
        self.settings = settings
        self.ledger = local.ledger
        self.presence = local.presence
        self.decisions = local.decisions
        self.runs = local.runs
        self.measures = local.measures
        self.refusals = local.refusals
        self.connections = local.connections
        self.events = local.events
        self.event_sources = local.event_sources
        self.responder = OfferResponder(self.decide)
        self._lost: str | None = None  # records the broker lost, until they are restored
        self._parts: BrokerParts | None = None  # kept while the gateway stops: running offers need it

    async def started(self) -> BrokerParts:
        """Wait until logs, leases and scores were read. Raises BusUnavailableError after START_S.

        A request that arrives while the gateway restarts is delayed, not answered from half a ledger.
        """
        local = self._local
        if not (local.folded.is_set() and local.leases_seen.is_set() and local.scores_seen.is_set()):
            try:
                async with asyncio.timeout(START_S):
                    await local.folded.wait()
                    await local.leases_seen.wait()
                    await local.scores_seen.wait()
            except TimeoutError as error:
                raise BusUnavailableError(
                    self.why_not_ready() or "leases or scores have not been read yet"
                ) from error
        assert self._parts is not None  # only its work sets these events
        return self._parts

    async def decide(
        self,
        offer: BareOffer,
        received_at: float,
        *,
        before: Callable[[], Awaitable[None]] | None = None,
        validator: str = "",
    ) -> Decision:
        """Answer one offer; BusError if nothing can be decided now. The rest is as in `Admission.decide`."""
        clock = asyncio.get_running_loop()
        answer_by = clock.time() + ANSWER_S
        parts = await self.started()
        within_s = answer_by - clock.time()
        decision = await parts.admission.decide(
            offer, received_at, within_s=within_s, before=before, validator=validator
        )
        self.measures.decided(decision, received_at)
        return decision

    async def start(
        self,
        task_id: str,
        request: Callable[[BareOffer | None], Offer],
        received_at: float,
        validator: str = "",
    ) -> Job:
        """Start an accepted task whose data has arrived; see `Admission.start`.

        Upstream sends a start once, and a started task that isn't trained costs points. So
        while the broker is away, retry for as long as upstream waits.
        """
        clock = asyncio.get_running_loop()
        give_up_at, logged = clock.time() + START_ANSWER_S, False
        while True:
            try:
                parts = await self.started()
                within_s = min(ANSWER_S, give_up_at - clock.time())
                job = await parts.admission.start(
                    task_id, request, received_at, within_s=within_s, validator=validator
                )
            except MismatchedStartError as error:
                self.measures.starts.mismatched += 1
                log.warning("start refused", task=subjects.task_key(task_id), error=str(error))
                raise
            except (NotAcceptedError, NoSlotError):
                self.measures.starts.refused += 1
                raise
            except BusError as error:
                if clock.time() + START_RETRY_S > give_up_at:
                    raise
                if not logged:
                    logged = True
                    log.warning("start delayed, retrying", task=subjects.task_key(task_id), error=str(error))
                await asyncio.sleep(START_RETRY_S)
            else:
                self._count_start(job, received_at)
                return job

    def _count_start(self, job: Job, received_at: float) -> None:
        """Count a first start; a repeated one was counted before."""
        task = self.ledger.task(job.task)
        if job.received_at == received_at and task is not None and task.reservation is not None:
            late = task.reservation.expires_at <= received_at
            self.measures.starts.late += late
            self.measures.starts.in_time += not late

    @property
    def knows_the_logs(self) -> bool:
        """Return whether all logs were read to their ends once: then what has ended is known for good."""
        return self._local.folded.is_set()

    def operations(self) -> Operations:
        """Return the operators' commands; BusUnavailableError while the gateway starts or stops."""
        return self._working().operations

    async def take_scores(self, forms: list[ScoreForm]) -> ScoresTaken:
        """Store upstream's scores. Raises BusError if they can't be stored now."""
        return await self._working().take_scores(forms)

    def _working(self) -> BrokerParts:
        if self._parts is None or self._parts.stopping:
            raise BusUnavailableError(self.why_not_ready() or "the gateway is stopping")
        return self._parts

    def tables(self) -> TablesView:
        """Return the current learned rates."""
        tables, evidence = self._local.learner.tables(), self._local.learner.evidence
        return TablesView(
            policy=self.settings.policy,
            prior_strength=self.settings.prior_strength,
            half_life_days=self.settings.evidence_half_life_days,
            results=evidence.results,
            unused_results=evidence.unused,
            scores=evidence.scores,
            tables=table_views(tables),
        )

    def info(self) -> GatewayInfo:
        """Return this gateway's settings and condition."""
        parts, mirror, now = self._parts, self._local.mirror, time.time()
        return GatewayInfo(
            gateway=self.settings.gateway_name,
            version=version(),
            now=now,
            not_ready=self.why_not_ready(),
            settings=agreed_settings(self.settings),
            folded=self.ledger.folded,
            malformed_records=self.ledger.malformed + (parts.scores.malformed if parts else 0),
            malformed_messages=self.presence.malformed,
            lost_decisions=self.decisions.lost,
            denied=parts.denied() if parts else [],
            mirror=MirrorInfo(str(mirror.path), mirror.last, mirror.behind(self.ledger.folded), mirror.error),
            full_log=self._local.room.full,
            full_slots=self._local.room.full_slots,
            refused=self.refusals.recent(now),
        )

    @property
    def connected(self) -> bool:
        """Return whether the link to NATS is up."""
        return self._parts is not None and self._parts.bus.connected

    @property
    def log_age_s(self) -> float | None:
        """Return the seconds since the logs were read to their ends; None if they never were."""
        read_at = self._parts.log_reader.read_at if self._parts else None
        return None if read_at is None else time.monotonic() - read_at

    def why_not_ready(self) -> str | None:
        """Return what is missing to decide offers, or None."""
        if self._lost is not None:
            return self._lost
        if self._parts is None or not self._parts.bus.connected:
            return f"not connected to NATS at {self.settings.nats_url}"
        if not self._parts.log_reader.current:
            return self._parts.log_reader.missing or "the logs have not been read to their ends"
        return None

    async def run(self, background: Background) -> None:
        """Run until cancelled, with `background` while connected. Raises PodiumError if it can't go on."""
        local = self._local
        await self._open_mirror()
        await local.families.load()
        try:
            bus = await reach(self.settings, local.mirror, self._set_lost)
            try:
                self._parts = BrokerParts(local, bus)
                await self._parts.run(self.responder, background)
            finally:
                await self.responder.stop()
                await self.decisions.flush()
                await self._flush_runs()
                await bus.close()
        finally:
            await asyncio.to_thread(local.mirror.close)

    async def _flush_runs(self) -> None:
        """Write the last points of runs; a full disk must not keep the gateway from stopping in order."""
        try:
            await self.runs.flush()
        except OSError as error:
            log.warning("points of runs are lost: they can't be written", error=str(error))

    def score_of(self, task: str) -> Score | None:
        """Return upstream's score of a task, if one was received."""
        return self._local.learner.evidence.score_of(task)

    def days(self, days: int) -> list[DayCounts]:
        """Return what became of the jobs of the last days."""
        ends = ends_of(self.ledger, self.score_of)
        return day_counts(ends, time.time() - days * DAY_S)

    def alerts(self) -> list[Alert]:
        """Return what needs an operator now, the worst first."""
        return alerts_of(self.info(), self.ledger, self.presence, self.settings, time.time())

    def _set_lost(self, lost: str | None) -> None:
        self._lost = lost

    async def _open_mirror(self) -> None:
        """Open the mirror. A gateway that can't write its mirror still decides, and reports the error."""
        try:
            await asyncio.to_thread(self._local.mirror.open)
        except OSError as error:
            self._local.mirror.fail(error)
