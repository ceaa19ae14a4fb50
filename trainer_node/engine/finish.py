"""After the last step: choose the best weights, export them, verify that the files are what was trained."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from shared.errors import EngineError
from shared.files import folder_digest, is_disk_full
from shared.messages import ErrorCode, Metrics, Outcome, OutcomeStatus, Phase
from shared.planning.throughput import verify_limit_s
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.damage.repair import undo_scaling
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.distributed.sharding import gathered
from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress, loaded, loss_over_base, ranked
from trainer_node.engine.evaluate.metric import Evaluation, measure
from trainer_node.engine.export import sharded_writer, unverified, writer
from trainer_node.engine.export.verify import ExportProblem
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.time_budget import SAFETY, SLACK_S, Part, affordable
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position
from trainer_node.engine.train.saved_state import is_finite
from trainer_node.engine.train.state import TrainState


def close(run: RunContext, record: RunRecord, state: TrainState, dev: Examples) -> Outcome:
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


def submit(
    run: RunContext,
    record: RunRecord,
    state: TrainState,
    dev: Examples,
    candidates: Sequence[Candidate],
    parts: frozenset[Part],
) -> Outcome:
    """Export the first candidate whose files verify as what was trained.

    If none does, that one whose files are the best, and better than the base model: a bf16 error that is
    larger than expected costs less than the job.
    """
    refused: list[tuple[Candidate, ExportProblem]] = []
    for candidate in candidates:
        metrics, outcome, problem = _export(run, record, state, candidate), None, None
        if metrics:  # until rank 0 broadcasts the outcome, the other ranks wait
            outcome = ready(run, metrics)
            unverified.note(run.folder, outcome)
            problem = _verify(run, state, dev, candidate) if Part.VERIFY in parts else None
        outcome, problem = run.process_group.broadcast_object((outcome, problem))
        if outcome and problem is None:
            run.reporter.phase(Phase.DONE)
            return outcome
        problem = problem or ExportProblem("it could not be written")
        unverified.drop(run.folder)
        refused.append((candidate, problem))
        run.reporter.message(f"the export of the {candidate.name} weights is refused: {problem.text}")
    if best := least_wrong(refused, record.base_losses):
        run.reporter.message(
            f"the {best.name} weights are submitted: their files are better than the base model"
        )
        return submit(run, record, state, dev, [best], parts - {Part.VERIFY})
    texts = "; ".join(f"{candidate.name}: {problem.text}" for candidate, problem in refused)
    raise EngineError(ErrorCode.INTERNAL, f"no export is what was trained: {texts}")


def least_wrong(
    refused: Sequence[tuple[Candidate, ExportProblem]], base_losses: Sequence[float]
) -> Candidate | None:
    """Return the candidate whose files gained the most over the base model on the rows that they scored."""
    gains = [
        (float(np.mean(base_losses[: len(problem.losses)]) - np.mean(problem.losses)), candidate)
        for candidate, problem in refused
        if problem.losses
    ]
    gain, best = max(gains, key=lambda pair: pair[0], default=(0.0, None))
    return best if gain > 0.0 else None


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
        state.saver.wait()  # from here on the weights change
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
        run.reporter.message("the trained weights are worse than the base model's")
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
    progress = TrainProgress(best.step, best.tokens, train_s)
    applied = partial(loaded, state.deltas, lambda: state.best)
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


def _export(run: RunContext, record: RunRecord, state: TrainState, candidate: Candidate) -> Metrics | None:
    """Write the export; rank 0's metrics, None for the other ranks. Each writes the rows that it holds."""
    metrics = metrics_of(record, candidate.held_out or candidate.score, candidate.reached)
    run.reporter.losses(base=metrics.base_loss, dev=metrics.final_loss)
    run.reporter.phase(Phase.EXPORT)
    with candidate.weights_applied(), run.patience():
        target, plan, group = run.folder / "export", state.plan, run.process_group
        if plan.parallel == "fsdp2" and sharded_writer.keeps_names(writer.base_of(state.deltas)):
            write = partial(sharded_writer.write, state.deltas, plan, run.job, metrics, target, group)
            written = _write(run, write, group)
            return written if group.is_main else None
        if (deltas := _whole(run, state)) is None:
            return None
        write = partial(writer.write, deltas, plan, run.job, metrics, target)
        return _write(run, write, SINGLE_PROCESS)


