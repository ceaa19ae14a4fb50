"""The real training pipeline on a simulated machine: the costs of its parts, and the replaced functions.

Schedule, loop, checkpoints, selection, export and all decisions, counts and writes are the real ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from msgspec.structs import asdict

from bench.deadline.simulated_machine import World
from shared.messages.runs import Phase, Progress
from trainer_node.engine import assemble, finish, prepare, submission
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.evaluate import metric
from trainer_node.engine.export import writer
from trainer_node.engine.model.loading import load_model, load_tokenizer
from trainer_node.engine.reporter import PERIOD_S, Reporter
from trainer_node.engine.search import runner
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import async_saver, loop
from trainer_node.engine.train.state import TrainState

COSTS = (
    (assemble, "load_model", "load"),
    (submission, "load_model", "load"),
    (prepare, "ingest", "ingest"),
    (metric, "score_sft", "row"),
    (writer, "write", "export"),
    (writer, "verify", "verify"),
)
COPY_SHARE = 0.025  # of a save: the copy that training waits for
BESIDE_SHARE = 0.4  # of a save: what its hashing and writing take from training on two cores


class Ear(Reporter):
    """Tells the world what the node would read, and when."""

    world: World

    def due(self) -> bool:
        """By the world's clock."""
        return self.world.now - self.world.heard_at >= PERIOD_S

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """In the world's time, without a thread."""
        self.world.patient_until = self.world.now + seconds
        try:
            yield
        finally:
            self.world.heard_at = max(self.world.heard_at, min(self.world.now, self.world.patient_until))
            self.world.patient_until = -math.inf

    def _emit(self, progress: Progress) -> None:
        super()._emit(progress)
        self.world.reached(progress.phase)
        self.world.finished = progress.progress >= 1.0


class Answers:
    """What stands in for computing: zero gradients, and losses that say whether a run is spoilt."""

    def begins(self, state: TrainState) -> None:
        """Know that a training run begins, or goes on."""

    def gradients(
        self, world: World, state: TrainState, packs: list[list[int]], stop: Stop
    ) -> tuple[torch.Tensor, int]:
        """Leave gradients out; the packs take their time."""
        tokens = [int(state.examples.lengths[pack].sum()) for pack in packs]
        for count in tokens:
            state.alive()
            world.trained(count)
        return torch.zeros(()), sum(tokens)

    def scores(
        self, world: World, model: torch.nn.Module, examples: Examples, **_: object
    ) -> metric.Evaluation:
        """Return 1 for the base model, and less for trained weights unless the run is spoilt."""
        loss = 1.0 if world.phase is Phase.BASELINE else 1.5 if world.faults.spoilt else 0.5
        return metric.Evaluation(loss, np.full(len(examples), loss))


class BackgroundSave:
    """Stands in for the thread that writes checkpoints, and for what that takes from training."""

    def __init__(self, world: World, *_: object, **__: object) -> None:
        self.world = world
        self.done_at = math.inf
        self.work: Callable[[], Any] = lambda: None
        self.outcome: Any = None

    def submit(self, work: Callable[[], Any]) -> BackgroundSave:
        """Copy now and write later, while other things happen. A kill before the end leaves nothing."""
        world = self.world
        seconds = world.seconds.save / (2.0 if world.finished else 1.0)  # no optimiser any more
        world.spend("save", COPY_SHARE * seconds)
        job = BackgroundSave(world)
        job.work, job.done_at = work, world.end_of(world.rough(seconds))
        world.background = job
        world.spend("save", BESIDE_SHARE * seconds)
        return job

    def carry_out(self) -> None:
        """Put it on disk now."""
        self.world.background, self.outcome = None, self.work()

    def done(self) -> bool:
        """Return whether it is on disk."""
        return self.world.background is not self

    def result(self) -> Any:
        """Wait for that."""
        while not self.done():
            self.world.wait("save", self.done_at)
        return self.outcome


@contextmanager
def costs(world: World, *, computes: bool, answers: Answers | None = None) -> Iterator[None]:
    """Inside, the pipeline's expensive parts take their time in the world.

    Unless it `computes`, gradients and losses are the `answers`, and no export is reloaded; all that decides,
    counts and writes stays what it is.
    """
    answers = answers or Answers()
    idle = (
        *IDLE,
        (metric, "score_sft", partial(answers.scores, world)),
        (loop, "gradients", partial(answers.gradients, world)),
        (runner, "make_state", _beginning(answers, assemble.make_state)),
    )
    always = (
        (async_saver, "ThreadPoolExecutor", partial(BackgroundSave, world)),
        (loop, "gc", LAZY),
        (loop, "time", SimpleNamespace(monotonic=world.time)),  # a search plans by how long steps took
        (finish, "gc", LAZY),
        (loop, "collate", partial(_collate, world, collate)),
    )
    stand_ins = (*always, *(() if computes else idle))
    before = [(module, name, getattr(module, name)) for module, name, _ in (*COSTS, *always, *idle)]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
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


def _collate(
    world: World, real: Callable[..., Batch], examples: Examples, indices: list[int], *rest: Any
) -> Batch:
    world.trained(int(examples.lengths[indices].sum()))
    return real(examples, indices, *rest)


def _beginning(answers: Answers, real: Callable[..., TrainState]) -> Callable[..., TrainState]:
    def make_state(*args: Any, **kwargs: Any) -> TrainState:
        state = real(*args, **kwargs)
        answers.begins(state)
        return state

    return make_state


def _right(*_: object) -> None:
    return None


IDLE: tuple[tuple[Any, str, Any], ...] = (
    (assemble, "load_model", _copied),
    (submission, "load_model", _copied),
    (prepare, "load_tokenizer", cache(load_tokenizer)),
    (writer, "verify", _right),
)
# Collecting garbage at every start would take a third of the bench's time.
LAZY = SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None)


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
