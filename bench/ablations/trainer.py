"""Train variants on one task, in one process: the model is loaded once, and runs are shared.

python -m bench.ablations.trainer FOLDER/job.json

FOLDER has train.json and test.json of the arena, and variants.json: a list of variants. Each is printed on a
line as it is done. The engine's own trials train: the same steps, packs and schedule as in a job.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from msgspec.structs import replace

from bench.ablations.regularisers import pull_towards, with_dropout
from bench.ablations.variants import BASE, Training, Variant
from bench.arena.contestant import test_rows
from bench.gpu import older_torch
from bench.regret.grid import RECIPES, begin
from shared.clock import TokenClock
from shared.messages.runs import decode_worker_job
from shared.planning.profiles import PROFILES
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch
from trainer_node.engine.evaluate import metric
from trainer_node.engine.finish import free_optimizer
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import Loss
from trainer_node.engine.search.runner import TrialRunner
from trainer_node.engine.search.soup import mean_of
from trainer_node.engine.search.trial import Trial, TrialResult
from trainer_node.engine.train import loop, saved_state
from trainer_node.engine.train.schedule import Shape

LAST_NORM = "model.norm.weight"
STABLE_TAIL = 0.2  # of a run with a stable rate: it falls to zero in this last part

Weights = Mapping[str, torch.Tensor]


class VariantResult(Struct, frozen=True):
    """A variant's loss on every test row; none if its weights are no numbers."""

    variant: Variant
    losses: list[float]
    seconds: float


class StableShape(Shape, frozen=True):
    """Constant after the warm-up, and linear to zero in the last part."""

    def at(self, progress: float) -> float:
        """Return the rate at `progress`."""
        if progress < self.warmup:
            return progress / self.warmup
        return min(1.0, max(0.0, 1.0 - progress) / STABLE_TAIL)


class VariantRunner(TrialRunner):
    """A trial runner whose last pass goes on from weights in memory."""

    last: Weights = {}

    def weights_of(self, result: TrialResult) -> dict[str, torch.Tensor]:
        """Return the weights of the run before."""
        return dict(self.last)


def token_loss(mean_labels: float) -> Loss:
    """Return the loss that weighs every label token alike, in the units of the loss by examples."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logp_N: torch.Tensor = model(batch)
        return -logp_N.sum() / mean_labels

    return loss


def trained(runner: VariantRunner, training: Training, order: int) -> Weights | None:
    """Train one run from the base model's weights; None if it ends with weights that are no numbers."""
    plans, base = runner.known.plans, runner.known.plans[training.arm]
    arm, base = with_dropout(training, base)
    plan = replace(
        base,
        betas=training.betas,
        weight_decay=training.weight_decay,
        clip=training.clip,
        decay="linear" if training.decay == "stable" else training.decay,
        rate_floor=training.floor,
        curve=replace(base.curve, rows=0),
    )
    trial = Trial(
        arm=arm,
        rate=training.rate,
        epochs=training.epochs,
        batch=training.batch,
        seed=order,
        refit=not training.held_out,
        noise=training.noise,
    )
    runner.known = replace(runner.known, plans={**plans, arm: plan})
    try:
        weights = _run(runner, trial, training)
        if weights is not None and training.last_pass:
            runner.last = weights
            runner.known = replace(
                runner.known, done=[TrialResult(trial=trial, loss=None, tokens=0, train_s=0)]
            )
            final = replace(
                trial, rate=training.rate * training.last_pass, epochs=1.0, refit=True, last_pass=True
            )
            weights = _run(runner, final, training)
    finally:
        runner.known = replace(runner.known, plans=plans, done=[])
    return weights


def _run(runner: VariantRunner, trial: Trial, training: Training) -> Weights | None:
    run = runner.run
    assert isinstance(run.own_clock, TokenClock)
    run.own_clock.tokens = 0
    state = runner.prepared(trial, None)
    state.saves = False
    if training.per_token:
        rows = runner.data.train
        state.objective = token_loss(rows.label_tokens / len(rows))
        state.recorded = None  # on a GPU: the pass was recorded with the loss before
    if training.pull:
        assert runner.start is not None, "a small model's start is kept"
        pull_towards(runner.start, state, training.pull)
    if training.decay == "stable":
        state.schedule.shape = StableShape(state.schedule.shape.warmup)
    loop.train(state, run.reporter, run.stop)
    free_optimizer(state)
    if not saved_state.is_finite(state):
        return None
    return {name: value.detach().clone() for name, value in state.deltas.state().items()}


class Trainer:
    """The runs and scores of one task; a run that several variants share is trained once."""

    def __init__(self, job_path: Path) -> None:
        found = begin(decode_worker_job(job_path.read_bytes()), job_path.parent)
        self.runner = VariantRunner(
            found.run, found.record, found.data, found.dev, found.known, found.saver, found.models
        )
        self.test: Examples = test_rows(job_path)
        self._base: dict[int, Weights | None] = {}
        self._scored: dict[str, Deltas] = {}

    def losses_of(self, variant: Variant) -> list[float]:
        """Return the variant's loss on every test row, scored in fp32; empty if it diverged."""
        several = [self._weights(variant.training, order) for order in range(variant.runs)]
        known = [one for one in several if one is not None]
        if len(known) < len(several):
            return []
        weights = mean_of(known) if len(known) > 1 else known[0]
        if variant.scale != 1.0:
            self.runner.with_arm(variant.training.arm)
            start = self.runner.start
            assert start is not None, "a small model's start is kept"
            weights = {
                name: start[name] + variant.scale * (value - start[name]) for name, value in weights.items()
            }
        if variant.temperature != 1.0:  # logits are the head's products with what the last norm gives
            weights = {**weights, LAST_NORM: weights[LAST_NORM] / variant.temperature}
        return self._score(variant.training.arm, weights)

    def _weights(self, training: Training, order: int) -> Weights | None:
        if training != BASE.training:
            return trained(self.runner, training, order)
        if order not in self._base:  # several variants need these runs
            self._base[order] = trained(self.runner, training, order)
        return self._base[order]

    def _score(self, arm: str, weights: Weights) -> list[float]:
        job = self.runner.run.job
        if arm not in self._scored:
            plan = replace(self.runner.known.plans[arm], dtype="float32")
            model = load_model(job.model_path, torch.float32).to(self.runner.run.process_group.device)
            self._scored[arm] = add_deltas(model, plan, job.seed)
        whole = self._scored[arm]
        whole.load_state(dict(weights))
        losses: list[float] = metric.score(whole.model, self.test).per_example.tolist()
        return losses if all(map(math.isfinite, losses)) else []


def main() -> None:
    """Train the variants and print what they lose."""
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    older_torch.patch()
    PROFILES.update(RECIPES)
    wanted = msgspec.json.decode((path.parent / "variants.json").read_bytes(), type=list[Variant])
    trainer = Trainer(path)
    for variant in wanted:
        began = time.monotonic()
        losses = trainer.losses_of(variant)
        done = VariantResult(variant, losses, round(time.monotonic() - began, 2))
        print(msgspec.json.encode(done).decode(), flush=True)


if __name__ == "__main__":
    main()
