"""Losses of simulated trials: a valley in rate, length and batch, so that a search has something to find.

A trial's loss is a function of its rate, its batch, its order and how far it has come, so a resumed trial has
the same losses. Its lowest point lies at a number of epochs after which it rises again: the development curve
turns. Rates far above the best one diverge. The shape is drawn for every run.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from bench.deadline.simulated_machine import World
from bench.deadline.simulated_pipeline import Answers
from shared.messages.runs import Phase
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate import metric
from trainer_node.engine.train.state import TrainState

BASE_LOSS, LOWEST_LOSS = 1.0, 0.5
PER_RATE, PER_LENGTH, PER_BATCH = 0.02, 0.03, 0.005  # nat, for each factor of e, 2 and 2 away from the best
SEEN_GAIN = 0.03  # on rows that were trained on
AVERAGE_LOSS = 0.46
SPOILT_LOSS = 1.5
ORDER_NOISE = 0.004
DIVERGES = 60.0  # times the best rate


class Landscape(Answers):
    """Where the losses of one run's trials are low."""

    def __init__(self, luck: random.Random) -> None:
        self.seed = luck.randrange(2**31)
        self.best_rate = math.exp(luck.uniform(math.log(0.3), math.log(10.0)))  # times the first trial's
        self.best_epochs = math.exp(luck.uniform(math.log(0.7), math.log(8.0)))
        self.best_batch = 2 ** luck.uniform(2.0, 6.0)
        self.first_rate: float | None = None
        self.rows: int | None = None  # of a trial that leaves the development rows out
        self.state: TrainState | None = None  # of the trial under way

    def begins(self, state: TrainState) -> None:
        """Know whose weights are scored from now on."""
        self.state = state
        self.first_rate = self.first_rate or state.plan.lr_dense
        self.rows = self.rows or len(state.examples)

    def loss_of(self, state: TrainState) -> float:
        """Return the loss of a trial's weights as they are now."""
        assert self.first_rate, "a trial has begun"
        assert self.rows, "a trial has begun"
        all_tokens = int(state.examples.lengths.sum())
        away = math.log(state.plan.lr_dense / self.first_rate / self.best_rate)
        if away > math.log(DIVERGES):
            return math.nan
        batch = state.plan.packs_per_step * state.plan.capacity * len(state.examples) / all_tokens
        length = math.log2(max(1, state.tokens) / all_tokens / self.best_epochs)
        loss = LOWEST_LOSS + PER_RATE * away**2 + PER_LENGTH * length**2
        loss += PER_BATCH * math.log2(batch / self.best_batch) ** 2
        loss += random.Random(f"{self.seed} {state.seed}").gauss(0.0, ORDER_NOISE)
        return loss - (SEEN_GAIN if len(state.examples) > self.rows else 0.0)

    def scores(
        self, world: World, model: torch.nn.Module, examples: Examples, **_: object
    ) -> metric.Evaluation:
        """Return the loss of what was trained last on rows that differ in difficulty."""
        if world.phase is Phase.BASELINE or self.state is None:
            loss = BASE_LOSS
        elif world.faults.spoilt:
            loss = SPOILT_LOSS
        elif world.phase is Phase.CHOOSE:
            loss = AVERAGE_LOSS
        else:
            loss = self.loss_of(self.state)
        rows = loss + np.cos(examples.lengths.astype(float)) / 50
        return metric.Evaluation(float(rows.mean()), rows)