def _write(run: RunContext, write: Callable[[], Metrics], group: ProcessGroup) -> Metrics:
    """All: write the export; on a full disk checkpoints make room, the least valuable first, then trials.

    The weights to export are in the model. Files that a trial keeps are not freed by their checkpoint alone.
    """
    while True:
        try:
            return write()
        except OSError as error:  # in every process of the group
            freed = group.is_main and is_disk_full(error) and _free_disk(run)
            if not group.broadcast_object(freed):
                raise


def _free_disk(run: RunContext) -> bool:
    """Delete the least valuable of what training left on disk; return False if there is nothing."""
    trials = sorted((run.folder / "trials").glob("[0-9]*"))
    last = next(iter([*checkpoint.by_value(run.folder / "checkpoints"), *trials]), None)
    if last is None:
        return False
    run.reporter.message(f"no room for the export: {last.relative_to(run.folder)} is deleted")
    shutil.rmtree(last)
    return True


def _whole(run: RunContext, state: TrainState) -> Deltas | None:
    """Return what rank 0 exports. Sharded weights of a model that is published otherwise are gathered in
    main memory, in a new copy of the base.
    """
    weights = gathered(state.deltas.state(), run.process_group)
    if not run.process_group.is_main:
        return None
    if state.plan.parallel != "fsdp2":
        return state.deltas
    model = load_model(run.job.model_path, getattr(torch, state.plan.dtype))
    undo_scaling(model, state.plan.repair)
    whole = add_deltas(model, state.plan, run.job.seed)
    whole.load_state(weights)
    return whole


def _verify(run: RunContext, state: TrainState, dev: Examples, candidate: Candidate) -> ExportProblem | None:
    """Return what is wrong with the exported files, or None; also None without time to load them."""
    run.reporter.phase(Phase.VERIFY)
    left_s = run.job.ready_by - run.own_clock.time()  # not the group's clock: the other ranks don't ask
    if left_s < state.schedule.costs.load_s + SLACK_S:
        run.reporter.message("short of time, skipped: verify")
        return None
    limit_s = min(verify_limit_s(run.job.ready_by - run.job.start_at), left_s / 4)
    folder, dtype = run.folder / "export", getattr(torch, state.plan.dtype)
    try:
        with run.patience():
            return writer.verify(folder, run.job, dev, candidate.score, limit_s, state.device, dtype)
    except writer.UnverifiedError as why:
        run.reporter.message(f"the export is submitted without being loaded again: {why}")
        return None


def reached_by(state: TrainState) -> TrainProgress:
    """Return how far training has come."""
    skipped = state.health.skipped
    return TrainProgress(state.step, state.tokens, state.train_s, skipped)


def reached_at(position: Position) -> TrainProgress:
    """Return how far training had come at a checkpoint."""
    return TrainProgress(position.step, position.tokens, position.train_s, position.health.skipped)


def _loss(candidate: Candidate) -> float:
    return candidate.score.loss if candidate.score else math.inf


def metrics_of(record: RunRecord, score: Evaluation | None, reached: TrainProgress) -> Metrics:
    """Return what a finished run measured; both losses are over the same rows."""
    rows = len(score.per_example) if score else len(record.base_losses)
    base_loss = float(np.mean(record.base_losses[:rows]))
    return Metrics(
        base_loss=base_loss,
        final_loss=score.loss if score else None,
        dev_examples=rows if score else 0,
        train_examples=record.train_examples,
        dropped_rows=record.dropped,
        steps=reached.step,
        tokens=reached.tokens,
        tokens_per_s=reached.tokens / reached.train_s if reached.train_s > 0 else 0.0,
        train_s=reached.train_s,
        epochs=reached.tokens / record.train_tokens,
        resumes=record.resumes,
        skipped_steps=reached.skipped,
    )


def ready(run: RunContext, metrics: Metrics) -> Outcome:
    """Return the outcome of a run whose export is on disk."""
    return Outcome(
        status=OutcomeStatus.READY,
        digest=folder_digest(run.folder / "export"),
        export="export",
        metrics=metrics,
        step=metrics.steps,
    )
