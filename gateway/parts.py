"""The parts of one gateway: those that need no broker, and those that work over one link to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from gateway.admission import Admission
from gateway.broker_link import RETRY_S, end_with
from gateway.connections import Connections, limits_of
from gateway.errors import UnknownScoredTaskError
from gateway.expiry import expire_for_ever
from gateway.learning.evidence import Evidence
from gateway.learning.learner import Learner
from gateway.learning.score_form import ScoreForm, score_of
from gateway.learning.score_stream import ScoreLog
from gateway.nats_offers import OfferResponder
from gateway.operations import Operations
from gateway.policy.loader import load_policy
from gateway.policy.model_family import Families
from gateway.policy.view import PolicyViews
from gateway.relocation import Relocation
from gateway.state.ledger import Ledger
from gateway.state.log_reader import LogReader
from gateway.state.log_room import LogRoom
from gateway.state.mirror import Mirror
from gateway.state.presence import Presence
from gateway.telemetry.counters import Measures
from gateway.telemetry.decision_log import DecisionLog
from gateway.telemetry.event_log import EventLog
from gateway.telemetry.event_sources import EventSources
from gateway.telemetry.missed_progress import fill_for_ever
from gateway.telemetry.refusals import Refusals
from gateway.telemetry.run_history import RunHistory
from gateway.views.schemas import RefusedScore, ScoresTaken
from shared.aio import cancel_all
from shared.broker.bus import Bus
from shared.clock import DAY_S
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.runs import Progress
from shared.messages.slots import Heartbeat
from shared.planning.hardware import parse_hardware
from shared.settings import Settings

DECISIONS_FILE = "decisions.jsonl"
RUNS_FOLDER = "runs"

Background = Mapping[str, Callable[[Bus], Coroutine[Any, Any, None]]]  # work for the link's lifetime, by name

log = get_logger()


class LocalParts:
    """The parts that need no broker; they exist as long as the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger(settings.slots)
        self.presence = Presence(settings.heartbeat_missing_s, slot_of=self.ledger.slot_of)
        self.decisions = DecisionLog(settings.data / DECISIONS_FILE)
        self.runs = RunHistory(settings.data / RUNS_FOLDER)
        self.measures = Measures()
        self.refusals = Refusals()
        self.connections = Connections(
            limits_of(settings.max_connections, settings.max_connections_per_address)
        )
        self.events = EventLog()
        self.expected = parse_hardware(settings.expected_hardware)
        self.policy = load_policy(settings.policy)
        self.families = Families(settings)
        evidence = Evidence(
            prior_strength=settings.prior_strength,
            half_life_s=settings.evidence_half_life_days * DAY_S,
            family=self.families,
        )
        self.learner = Learner(self.ledger, evidence)
        self.room = LogRoom(settings.slots)
        self.mirror = Mirror(settings.data, settings.gateway_name)
        self.folded = asyncio.Event()  # the logs were read to their ends once
        self.leases_seen = asyncio.Event()
        self.scores_seen = asyncio.Event()
        self.event_sources = EventSources(self.events, self.ledger, self.presence, self.measures, self.folded)
        self.ledger.on_task = self.event_sources.on_task
        self.ledger.on_drain = self.event_sources.on_drain
        self.presence.on_message = self._on_run_message

    def _on_run_message(self, message: Heartbeat | Progress, data: bytes) -> None:
        if isinstance(message, Progress):
            self.runs.note(message)
        self.event_sources.on_run_message(message, data)

    def after_fold(self) -> None:
        """Let the mirror and the learner follow the ledger."""
        self.mirror.wake.set()
        self.learner.apply_results()


def _views(local: LocalParts) -> PolicyViews:
    return PolicyViews(
        local.settings,
        local.ledger,
        local.presence,
        expected=local.expected,
        tables=local.learner.tables,
        family=local.families,
        facts=local.families.facts,
        is_here=local.families.is_here,
        full_slots=lambda: local.room.full_slots,
    )


class BrokerParts:
    """The parts that work over one link to the broker. They are complete from the start; `run` works."""

    def __init__(self, local: LocalParts, bus: Bus) -> None:
        settings, ledger = local.settings, local.ledger
        self.bus = bus
        self.stopping = False
        self.log_reader = LogReader(bus, ledger, settings.poll_s, local.folded, local.after_fold)
        self.scores = ScoreLog(bus, local.learner, settings.poll_s, local.scores_seen)
        self.admission = Admission(
            settings,
            bus,
            ledger,
            self.log_reader,
            local.decisions,
            _views(local),
            policy=local.policy,
            look=local.families.look,
            full=lambda: local.room.full,
        )
        self.operations = Operations(bus, ledger, self.log_reader, self.admission.writer, settings)
        self.relocation = Relocation(settings, bus, ledger, self.log_reader, self.admission, local.measures)
        self._local = local

    async def run(self, responder: OfferResponder, background: Background) -> None:
        """Subscribe and work until a part fails or the link is closed for good; raise why."""
        await self.log_reader.start()
        await self.scores.start()
        await self._local.presence.start(self.bus)
        work = {**self._work(), **{name: run(self.bus) for name, run in background.items()}}
        tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in work.items()]
        try:
            await responder.start(self.bus)
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:  # none should end by itself
                task.result()
        finally:
            self.stopping = True
            await cancel_all(tasks)

    def _work(self) -> dict[str, Coroutine[Any, Any, None]]:
        local, bus, ledger = self._local, self.bus, self._local.ledger
        return {
            "bus watch": end_with(bus),
            "log reader": self.log_reader.run(),
            "scores": self.scores.run(),
            "leases": self._read_leases(),
            "decisions": local.decisions.run(bus),
            "runs": local.runs.run(),
            "missed progress": fill_for_ever(bus, local.runs, self.log_reader.catch_up, ledger.slot_of),
            "event sources": local.event_sources.run(bus),
            "log room": local.room.run(bus),
            "mirror": local.mirror.run(bus, ledger.folded),
            "relocation": self._relocate(),
            "expiry": expire_for_ever(bus, ledger, self.log_reader, local.settings.expire_after_s),
        }

    async def _relocate(self) -> None:
        await self._local.leases_seen.wait()  # before that no slot is known to be live
        await self.relocation.run()

    def denied(self) -> list[str]:
        """Return what the broker has denied this gateway, each with its cause."""
        return [denial.explain(self.bus.user) for denial in self.bus.denied]

    async def take_scores(self, forms: list[ScoreForm]) -> ScoresTaken:
        """Store and count new scores. Raises BusError; then some may be stored: send all again."""
        await self.log_reader.catch_up()  # another gateway may have accepted the task a moment ago
        taken, now = ScoresTaken(), time.time()
        for form in forms:
            try:
                score = score_of(form, self._local.ledger, now)
            except UnknownScoredTaskError as error:
                taken.refused.append(RefusedScore(form.task_id, str(error)))
                continue
            new = await self.scores.store(score, dated=form.scored_at is not None)
            (taken.stored if new else taken.known).append(form.task_id)
        await self.scores.catch_up()
        return taken

    async def _read_leases(self) -> None:
        """Read the leases now and after each reconnect: heartbeats sent in between were missed."""
        again = asyncio.Event()
        self.bus.on_reconnect(again.set)
        while True:
            again.clear()
            try:
                await self._local.presence.read_leases(self.bus, self._local.settings.slots)
                self._local.leases_seen.set()
            except BusError as error:
                log.debug("can't read leases; waiting for heartbeats", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            await again.wait()
