"""After the last step: choose the best weights, to be exported and verified (submission.py)."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from shared.messages.runs import Outcome, Phase
from shared.planning.throughput import SAFETY, SLACK_S
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.sharding import as_held
from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress, loaded, loss_over_base, ranked
from trainer_node.engine.evaluate.metric import Evaluation, measure
from trainer_node.engine.submission import submit
from trainer_node.engine.time_budget import Part, affordable
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position
from trainer_node.engine.train.saved_state import is_finite
from trainer_node.engine.train.state import TrainState


def finish_run(run: RunContext, record: RunRecord, state: TrainState, dev: Examples) -> Outcome:
    """Return the outcome of a trained run; without time for a part, skip it (time_budget.affordable)."""
    free_optimizer(state)
    run.reporter.phase(Phase.CHOOSE)
    parts = affordable(run.left_s, state.schedule.costs)
    if skipped := [part.value for part in Part if part not in parts]:
        run.reporter.message(f"short of time, skipped: {', '.join(skipped)}")
    return submit(run, record, state, dev, choose(run, record, state, dev, parts), parts)


def free_optimizer(state: TrainState) -> None:
    """Free the memory that only training needs: scoring and the verified copy need it."""
    state.optimizer.state.clear()
    state.recorded = None
    gc.unfreeze()
    gc.collect()


def choose(
    run: RunContext, record: RunRecord, state: TrainState, dev: Examples, parts: frozenset[Part]
) -> list[Candidate]:
    """Return what could be submitted, best first. Leaves the last checkpoint on disk.

    Weights that are worse than the base model's, or not finite, are submitted only if nothing better exists:
    an earlier checkpoint, or finally the base model itself. Each candidate is scored on as many rows as there
    is time for, and on a few at least.
    """
    costs = state.schedule.costs
    until = run.job.ready_by - SAFETY * (costs.export_s + costs.load_s) - costs.verify_s - SLACK_S

    def score() -> Evaluation:
        model, alive = state.deltas.model, run.reporter.alive
        return measure(model, dev, run.clock, until, run.process_group, alive=alive)[0]

    last = Candidate("last", reached_by(state))
    candidates = [last.measured(score) if Part.SCORE in parts else last]
    with run.patience():
        state.saver.free()  # from here on the weights change
    average = state.average
    if Part.AVERAGE in parts and average and average.count > 1:
        candidates.append(replace(last, name="average", weights_applied=average.applied).measured(score))
    if Part.SCORE in parts and (lowest := lowest_point(state, candidates[0].score)):
        candidates.append(lowest.measured(score))
    base = record.base_losses
    candidates = ranked(candidates, base)
    finite = is_finite(state)
    if (loss_over_base(candidates[0], base) >= 0.0 and Part.SCORE in parts) or not finite:
        others = scored_earlier(run, state, score, until, at_least=0 if finite else 1)
        if Part.VERIFY in parts:  # there is time to load the base model once more
            others.append(untrained(run, record, state, score))
        candidates = ranked([*candidates, *others], base)
        candidates = [c for c in candidates if loss_over_base(c, base) < math.inf] or [last]
        what = "worse than the base model's" if finite else "not finite"
        run.reporter.message(f"the trained weights are {what}")
    run.reporter.message("; ".join(f"{c.name} weights: {_loss(c):.4f}" for c in candidates))
    return candidates


def scored_earlier(
    run: RunContext, state: TrainState, score: Callable[[], Evaluation], until: float, *, at_least: int
) -> list[Candidate]:
    """Score earlier checkpoints while there is time to load one before `until`, and `at_least` that many."""
    scored: list[Candidate] = []
    for other in earlier(run, state):
        late = run.clock.time() + SAFETY * state.schedule.costs.load_s > until
        if late and len(scored) >= at_least:
            break
        with run.patience():  # its weights are read first
            scored.append(other.measured(score))
    return scored


def lowest_point(state: TrainState, last: Evaluation | None) -> Candidate | None:
    """Return the weights at the development curve's minimum, if on its rows they beat the last weights."""
    best, rows = state.curve.best, len(state.curve.best_losses)
    if best is None or not state.best or best.step == state.step:
        return None
    if last and len(last.per_example) >= rows and last.per_example[:rows].mean() <= (best.loss or 0.0):
        return None
    train_s = state.train_s * best.tokens / state.tokens
    progress = TrainProgress(best.step, best.tokens, train_s, state.health.skipped)
    applied = partial(loaded, state.deltas, lambda: as_held(state.best, state.deltas.parameters))
    return Candidate(f"step {best.step}", progress, weights_applied=applied)


def earlier(run: RunContext, state: TrainState) -> Iterator[Candidate]:
    """Yield the checkpoints on disk from before the last step, newest first, read one at a time."""
    folder, process_group = run.folder / "checkpoints", run.process_group
    found = (
        checkpoint.whole(folder, run.reporter.message, only="weights") if process_group.is_main else iter(())
    )
    while True:
        with run.patience():
            one = process_group.broadcast_object(next(found, None))
        if one is None:
            return
        position = one.manifest.position
        if position.step < state.step:
            reached = reached_at(position)
            weights_applied = partial(loaded, state.deltas, partial(one.pieces, "weights"))
            yield Candidate(f"step {position.step}", reached, weights_applied=weights_applied)


def untrained(
    run: RunContext, record: RunRecord, state: TrainState, score: Callable[[], Evaluation]
) -> Candidate:
    """Return the base model as a candidate: the plan's weights as they were before the first step.

    Its losses are known, unless it was repaired.
    """
    losses = np.array(record.base_losses)

    def weights() -> dict[str, torch.Tensor]:
        with run.patience():
            return state.untrained()

    weights_applied = partial(loaded, state.deltas, weights)
    base = Candidate("base", TrainProgress(0, 0, 0.0), weights_applied=weights_applied)
    if state.plan.repair:
        return base.measured(score)
    return replace(base, score=Evaluation(record.base_loss, losses))


def reached_by(state: TrainState) -> TrainProgress:
    """Return how far training has come."""
    skipped = state.health.skipped
    return TrainProgress(state.step, state.tokens, state.train_s, skipped)


def reached_at(position: Position) -> TrainProgress:
    """Return how far training had come at a checkpoint."""
    return TrainProgress(position.step, position.tokens, position.train_s, position.health.skipped)


def _loss(candidate: Candidate) -> float:
    return candidate.score.loss if candidate.score else math.inf
