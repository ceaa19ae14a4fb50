"""A simulated machine for whole training runs: every part of the real pipeline takes its time on one clock.

The clock moves with the tokens that the real loop trains, and by a cost whenever the pipeline loads, reads,
scores, saves, exports or verifies (COSTS). The fault model, drawn anew for every run:

- noise: every step and every cost is multiplied by a log-normal factor of sigma .1; a save, export or load
  takes 2 to 5 times as long in one of ten cases
- slow periods: on average one a run, 2 to 10 times slower, for 1% to 10% of the budget
- stalls: on average one and a half a run, 1 to 60 s in which nothing moves (SIGSTOP, a hanging disk)
- restarts: on average one and a half a run; the process is gone, and a new one starts after .5 to 5 s, with
  its imports, load and ingest to pay again
- every fourth run has one of these begin within the last 2% before `ready_by`, when the run is closing

The node's part is played by its own rule (trainer_node.follower.must_stop).
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import asdict

from shared.messages import Phase, Progress
from trainer_node.engine import checkpoint, export, loop, prepare, run, score
from trainer_node.engine.data import Examples
from trainer_node.engine.model import load_model, load_tokenizer
from trainer_node.engine.progress import Reporter
from trainer_node.engine.stop import Stop
from trainer_node.follower import LATE_HANG_S, must_stop
from trainer_node.post import DISMISS_GRACE_S

COSTS = (
    (run, "load_model", "load"),
    (prepare, "ingest", "ingest"),
    (score, "score_sft", "row"),
    (checkpoint, "save", "save"),
    (export, "write", "export"),
    (export, "verify", "verify"),
)
HANG_S = 900.0  # the node's setting
LONGEST_STALL_S = 60.0


class Seconds(Struct, kw_only=True):
    """What the parts of a run take when nothing goes wrong; steps go by tokens."""

    start: float  # of a process: Python and its imports
    load: float
    ingest: float
    row: float  # score one row
    save: float
    export: float
    tokens_per_s: float


class Faults(Struct, kw_only=True):
    """What goes wrong in one run, in clock time, each list in order."""

    slow: list[tuple[float, float, float]] = []  # from, to, factor
    stalls: list[tuple[float, float]] = []  # at, seconds
    restarts: list[float] = []


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
        self.node_kills = self.kills = 0
        self.spent: defaultdict[str, float] = defaultdict(float)

    def time(self) -> float:
        """Simulated seconds; a run's budget begins at 0."""
        return self.now

    def advance(self, tokens: int) -> None:
        """The loop trained so many tokens."""
        self.spend("step", tokens / self.seconds.tokens_per_s)

    def begin(self) -> None:
        """A new process starts."""
        self.started_at = self.heard_at = self.now
        self.phase = None
        self.spend("start", self.seconds.start)

    def spend(self, kind: str, seconds: float, *, rough: bool = False) -> None:
        """Let work of so many seconds take place; Killed if the process doesn't live to its end."""
        seconds *= math.exp(self.noise.gauss(0.0, 0.1))
        if rough and self.noise.random() < 0.1:
            seconds *= self.noise.uniform(2.0, 5.0)
        end, killed_at = self._end_of(seconds), math.inf
        while self.faults.stalls and self.faults.stalls[0][0] < end:
            end += self.faults.stalls.pop(0)[1]
        if self.faults.restarts and self.faults.restarts[0] < end:
            killed_at = max(self.now, self.faults.restarts.pop(0))
        noticed_at = self._noticed(end)
        if min(killed_at, noticed_at) < end:
            self.kills += 1
            self.node_kills += noticed_at < killed_at
            self.now = min(killed_at, noticed_at + DISMISS_GRACE_S) + self.noise.uniform(0.5, 5.0)
            raise Killed
        self.spent[kind] += end - self.now
        self.now = self.heard_at = end

    def _end_of(self, work: float) -> float:
        """When work that begins now is done, slow periods considered."""
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
        """When the node ends a worker that says nothing until `end`; infinity if it doesn't."""
        looks = (max(self.ready_by, self.heard_at + LATE_HANG_S), self.deadline_at, self.heard_at + HANG_S)
        for at in sorted(looks):
            why = must_stop(
                now=at,
                silent_s=at - self.heard_at,
                hang_s=HANG_S,
                started_at=self.started_at,
                ready_by=self.ready_by,
                deadline_at=self.deadline_at,
                phase=self.phase,
            )
            if self.now <= at < end and why:
                return at
        return math.inf


class Ear(Reporter):
    """Tells the world in which phase a run is, as the node would read it."""

    world: World

    def _emit(self, progress: Progress) -> None:
        super()._emit(progress)
        self.world.phase = progress.phase


@contextmanager
def costs(world: World, *, computes: bool) -> Iterator[None]:
    """Inside, the pipeline's expensive parts take their time in the world.

    Unless it `computes`, gradients are zero, every loss is 1 and no export is reloaded; all that decides,
    counts and writes stays what it is.
    """
    before = [(module, name, getattr(module, name)) for module, name, _ in (*COSTS, *IDLE)]
    for module, name, idle in () if computes else IDLE:
        setattr(module, name, idle)
    for module, name, kind in COSTS:
        setattr(module, name, _costing(world, kind, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, real in reversed(before):
            setattr(module, name, real)


@cache
def _loaded(path: str, dtype: torch.dtype) -> torch.nn.Module:
    return load_model(path, dtype)


def _copied(path: str, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(_loaded(path, dtype))


def _zero(training: loop.Training, packs: list[list[int]], stop: Stop) -> tuple[torch.Tensor, int]:
    return torch.zeros(()), sum(int(training.examples.lengths[index]) for pack in packs for index in pack)


def _one(model: torch.nn.Module, examples: Examples, **_: object) -> score.Score:
    return score.Score(1.0, np.ones(len(examples)))


def _right(*_: object) -> None:
    return None


IDLE: tuple[tuple[Any, str, Any], ...] = (
    (run, "load_model", _copied),
    (prepare, "load_tokenizer", cache(load_tokenizer)),
    (loop, "gradients", _zero),
    (score, "score_sft", _one),
    (export, "verify", _right),
)


def _costing(world: World, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
    seconds = asdict(world.seconds)

    def paid(*args: Any, **kwargs: Any) -> Any:
        if kind == "row":
            world.spend("score", seconds["row"] * len(args[1]))
        elif kind == "verify":  # reloads, and scores for as long as it may, at most all rows one by one
            world.spend("verify", seconds["load"], rough=True)
            world.spend("verify", min(args[4], 3 * seconds["row"] * len(args[2])))
        else:  # a kill within leaves nothing: it is the rename at the end that counts
            world.spend(kind, seconds[kind], rough=kind != "ingest")
        return real(*args, **kwargs)

    return paid


def draw(random_: random.Random, budget_s: float, tokens: float) -> tuple[Seconds, Faults]:
    """A machine, a model and a run's bad luck. `tokens` is what an undisturbed run could train at most."""
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
    """What goes wrong in a run of so many seconds."""
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
    return Faults(slow=slow, stalls=sorted(stalls), restarts=sorted(restarts))


def _stall(random_: random.Random) -> float:
    return math.exp(random_.uniform(0.0, math.log(LONGEST_STALL_S)))


def _moments(random_: random.Random, mean: float, until: float) -> list[float]:
    moments, at = [], 0.0
    while (at := at + random_.expovariate(mean / until)) < until:
        moments.append(at)
    return moments
