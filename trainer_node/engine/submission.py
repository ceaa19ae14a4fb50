"""Export the chosen weights, verify that the files are what was trained, and describe the outcome."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import torch

from shared.errors import EngineError
from shared.files import folder_digest, is_disk_full
from shared.messages.runs import ErrorCode, Metrics, Outcome, OutcomeStatus, Phase
from shared.planning.throughput import SLACK_S, verify_limit_s
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.damage.repair import undo_scaling
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.distributed.sharding import gathered
from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.export import sharded_writer, unverified, writer
from trainer_node.engine.export.verify import ExportProblem
from trainer_node.engine.memory.oom import release
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.time_budget import Part
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.state import TrainState

FEW_ROWS = 8  # of refused files, or all rows: fewer don't show that they beat the base model


@dataclass(frozen=True)
class Refused:
    """An export that is not what was trained; None: it was not written, as the weights are gone."""

    candidate: Candidate
    problem: ExportProblem
    outcome: Outcome | None


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
    refused: list[Refused] = []
    for candidate in candidates:
        outcome, problem = export(run, record, state, dev, candidate, parts)
        if outcome and problem is None:
            run.reporter.phase(Phase.DONE)
            return outcome
        unverified.drop(run.folder)
        assert problem is not None
        refused.append(Refused(candidate, problem, outcome))
        run.reporter.message(f"the export of the {candidate.name} weights is refused: {problem.text}")
    if outcome := submit_refused(run, record, state, dev, refused, parts):
        run.reporter.phase(Phase.DONE)
        return outcome
    texts = "; ".join(f"{one.candidate.name}: {one.problem.text}" for one in refused)
    raise EngineError(ErrorCode.INTERNAL, f"no export matches the trained weights: {texts}")


def export(
    run: RunContext,
    record: RunRecord,
    state: TrainState,
    dev: Examples,
    candidate: Candidate,
    parts: frozenset[Part],
) -> tuple[Outcome | None, ExportProblem | None]:
    """Collective: write a candidate's files and verify them; no outcome if its weights are gone."""
    metrics, outcome, problem = None, None, None
    try:
        metrics = _export(run, record, state, candidate)
    except FileNotFoundError as error:  # of a checkpoint or a trial, in every process
        problem = ExportProblem(f"they are gone from the disk: {error}")
    if Part.VERIFY in parts:  # rank 0 may need room on all GPUs, where the others keep what training needed
        release()
        run.process_group.gather_objects(None)
    if metrics:  # meanwhile the other ranks wait
        outcome = ready(run, metrics)
        unverified.note(run.folder, outcome)
        problem = _verify(run, state, dev, candidate) if Part.VERIFY in parts else None
    return run.process_group.broadcast_object((outcome, problem))


def submit_refused(
    run: RunContext,
    record: RunRecord,
    state: TrainState,
    dev: Examples,
    refused: Sequence[Refused],
    parts: frozenset[Part],
) -> Outcome | None:
    """Collective: submit the best refused files that beat the base model; write them again if gone."""
    on_disk = next((one for one in reversed(refused) if one.outcome), None)
    for one in better_than_base(refused, record.base_losses):
        losses = np.array(one.problem.losses)
        candidate = replace(one.candidate, score=Evaluation(float(losses.mean()), losses))
        run.reporter.message(
            f"the {candidate.name} weights are submitted: their files are better than the base model"
        )
        if one is on_disk:
            outcome = _noted(run, record, state, candidate, one.outcome)
            return run.process_group.broadcast_object(outcome)
        outcome, problem = export(run, record, state, dev, candidate, parts - {Part.VERIFY})
        if outcome:
            return outcome
        assert problem is not None
        run.reporter.message(f"the {candidate.name} weights are not submitted: {problem.text}")
    return None


def better_than_base(refused: Sequence[Refused], base_losses: Sequence[float]) -> list[Refused]:
    """Return the files that gained over the base model, the most first, if they scored a few rows."""
    least = min(FEW_ROWS, len(base_losses))
    gains = [
        (float(np.mean(base_losses[: len(one.problem.losses)]) - np.mean(one.problem.losses)), one)
        for one in refused
        if len(one.problem.losses) >= least
    ]
    return [one for gain, one in sorted(gains, key=lambda pair: -pair[0]) if gain > 0.0]


def _noted(
    run: RunContext, record: RunRecord, state: TrainState, candidate: Candidate, known: Outcome | None
) -> Outcome | None:
    """Rank 0: say in the files on disk what they scored, and note them as the outcome."""
    if not run.process_group.is_main or known is None or known.metrics is None:
        return None
    metrics = metrics_of(record, candidate.held_out or candidate.score, candidate.reached)
    metrics = msgspec.structs.replace(metrics, kind=known.metrics.kind, bytes=known.metrics.bytes)
    run.reporter.losses(base=metrics.base_loss, dev=metrics.final_loss)
    writer.describe(run.folder / "export", state.plan, run.job, metrics)
    outcome = ready(run, metrics)
    unverified.note(run.folder, outcome)
    return outcome


def _export(run: RunContext, record: RunRecord, state: TrainState, candidate: Candidate) -> Metrics | None:
    """Write the export; rank 0's metrics, None for the other ranks. Each writes the rows that it holds."""
    metrics = metrics_of(record, candidate.held_out or candidate.score, candidate.reached)
    run.reporter.losses(base=metrics.base_loss, dev=metrics.final_loss)
    run.reporter.phase(Phase.EXPORT)
    with run.patience(), candidate.weights_applied():
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
    """Collective: write the export; on a full disk delete checkpoints, the least valuable first, then trials.

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
        copied_rows=record.copies,
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
