"""The parts of one gateway and their lifetime: connect to NATS, fold, subscribe, decide; stop in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.admission import ANSWER_S, Admission
from gateway.api.throttle import LoopThrottle
from gateway.broker_link import RETRY_S, end_with, reach
from gateway.errors import NoSlotError, NotAcceptedError, UnknownScoredTaskError
from gateway.expiry import expire_for_ever
from gateway.learning.evidence import DAY_S, Evidence
from gateway.learning.learner import Learner
from gateway.learning.score_form import ScoreForm, score_of
from gateway.learning.score_stream import ScoreLog
from gateway.nats_offers import OfferResponder
from gateway.operations import Operations
from gateway.policy.loader import load_policy
from gateway.policy.model_family import Families
from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from gateway.state.mirror import Mirror
from gateway.state.presence import Presence
from gateway.telemetry.counters import Measures
from gateway.telemetry.decision_log import DecisionLog
from gateway.telemetry.event_log import EventLog
from gateway.telemetry.event_sources import EventSources
from gateway.upstream.auth import gate_of
from gateway.upstream.nonces import Nonces
from gateway.upstream.validators import Validators
from gateway.views.build import agreed, table_views
from gateway.views.schemas import GatewayInfo, MirrorInfo, RefusedScore, ScoresTaken, TablesView
from shared import subjects
from shared.aio import cancel_all
from shared.broker.bus import Bus
from shared.errors import BusError, BusUnavailableError
from shared.logs import get_logger
from shared.messages import BareOffer, Decision, Job, Offer
from shared.planning.hardware import parse_hardware
from shared.settings import Settings
from shared.version import version

START_S = 1.8  # how long a request waits for a gateway that is starting; part of ANSWER_S
START_ANSWER_S = 7.0  # of the 10 s that upstream waits for a start; the last try takes START_S more
START_RETRY_S = 0.25
DECISIONS_FILE = "decisions.jsonl"

log = get_logger()


class Service:
    """One gateway without its HTTP side; while NATS is away it reports that and decides nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger()
        self.presence = Presence(settings.heartbeat_missing_s)
        self.decisions = DecisionLog(settings.data / DECISIONS_FILE)
        self.measures = Measures()
        self.events = EventLog()
        self.throttle = LoopThrottle()
        self._expected = parse_hardware(settings.expected_hardware)
        self._policy = load_policy(settings.policy)
        self._families = Families(settings)
        evidence = Evidence(
            prior_strength=settings.prior_strength,
            half_life_s=settings.evidence_half_life_days * DAY_S,
            family=self._families,
        )
        self.learner = Learner(self.ledger, evidence)
        self._bus: Bus | None = None
        self._follower: LogReader | None = None
        self._admission: Admission | None = None
        self._operations: Operations | None = None
        self._scores: ScoreLog | None = None
        self._mirror = Mirror(settings.data, settings.gateway_name)
        self._lost: str | None = None  # records the broker lost, until they are restored
        self.responder = OfferResponder(self.decide)
        nodes_file = settings.upstream_nodes_file
        self._validators = Validators(
            settings.upstream_validators,
            Path(nodes_file).expanduser() if nodes_file else None,
            settings.upstream_min_stake,
        )
        self._nonces = Nonces(settings.gateway_name)
        self.gate = gate_of(settings, self._validators, self._nonces)
        self._folded = asyncio.Event()  # both logs were read to their end once
        self._leases_seen = asyncio.Event()
        self._scores_seen = asyncio.Event()
        self.event_sources = EventSources(
            self.events, self.ledger, self.presence, self.measures, self._folded
        )
        self.ledger.on_task = self.event_sources.on_task
        self.presence.on_message = self.event_sources.on_run_message

    async def prepare(self) -> None:
        """Load the validators before the first request is read: upstream asks once."""
        await self._validators.look()

    async def started(self) -> None:
        """Wait until logs, leases and scores were read. Raises BusUnavailableError after START_S.

        A request that arrives while the gateway restarts is delayed, not answered from half a ledger.
        """
        if self._folded.is_set() and self._leases_seen.is_set() and self._scores_seen.is_set():
            return
        try:
            async with asyncio.timeout(START_S):
                await self._folded.wait()
                await self._leases_seen.wait()
                await self._scores_seen.wait()
        except TimeoutError as error:
            raise BusUnavailableError(
                self.why_not_ready() or "leases or scores have not been read yet"
            ) from error

    async def decide(
        self, offer: BareOffer, received_at: float, *, before: Callable[[], Awaitable[None]] | None = None
    ) -> Decision:
        """Answer one offer; BusError if nothing can be decided now. `before` as in `Admission.decide`."""
        clock = asyncio.get_running_loop()
        answer_by = clock.time() + ANSWER_S
        await self.started()
        within_s = answer_by - clock.time()
        decision = await self._admits().decide(offer, received_at, within_s=within_s, before=before)
        self.measures.decided(decision, received_at)
        return decision

    async def start(
        self, task_id: str, request: Callable[[BareOffer | None], Offer], received_at: float
    ) -> Job:
        """Start an accepted task whose data has arrived; see `Admission.start`.

        Upstream sends a start once, and a started task that isn't trained costs points. So
        while the broker is away, retry for as long as upstream waits.
        """
        clock = asyncio.get_running_loop()
        give_up_at, logged = clock.time() + START_ANSWER_S, False
        while True:
            try:
                await self.started()
                within_s = min(ANSWER_S, give_up_at - clock.time())
                job = await self._admits().start(task_id, request, received_at, within_s=within_s)
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

    def _admits(self) -> Admission:
        if self._admission is None:
            raise BusUnavailableError("the gateway is stopping")
        return self._admission

    @property
    def knows_the_logs(self) -> bool:
        """Whether both logs were read to their end once: then what has ended is known for good."""
        return self._folded.is_set()

    def operations(self) -> Operations:
        """Return the operators' commands; BusUnavailableError while the gateway starts or stops."""
        if self._operations is None:
            raise BusUnavailableError(self.why_not_ready() or "the gateway is stopping")
        return self._operations

    async def take_scores(self, forms: list[ScoreForm]) -> ScoresTaken:
        """Store upstream's scores. Raises BusError if they can't be stored now."""
        if self._scores is None or self._follower is None:
            raise BusUnavailableError(self.why_not_ready() or "the gateway is stopping")
        await self._follower.catch_up()  # another gateway may have accepted the task a moment ago
        taken, now = ScoresTaken(), time.time()
        for form in forms:
            try:
                score = score_of(form, self.ledger, now)
            except UnknownScoredTaskError as error:
                taken.refused.append(RefusedScore(form.task_id, str(error)))
                continue
            new = await self._scores.store(score, dated=form.scored_at is not None)
            (taken.stored if new else taken.known).append(form.task_id)
        await self._scores.catch_up()
        return taken

    def tables(self) -> TablesView:
        """Return the current learned rates."""
        tables, evidence = self.learner.tables(), self.learner.evidence
        return TablesView(
            policy=self.settings.policy,
            prior_strength=self.settings.prior_strength,
            half_life_days=self.settings.evidence_half_life_days,
            results=evidence.results,
            scores=evidence.scores,
            tables=table_views(tables),
        )

    def info(self) -> GatewayInfo:
        """Return this gateway's settings and condition."""
        bus, mirror = self._bus, self._mirror
        return GatewayInfo(
            gateway=self.settings.gateway_name,
            version=version(),
            now=time.time(),
            not_ready=self.why_not_ready(),
            settings=agreed(self.settings),
            folded=self.ledger.folded,
            malformed_records=self.ledger.malformed + (self._scores.malformed if self._scores else 0),
            malformed_messages=self.presence.malformed,
            lost_decisions=self.decisions.lost,
            denied=[denial.explain(bus.user) for denial in bus.denied] if bus is not None else [],
            mirror=MirrorInfo(str(mirror.path), mirror.last, mirror.behind(self.ledger.folded), mirror.error),
        )

    @property
    def connected(self) -> bool:
        """Whether the link to NATS is up."""
        return self._bus is not None and self._bus.connected

    @property
    def log_age_s(self) -> float | None:
        """Seconds since both logs were read to their end; None if they never were."""
        read_at = self._follower.read_at if self._follower is not None else None
        return None if read_at is None else time.monotonic() - read_at

    def why_not_ready(self) -> str | None:
        """Return what is missing to decide offers, or None."""
        if self._lost is not None:
            return self._lost
        if self._bus is None or not self._bus.connected:
            return f"not connected to NATS at {self.settings.nats_url}"
        if self._follower is None or not self._follower.current:
            return "JOBS and STATE have not been read to their end"
        return None

    async def run(self) -> None:
        """Run until cancelled. Raises PodiumError if the gateway can't go on."""
        await self._open_mirror()
        await self._families.load()
        try:
            bus = self._bus = await reach(self.settings, self._mirror, self._set_lost)
            try:
                await self._work(bus)
            finally:
                await self.responder.stop()
                await self.decisions.flush()
                await bus.close()
        finally:
            await asyncio.to_thread(self._mirror.close)

    async def _work(self, bus: Bus) -> None:
        settings, ledger = self.settings, self.ledger
        mirror = self._mirror
        follower = LogReader(bus, ledger, settings.poll_s, self._folded, self._after_fold)
        scores = ScoreLog(bus, self.learner, settings.poll_s, self._scores_seen)
        admission = Admission(
            settings,
            bus,
            ledger,
            follower,
            self.presence,
            self.decisions,
            expected=self._expected,
            tables=self.learner.tables,
            family=self._families,
            policy=self._policy,
        )
        await follower.start()
        await scores.start()
        await self.presence.start(bus)
        parts = [
            asyncio.create_task(end_with(bus), name="bus watch"),
            asyncio.create_task(follower.run(), name="follower"),
            asyncio.create_task(scores.run(), name="scores"),
            asyncio.create_task(self._read_leases(bus), name="leases"),
            asyncio.create_task(self.decisions.run(bus), name="decisions"),
            asyncio.create_task(self.event_sources.run(bus), name="news"),
            asyncio.create_task(mirror.run(bus, ledger.folded), name="mirror"),
            asyncio.create_task(self._nonces.run(bus), name="nonces"),
            asyncio.create_task(self._validators.follow(), name="validators"),
            asyncio.create_task(
                expire_for_ever(bus, ledger, follower, settings.expire_after_s), name="expiry"
            ),
        ]
        try:
            self._follower, self._admission, self._scores = follower, admission, scores
            self._operations = Operations(bus, ledger, follower, settings.gateway_name)
            await self.responder.start(bus)
            ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in ended:  # none should end by itself
                part.result()
        finally:
            self._operations = self._scores = None
            await cancel_all(parts)

    def _set_lost(self, lost: str | None) -> None:
        self._lost = lost

    def _after_fold(self) -> None:
        self._mirror.wake.set()
        self.learner.apply_results()

    async def _open_mirror(self) -> None:
        """Open the mirror. A gateway that can't write its mirror still decides, and reports the error."""
        try:
            await asyncio.to_thread(self._mirror.open)
        except OSError as error:
            self._mirror.fail(error)

    async def _read_leases(self, bus: Bus) -> None:
        """Read the leases now and after each reconnect: heartbeats sent in between were missed."""
        again = asyncio.Event()
        bus.on_reconnect(again.set)
        while True:
            again.clear()
            try:
                await self.presence.read_leases(bus, self.settings.slots)
                self._leases_seen.set()
            except BusError as error:
                log.debug("can't read leases; waiting for heartbeats", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            await again.wait()
