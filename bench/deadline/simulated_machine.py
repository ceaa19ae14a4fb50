"""A simulated machine for whole training runs: every part of the real pipeline takes its time on one clock.

The clock advances with every pack that the real loop trains, and by a cost whenever the pipeline loads,
reads, scores, saves, exports or verifies (bench/deadline/simulated_pipeline.py). The simulated node
receives only the pipeline's reports. The fault model, drawn again for every run:

- noise: every step and every cost is multiplied by a log-normal factor of sigma .1; a save, export or load
  takes 2 to 5 times as long in one of ten cases
- slow periods: on average one a run, 2 to 10 times slower, for 1% to 10% of the budget
- stalls: on average one and a half a run, 1 to 60 s in which nothing moves (SIGSTOP, a hanging disk)
- restarts: on average one and a half a run; the process exits, and a new one starts after .5 to 5 s and
  repeats imports, load and ingest
- in every fourth run one of these begins within the last 2% before `ready_by`, while the run is finishing
- every tenth run ends with weights that score worse than the base model

The simulated node uses the real node's rule (`stop_reason` in trainer_node/worker/progress.py).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Protocol

from msgspec import Struct

from shared.messages.runs import Phase
from trainer_node.context import DISMISS_GRACE_S
from trainer_node.worker.progress import LATE_HANG_S, stop_reason

HANG_S = 900.0  # the node's setting
LONGEST_STALL_S = 60.0
PYTHON_SHARE = 0.1  # of a process's start: Python itself and what it needs to submit a finished export


class Seconds(Struct, kw_only=True):
    """Durations of the parts of an undisturbed run; steps take time by their tokens."""

    start: float  # of a process: Python and its imports
    load: float
    ingest: float
    row: float  # score one row
    save: float
    export: float
    tokens_per_s: float


class Faults(Struct, kw_only=True):
    """The faults of one run, in clock time, each list in order."""

    slow: list[tuple[float, float, float]] = []  # from, to, factor
    stalls: list[tuple[float, float]] = []  # at, seconds
    restarts: list[float] = []
    spoilt: bool = False  # the last weights are worse than the base model's


class Work(Protocol):
    """Work in the background, until `done_at`."""

    done_at: float

    def carry_out(self) -> None:
        """Do it now."""
        ...


class Killed(BaseException):
    """The process is gone; no Exception, so that nothing in the pipeline can stop it."""


class World:
    """Clock and machine of one run; `node_kills`: by the node's rule; `spent`: seconds by kind of work."""

    def __init__(
        self, seconds: Seconds, faults: Faults, noise: random.Random, ready_by: float, deadline_at: float
    ) -> None:
        self.seconds, self.faults, self.noise = seconds, faults, noise
        self.ready_by, self.deadline_at = ready_by, deadline_at
        self.now = self.heard_at = self.started_at = 0.0
        self.phase: Phase | None = None
        self.patient_until = -math.inf  # until then the pipeline vouches for one silent call
        self.finished = False  # training is
        self.background: Work | None = None  # the save that is being written
        self.node_kills = self.kills = 0
        self.late: list[str] = []
        self.spent: defaultdict[str, float] = defaultdict(float)

    def time(self) -> float:
        """Simulated seconds; a run's budget begins at 0."""
        return self.now

    def advance(self, tokens: int) -> None:
        """Count so many trained tokens; their packs took the time already."""

    def trained(self, tokens: int) -> None:
        """Count one pack."""
        self.spend("step", tokens / self.seconds.tokens_per_s)

    def begin(self) -> None:
        """Start a new process."""
        self.started_at = self.heard_at = self.now
        self.phase, self.patient_until, self.finished, self.background = None, -math.inf, False, None
        self.spend("start", PYTHON_SHARE * self.seconds.start)

    def reached(self, phase: Phase) -> None:
        """Receive the report of a phase."""
        self.phase, self.heard_at = phase, self.now

    def imports(self) -> None:
        """Spend the time that importing torch takes."""
        self.spend("start", (1 - PYTHON_SHARE) * self.seconds.start)

    def rough(self, seconds: float) -> float:
        """Draw the duration of a part."""
        seconds *= math.exp(self.noise.gauss(0.0, 0.1))
        return seconds * self.noise.uniform(2.0, 5.0) if self.noise.random() < 0.1 else seconds

    def spend(self, kind: str, seconds: float, *, rough: bool = False) -> None:
        """Let work of so many seconds take place; Killed if the process doesn't live to its end."""
        seconds = self.rough(seconds) if rough else seconds * math.exp(self.noise.gauss(0.0, 0.1))
        self.wait(kind, self.end_of(seconds))

    def wait(self, kind: str, end: float) -> None:
        """Let the time pass until `end`, and longer by every stall on the way."""
        began = self.now
        while self.faults.stalls and self.faults.stalls[0][0] < end:
            at, length = self.faults.stalls.pop(0)
            self._pass(max(at, self.now))
            patient, self.patient_until = self.patient_until, -math.inf  # nobody can vouch for it now
            self.heard_at = max(self.heard_at, min(self.now, patient))
            if self.background:
                self.background.done_at += length
            self._pass(self.now + length)
            self.patient_until, end = patient, end + length
        self._pass(end)
        self.spent[kind] += self.now - began
        if self.now > self.ready_by and self.now - began >= 1.0:
            self.late.append(f"{kind} {self.now - began:.0f} s")

    def _pass(self, end: float) -> None:
        """Let time pass; a background save may finish in it."""
        killed_at, noticed_at = math.inf, self._noticed(end)
        if self.faults.restarts and self.faults.restarts[0] < end:
            killed_at = max(self.now, self.faults.restarts.pop(0))
        first = min(end, killed_at, noticed_at)
        if self.background and self.background.done_at <= first:
            self.now = max(self.now, self.background.done_at)
            self.background.carry_out()
        if first < end:
            self.kills += 1
            if first > self.ready_by:
                self.late.append(f"killed by {'the node' if noticed_at < killed_at else 'chance'}")
            self.node_kills += noticed_at < killed_at
            self.now = min(killed_at, noticed_at + DISMISS_GRACE_S) + self.noise.uniform(0.5, 5.0)
            raise Killed
        self.now = end

    def last_words(self) -> str:
        """Describe how the time after `ready_by` was spent."""
        return ", ".join(self.late)

    def end_of(self, work: float) -> float:
        """Return when work that begins now is done, slow periods included."""
        now = self.now
        for start, stop, factor in self.faults.slow:
            if stop <= now:
                continue
            if now + work <= start:
                break
            work -= max(0.0, start - now)
            now = max(now, start)
            if work * factor <= stop - now:
                return now + work * factor
            work -= (stop - now) / factor
            now = stop
        return now + work

    def _noticed(self, end: float) -> float:
        """Return when the node ends a worker that is silent until `end`; infinity if it doesn't."""
        heard_at = max(self.heard_at, self.patient_until)
        looks = (max(self.ready_by, heard_at + LATE_HANG_S), self.deadline_at, heard_at + HANG_S)
        for at in sorted(looks):
            why = stop_reason(
                now=at,
                silent_s=at - max(self.heard_at, min(at, self.patient_until)),
                hang_s=HANG_S,
                started_at=self.started_at,
                ready_by=self.ready_by,
                deadline_at=self.deadline_at,
                phase=self.phase,
            )
            if self.now <= at < end and why:
                return at
        return math.inf


