"""Train every point of a grid of hyper-parameters to its end and score it on the test rows.

python -m bench.regret.grid FOLDER/job.json

FOLDER has train.json, test.json and points.json. One line of JSON is printed for each point as it is done. A
point is a trial of the engine's search: the same steps, packs and decay. It trains on all rows, also those
that a job holds out, since nothing is chosen by them.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from bench.arena.contestant import test_rows
from shared.clock import TokenClock
from shared.messages.runs import WorkerJob, decode_worker_job
from shared.planning.profiles import PROFILES
from shared.planning.throughput import Costs
from trainer_node.engine import prepare
from trainer_node.engine.assemble import load_base, make_saver
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import join
from trainer_node.engine.evaluate import metric
from trainer_node.engine.finish import free_optimizer
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.loading import load_config, load_model
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.search import begin_search
from trainer_node.engine.search.trial import Trial
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop, saved_state

# Ranks that the arena's models have room for: the planner trains a matrix whole that is hardly larger.
RANKS = (32, 8)
LORA = [
    msgspec.structs.replace(PROFILES["lora_r16"], profile=f"grid_r{rank}", rank=rank, max_length=4096)
    for rank in RANKS
]
MORE = [
    msgspec.structs.replace(PROFILES["auto"], profile="grid_everything", embedding_epochs=0.0),
    msgspec.structs.replace(PROFILES["auto"], profile="grid_norms", embedding_rate=0.0),
    *LORA,
]
RECIPE = msgspec.structs.replace(
    PROFILES["auto"],
    profile="grid",
    arms=tuple(recipe.profile for recipe in MORE),
    norm_rate=0.0,
    embedding_rate=0.0,
)
RECIPES = {recipe.profile: recipe for recipe in (RECIPE, *MORE)}
ARMS = ("dense", "everything", *(f"LoRA r{rank}" for rank in RANKS))
RATES = (1 / 3, 1.0, 3.0, 9.0, 27.0)
BATCHES = (4, 16)
EPOCHS = (1.0, 2.0, 4.0, 8.0)


class Point(Struct, frozen=True, order=True):
    """One training run: what is trained, the factor on the planner's rate, examples of a step, epochs."""

    arm: str
    rate: float
    batch: int
    epochs: float

    def __str__(self) -> str:
        return f"{self.arm}, rate x {self.rate:.3g}, batch {self.batch}, {self.epochs:g} epochs"


class PointResult(Struct, frozen=True):
    """A point's loss on every test row; none if its weights are no numbers."""

    point: Point
    losses: list[float]
    seconds: float


def points(epochs: tuple[float, ...] = EPOCHS) -> list[Point]:
    """Return every point of the grid, short runs first."""
    found = itertools.product(epochs, ARMS, RATES, BATCHES)
    return [Point(arm, rate, batch, length) for length, arm, rate, batch in found]


def begin(job: WorkerJob, folder: Path) -> TrialRunner:
    """Load the model and the rows of a job, before its first trial."""
    run = RunContext(
        job,
        folder,
        TokenClock(job.start_at, job.token_clock_rate),
        Reporter(folder / "progress.jsonl", job.task, job.slot),
        Stop(),
        join(job.hardware, job.ready_by - job.start_at),
    )
    prepare.set_threads(job, run.process_group)
    config = load_config(job.model_path)
    data = prepare.load_data(run, config)
    plan = prepare.draw_plan(run, config, data, run.left_s, job.token_clock_rate)
    models = [load_base(run, plan)]
    data, base, _ = prepare.baseline(run, models[0], data, plan)
    record = RunRecord(
        fingerprint=data.train.fingerprint(),
        base_losses=base.per_example.tolist(),
        train_examples=len(data.train),
        train_tokens=int(data.train.lengths.sum()),
        dropped=data.dropped,
        costs=Costs(),
    )
    known = begin_search(run, record, plan, data, models)
    assert known is not None, "a profile with arms is a search"
    return TrialRunner(run, record, data, data.dev, known, make_saver(run, record), models)


def losses_of(runner: TrialRunner, point: Point, test: Examples) -> list[float]:
    """Train one point from the base model's weights; its losses on the test rows, scored in fp32."""
    run = runner.run
    assert isinstance(run.own_clock, TokenClock)
    run.own_clock.tokens = 0
    trial = Trial(arm=point.arm, rate=point.rate, epochs=point.epochs, batch=point.batch, refit=True)
    state = runner.prepared(trial, None)
    state.saves = False
    loop.train(state, run.reporter, run.stop)
    free_optimizer(state)
    if not saved_state.is_finite(state):
        return []
    plan = msgspec.structs.replace(state.plan, dtype="float32")
    model = load_model(run.job.model_path, torch.float32).to(run.process_group.device)
    whole = add_deltas(model, plan, run.job.seed)
    whole.load_state(state.deltas.state())
    losses: list[float] = metric.score(whole.model, test).per_example.tolist()
    return losses if all(map(math.isfinite, losses)) else []


def main() -> None:
    """Train the points and print what they lose."""
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    PROFILES.update(RECIPES)
    wanted = msgspec.json.decode((path.parent / "points.json").read_bytes(), type=list[Point])
    runner, test = begin(decode_worker_job(path.read_bytes()), path.parent), test_rows(path)
    for point in sorted(wanted, key=lambda one: (one.arm, one)):  # another arm loads the model again
        began = time.monotonic()
        losses = losses_of(runner, point, test)
        done = PointResult(point, losses, round(time.monotonic() - began, 2))
        print(msgspec.json.encode(done).decode(), flush=True)


if __name__ == "__main__":
    main()
