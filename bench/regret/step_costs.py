"""Measure what SmolLM2-135M's steps and scores cost on this machine, in the units of the arena's prices.

    python -m bench step_costs

The engine's own steps on German-English rows, in batches of 2 to 32, by CPU seconds of one thread: they
hardly depend on what else the machine does. A line through them says what a step costs besides its tokens.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import Struct

from bench.arena.arena import write_job
from bench.arena.packages import cache_folder
from bench.arena.prices.prices import Method, Prices, StepPrice
from bench.arena.task import Task
from bench.regret.grid import RECIPE, RECIPES, begin
from shared.messages.runs import decode_worker_job
from shared.planning.profiles import PROFILES
from trainer_node.engine.evaluate import metric
from trainer_node.engine.finish import free_optimizer
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.trial import Trial
from trainer_node.engine.train import loop

TASK = Task("german_english", "smollm2", 300, 50.0, 1)
ARMS: dict[Method, str] = {"everything": "everything", "dense": "dense", "lora": "LoRA r32"}
BATCHES = (2, 4, 8, 16, 32)
WARM, STEPS = 2, 5


class Line(Struct, frozen=True):
    """Seconds of a step besides its tokens, and for each of them."""

    step_s: float
    token_s: float


def line_of(tokens: list[float], seconds: list[float]) -> Line:
    """Return the line through steps of different sizes; none of its two parts is below zero."""
    token_s, step_s = np.polyfit(tokens, seconds, 1)
    return Line(max(0.0, float(step_s)), max(0.0, float(token_s)))


def prices_of(lines: dict[Method, Line], scored_s: float) -> Prices:
    """Return measured seconds in units of one token of a dense step."""
    unit = lines["dense"].token_s
    steps = {
        name: StepPrice(round(one.step_s / unit, 1), round(one.token_s / unit, 3))
        for name, one in lines.items()
    }
    return Prices(**steps, scored=round(scored_s / unit, 3))


def steps_of(runner: TrialRunner, arm: str) -> Line:
    """Train steps of each size and return the line through their seconds."""
    tokens, seconds = list[float](), list[float]()
    for batch in BATCHES:
        state = runner.prepared(Trial(arm=arm, rate=1.0, epochs=8.0, batch=batch, refit=True), None)
        state.deltas.model.train()
        for number in range(WARM + STEPS):
            began = time.process_time()
            loop.one_step(state, 0.0, runner.run.stop)
            state.read_results()
            if number >= WARM:
                tokens.append(state.plan.packs_per_step * state.plan.capacity)  # padding, too
                seconds.append(time.process_time() - began)
        free_optimizer(state)
        print(
            f"{arm}, batch {batch}: {np.mean(tokens[-STEPS:]):.0f} tokens {np.mean(seconds[-STEPS:]):.3f} s",
            flush=True,
        )
    return line_of(tokens, seconds)


def scored_s(runner: TrialRunner) -> float:
    """Return the seconds to score one token of the development rows."""
    assert runner.adapted is not None
    metric.score(runner.adapted.deltas.model, runner.data.dev)  # the first time is the slowest
    began = time.process_time()
    metric.score(runner.adapted.deltas.model, runner.data.dev)
    return (time.process_time() - began) / int(runner.data.dev.lengths.sum())


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    PROFILES.update(RECIPES)
    with tempfile.TemporaryDirectory(prefix="step-costs-") as name:
        path = write_job(TASK, RECIPE.profile, cache_folder(), Path(name))
        runner = begin(decode_worker_job(path.read_bytes()), path.parent)
        lines = {method: steps_of(runner, arm) for method, arm in ARMS.items()}
        found = prices_of(lines, scored_s(runner))
    seconds = {method: [round(one.step_s, 3), round(one.token_s, 5)] for method, one in lines.items()}
    print(json.dumps({"seconds": seconds, "prices": msgspec.to_builtins(found)}))


if __name__ == "__main__":
    main()
