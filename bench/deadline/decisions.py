"""Searches on the token clock that are killed and resumed: each must decide as the undisturbed one did.

The real search and pipeline, in this process, with the losses of bench/deadline/landscape.py. A kill is an
exception that nothing catches, at a random one of the run's events: a step, a score, an export, a reload, a
record of the search. A checkpoint that is being written then is lost; when one is on disk is drawn.
"""

from __future__ import annotations

import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.deadline import simulated_pipeline
from bench.deadline.landscape import Landscape
from bench.deadline.simulated_machine import Faults, Killed, Seconds, World
from bench.deadline.simulated_pipeline import Ear
from bench.harness import tiny_jobs
from shared.clock import TokenClock
from shared.messages.runs import Outcome, OutcomeStatus, decode_worker_job
from trainer_node.engine.context import RunContext
from trainer_node.engine.evaluate import metric
from trainer_node.engine.export import writer
from trainer_node.engine.pipeline import pipeline
from trainer_node.engine.search import runner
from trainer_node.engine.search.trial import SearchRecord, TrialResult, read_search
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import async_saver, loop

PER_CALM = 10  # killed runs that are compared with one undisturbed run
MOST_KILLS = 3
LATE_SHARE = 0.3  # of the kills come at the last events: averages, export, reload
LATE_EVENTS = 12
NO_TIME = Seconds(start=0.0, load=0.0, ingest=0.0, row=0.0, save=0.0, export=0.0, tokens_per_s=math.inf)


class KilledAtEvent:
    """Counts the events of one start, and ends it at the `last` one."""

    def __init__(self, last: int | None) -> None:
        self.last, self.count = last, 0

    def __call__(self) -> None:
        """Count one event; Killed if it is the last one."""
        self.count += 1
        if self.count == self.last:
            raise Killed


class DrawnSaver:
    """Stands in for the thread that writes checkpoints: when one is on disk is drawn."""

    def __init__(self, luck: random.Random) -> None:
        self.luck = luck
        self.work: Callable[[], Any] | None = None
        self.outcome: Any = None

    def __call__(self, *_: object, **__: object) -> DrawnSaver:
        """Return itself: the pool of one thread."""
        return self

    def submit(self, work: Callable[[], Any]) -> DrawnSaver:
        """Keep the work for later."""
        job = DrawnSaver(self.luck)
        job.work = work
        return job

    def done(self) -> bool:
        """Return whether it is on disk by now."""
        if self.work and self.luck.random() < 0.3:
            self.result()
        return self.work is None

    def result(self) -> Any:
        """Do it now."""
        if self.work:
            work, self.work = self.work, None
            self.outcome = work()
        return self.outcome


def decided(folder: Path) -> tuple[list[TrialResult], SearchRecord]:
    """Return what a search tried and found, without the real seconds."""
    found = read_search(folder)
    assert found is not None, "a search was begun"
    return [replace(one, train_s=0.0, step_s=0.0, other_s=0.0) for one in found.done], found


def compare(runs: int, seed: int, folder: Path, data: Path) -> dict[str, Any]:
    """Kill and resume so many runs; how many decided otherwise than their undisturbed one, and where."""
    counts: Counter[str] = Counter(resumed=0, kills=0, differ=0)
    trials: list[int] = []
    wanted: Any = None
    events = 0
    for index in range(runs):
        shape = random.Random(f"{seed} {index // PER_CALM}")
        tokens = shape.uniform(3_000, 50_000)
        if index % PER_CALM == 0:
            events, wanted = _run(folder / "calm", data, tokens, shape, [])
            trials.append(len(wanted[0]))
            shutil.rmtree(folder / "calm")
        luck = random.Random(f"{seed} kills {index}")
        kills = [_moment(luck, events) for _ in range(luck.randint(1, MOST_KILLS))]
        shape = random.Random(f"{seed} {index // PER_CALM}")
        shape.uniform(3_000, 50_000)
        _, found = _run(folder / "rough", data, tokens, shape, kills)
        shutil.rmtree(folder / "rough")
        counts["resumed"] += 1
        counts["kills"] += len(kills)
        if found != wanted:
            counts["differ"] += 1
            print(f"token clock, run {index}: kills at {kills} of {events}: {_first_gap(wanted, found)}")
    return {**counts, "searches": len(trials), "trials": sum(trials)}


def _moment(luck: random.Random, events: int) -> int:
    if luck.random() < LATE_SHARE:
        return max(1, events - luck.randrange(min(LATE_EVENTS, events)))
    return luck.randint(1, events)


def _first_gap(wanted: Any, found: Any) -> str:
    for number, (one, other) in enumerate(zip(wanted[0], found[0], strict=False), 1):
        if one != other:
            return f"trial {number} is {other.trial} {other.loss}, not {one.trial} {one.loss}"
    return f"{len(found[0])} trials, not {len(wanted[0])}; {found[1]}, not {wanted[1]}"


def _run(
    folder: Path, data: Path, tokens: float, shape: random.Random, kills: list[int]
) -> tuple[int, tuple[list[TrialResult], tuple[Any, ...]]]:
    """Make one run to its end; the events of its last start, and what it decided and submitted."""
    path = tiny_jobs.write_job(
        folder, data, profile="auto", ready_by=tokens / 1000.0, checkpoint_interval_s=tokens / 30_000.0
    )
    job, landscape, luck = decode_worker_job(path.read_bytes()), Landscape(shape), random.Random(tokens)
    starts: list[int | None] = [*kills, None]
    for last in starts:
        world = World(NO_TIME, Faults(), random.Random(0), math.inf, math.inf)
        reporter = Ear.__new__(Ear)
        reporter.world = world
        reporter.__init__(folder / "progress.jsonl", job.task, job.slot)  # type: ignore[misc]
        at = KilledAtEvent(last)
        clock = TokenClock(job.start_at, job.token_clock_rate)
        try:
            with simulated_pipeline.costs(world, computes=False, answers=landscape), _events(at, luck):
                outcome = pipeline(RunContext(job, folder, clock, reporter, Stop()))
        except Killed:
            continue
        return at.count, (decided(folder)[0], _submitted(outcome))
    raise AssertionError("the last start is not killed")


def _submitted(outcome: Outcome) -> tuple[Any, ...]:
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    return outcome.step, outcome.metrics.final_loss, outcome.metrics.tokens


@contextmanager
def _events(at: KilledAtEvent, luck: random.Random) -> Iterator[None]:
    """Inside, every event is counted before it takes place, and a record of the search after it too."""
    parts: tuple[tuple[Any, str], ...] = (
        (loop, "gradients"),
        (metric, "score_sft"),
        (writer, "write"),
        (writer, "verify"),
        (runner, "write_search"),
        (loop, "save"),
    )
    pool = "ThreadPoolExecutor"
    before = [(module, name, getattr(module, name)) for module, name in (*parts, (async_saver, pool))]
    for module, name in parts:
        event = _counted(at, getattr(module, name), after=name in ("write_search", "write"))
        setattr(module, name, event)
    setattr(async_saver, pool, DrawnSaver(luck))
    try:
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)


def _counted(at: KilledAtEvent, real: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    def event(*args: Any, **kwargs: Any) -> Any:
        at()
        result = real(*args, **kwargs)
        if after:
            at()
        return result

    return event
