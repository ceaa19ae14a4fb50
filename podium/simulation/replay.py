"""Replay a policy over a trace of offers on a simulated clock. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import count

from msgspec import Struct

from gateway.learning.evidence import Evidence
from gateway.policy.builtin import POINTS_OF_FAILURE, POINTS_OF_FIRST, task_work
from gateway.policy.interface import Policy, PolicyView, SlotFacts
from gateway.policy.model_family import model_family
from podium.simulation.trace import TraceLine
from shared.messages.hardware import Hardware
from shared.messages.jobs import ResultStatus, Score
from shared.messages.offers import BareOffer
from shared.planning.feasibility import Feasibility, check_offer
from shared.subjects import task_key


class Rules(Struct, frozen=True, kw_only=True):
    """The simulated fleet, and assumptions about outcomes that are not in the trace."""

    slots: tuple[str, ...]
    hardware: Hardware  # of every slot, and the expected one; slots are always live
    profile: str
    max_hours: float
    deadline_margin_s: float
    reservation_s: float
    min_points_per_hour: float
    prior_strength: float
    half_life_s: float
    win: float  # chance of winning
    fail: float  # chance of no valid submission


class Report(Struct, frozen=True, kw_only=True):
    """Results of one policy on a trace."""

    policy: str
    offers: int
    accepted: int
    again: int  # offers of tasks accepted before; the answer is the same
    rejected: dict[str, int]  # by DecisionKind
    by_type: dict[str, tuple[int, int]]  # offered, accepted
    started: int
    never_started: int
    late_refused: int  # started after the reservation lapsed, with no free slot: a failure
    recorded: int  # outcomes taken from the trace
    hours: float  # from the first offer to the last
    running_share: float  # of the slot time in these hours
    reserved_share: float
    work: float  # upstream's weights W of the jobs that started
    points: float  # expected, of all accepted jobs: sum of W * score
    points_per_day: float


class _Job(Struct):
    line: TraceLine
    slot: str
    feasible: bool
    since: float  # when it took the slot
    running: bool = False
    lapsed: bool = False


def replay(lines: list[TraceLine], policy: Policy, name: str, rules: Rules) -> Report:
    """Decide on every offer in order; the same arguments always give the same report."""
    world = _World(lines, policy, rules)
    for line in lines:
        world.offer(line)
    world.finish()
    return world.report(name)


class _World:
    """Slots, a queue of events, and counts."""

    def __init__(self, lines: list[TraceLine], policy: Policy, rules: Rules) -> None:
        self.rules, self.policy = rules, policy
        self.first, self.last = lines[0].at, lines[-1].at
        self.held: dict[str, _Job | None] = dict.fromkeys(rules.slots)
        self.queue: list[tuple[float, int, str, _Job]] = []
        self.order = count()
        self.known: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.offered: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.seconds = {"running": 0.0, "reserved": 0.0}
        self.points = self.work = 0.0
        self.evidence = Evidence(
            prior_strength=rules.prior_strength, half_life_s=rules.half_life_s, family=model_family
        )

    def offer(self, line: TraceLine) -> None:
        self.advance(line.at)
        offer = line.offer
        if offer.task_id in self.known:
            self.counts["again"] += 1
            return
        self.offered[offer.task_type] += 1
        verdict = self.policy(offer, self.view(line.at))
        if verdict.slot is None:
            self.rejected[verdict.kind] += 1
            return
        self.known.add(offer.task_id)
        self.taken[offer.task_type] += 1
        hours = offer.hours_to_complete - self.rules.deadline_margin_s / 3600
        job = _Job(line, verdict.slot, self.feasible(offer, hours, self.rules.hardware).ok, line.at)
        self.held[verdict.slot] = job
        if line.start_after_s is None or line.start_after_s > self.rules.reservation_s:
            self.push(line.at + self.rules.reservation_s, "lapse", job)
        if line.start_after_s is not None:
            self.push(line.at + line.start_after_s, "start", job)

    def advance(self, now: float) -> None:
        while self.queue and self.queue[0][0] <= now:
            at, _, kind, job = heapq.heappop(self.queue)
            {"lapse": self.lapse, "start": self.start, "end": self.end}[kind](at, job)

    def finish(self) -> None:
        self.advance(float("inf"))

    def lapse(self, at: float, job: _Job) -> None:
        self.release(at, job)
        job.lapsed = True
        self.known.discard(job.line.offer.task_id)  # a repeated offer would be decided again
        self.counts["never_started"] += job.line.start_after_s is None

    def start(self, at: float, job: _Job) -> None:
        if job.lapsed:
            free = next((slot for slot, held in self.held.items() if held is None), None)
            if free is None:
                self.counts["late_refused"] += 1
                self.points -= POINTS_OF_FAILURE * task_work(job.line.offer)
                return
            job.slot = free
        else:
            self.release(at, job)
        self.held[job.slot] = job
        job.since, job.running = at, True
        self.known.add(job.line.offer.task_id)
        self.counts["started"] += 1
        whole = max(0.0, job.line.offer.hours_to_complete * 3600 - self.rules.deadline_margin_s)
        ran = job.line.ran_s if job.line.ran_s is not None else whole
        self.push(at + ran, "end", job)

    def end(self, at: float, job: _Job) -> None:
        self.release(at, job)
        work = task_work(job.line.offer)
        self.work += work
        self.points += work * self.outcome(job)
        self.learn(at, job.line)

    def outcome(self, job: _Job) -> float:
        """Return upstream's score of a job: the recorded one, else the expected value."""
        line, rules = job.line, self.rules
        self.counts["recorded"] += line.score is not None or line.delivered is not None
        if line.score is not None:
            return line.score
        fail = rules.fail if job.feasible else 1.0
        if line.delivered is not None:
            fail = 0.0 if line.delivered else 1.0
        wins = min(1.0, rules.win / (1.0 - rules.fail)) if rules.fail < 1 else 0.0  # per delivered job
        return POINTS_OF_FIRST * wins * (1.0 - fail) - POINTS_OF_FAILURE * fail

    def learn(self, at: float, line: TraceLine) -> None:
        """Update the rates from a recorded outcome, as a gateway does."""
        key, offer = task_key(line.offer.task_id), line.offer
        if line.delivered is not None:
            status = ResultStatus.SUBMITTED if line.delivered else ResultStatus.FAILED
            self.evidence.note_result(key, offer.task_type, offer.model, status, at)
        if line.score is not None:
            self.evidence.note_score(
                Score(
                    record_id="",
                    task_id=offer.task_id,
                    task=key,
                    task_type=offer.task_type,
                    model=offer.model,
                    quality_score=line.score,
                    scored_at=at,
                )
            )

    def view(self, now: float) -> PolicyView:
        rules = self.rules
        return PolicyView(
            slots=tuple(
                SlotFacts(slot=slot, busy=job is not None, live=True, hardware=rules.hardware)
                for slot, job in self.held.items()
            ),
            tables=self.evidence.tables(now),
            expected=rules.hardware,
            max_hours=rules.max_hours,
            deadline_margin_s=rules.deadline_margin_s,
            feasible=self.feasible,
            min_points_per_hour=rules.min_points_per_hour,
        )

    def feasible(self, offer: BareOffer, hours: float, hardware: Hardware) -> Feasibility:
        return check_offer(
            offer.model, offer.model_params_count, offer.task_type, hours, hardware, self.rules.profile
        )

    def push(self, at: float, kind: str, job: _Job) -> None:
        heapq.heappush(self.queue, (at, next(self.order), kind, job))

    def release(self, at: float, job: _Job) -> None:
        """Free the job's slot and count the time it was held, up to the last offer."""
        self.held[job.slot] = None
        held = max(0.0, min(at, self.last) - min(job.since, self.last))
        self.seconds["running" if job.running else "reserved"] += held

    def report(self, name: str) -> Report:
        span = self.last - self.first
        days = span / 86400  # 0 also for the smallest span there is
        whole = span * len(self.rules.slots)
        return Report(
            policy=name,
            offers=sum(self.offered.values()) + self.counts["again"],
            accepted=sum(self.taken.values()),
            again=self.counts["again"],
            rejected=dict(self.rejected.most_common()),
            by_type={kind: (self.offered[kind], self.taken[kind]) for kind in sorted(self.offered)},
            started=self.counts["started"],
            never_started=self.counts["never_started"],
            late_refused=self.counts["late_refused"],
            recorded=self.counts["recorded"],
            hours=span / 3600,
            running_share=self.seconds["running"] / whole if whole else 0.0,
            reserved_share=self.seconds["reserved"] / whole if whole else 0.0,
            work=self.work,
            points=self.points,
            points_per_day=self.points / days if days else 0.0,
        )