def draw(random_: random.Random, budget_s: float, tokens: float) -> tuple[Seconds, Faults]:
    """Draw a machine, a model and a run's bad luck. `tokens` is the most an undisturbed run could train."""
    size = math.exp(random_.uniform(math.log(0.2), math.log(min(30.0, budget_s / 300))))  # s for one save
    seconds = Seconds(
        start=random_.uniform(3.0, 12.0),
        load=size * random_.uniform(0.3, 1.0),
        ingest=random_.uniform(1.0, budget_s / 100),
        row=budget_s / 100 / random_.uniform(10.0, 100.0),
        save=size,
        export=size * random_.uniform(0.3, 0.7),
        tokens_per_s=tokens / budget_s,
    )
    return seconds, bad_luck(random_, budget_s)


def bad_luck(random_: random.Random, budget_s: float) -> Faults:
    """Draw the faults of a run of `budget_s` seconds."""
    slow, at = [], 0.0
    while (at := at + random_.expovariate(1 / budget_s)) < budget_s:
        length = random_.uniform(0.01, 0.1) * budget_s
        slow.append((at, at + length, random_.uniform(2.0, 10.0)))
        at += length
    stalls = [(at, _stall(random_)) for at in _moments(random_, 1.5, budget_s)]
    restarts = _moments(random_, 1.5, budget_s)
    if random_.random() < 0.25:
        late = random_.uniform(0.98, 1.0) * budget_s
        if random_.random() < 0.5:
            stalls.append((late, _stall(random_)))
        else:
            restarts.append(late)
    spoilt = random_.random() < 0.1
    return Faults(slow=slow, stalls=sorted(stalls), restarts=sorted(restarts), spoilt=spoilt)


def _stall(random_: random.Random) -> float:
    return math.exp(random_.uniform(0.0, math.log(LONGEST_STALL_S)))


def _moments(random_: random.Random, mean: float, until: float) -> list[float]:
    moments, at = [], 0.0
    while (at := at + random_.expovariate(mean / until)) < until:
        moments.append(at)
    return moments
