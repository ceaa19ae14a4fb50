"""After the last step: choose the best weights, export them, prove that the files are what was trained."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import numpy as np
import torch

from shared.digest import folder_digest
from shared.errors import EngineError
from shared.files import write_atomically
from shared.messages import ErrorCode, Metrics, Outcome, OutcomeStatus, Phase, decode_outcome, encode
from shared.plan import Plan
from trainer_node.engine import export
from trainer_node.engine.candidates import Candidate, rank
from trainer_node.engine.checkpoint import Checkpoint
from trainer_node.engine.data import Examples
from trainer_node.engine.loop import Training
from trainer_node.engine.model import Deltas, add_deltas, load_model
from trainer_node.engine.parallel import gathered
from trainer_node.engine.prepare import VERIFY_SHARE, Record, Run, measure
from trainer_node.engine.schedule import SAFETY, SLACK_S, Part, affordable
from trainer_node.engine.score import Score

STANDBY = "standby.json"  # the outcome of an export that is on disk and not yet verified


def close(run: Run, record: Record, training: Training, dev: Examples) -> Outcome:
    """The outcome of a run that has trained; parts are skipped if time is short (schedule.affordable)."""
    training.optimizer.state.clear()  # the verified copy needs the memory
    gc.unfreeze()
    gc.collect()
    run.reporter.phase(Phase.CHOOSE)
    costs = training.schedule.costs
    parts = affordable(run.left_s, costs)
    if skipped := [part.value for part in Part if part not in parts]:
        run.reporter.message(f"short of time, skipped: {', '.join(skipped)}")
    until = run.job.ready_by - SAFETY * (costs.export_s + costs.load_s) - costs.verify_s - SLACK_S

    def score() -> Score:
        model, alive = training.deltas.model, run.reporter.alive
        return measure(model, dev, run.clock, until, run.team, alive=alive)[0]

    average = training.average if Part.AVERAGE in parts else None
    candidates = rank(average, score if Part.SCORE in parts else None)
    run.reporter.message("; ".join(f"{c.name} weights: {c.loss:.4f}" for c in candidates))
    wrong: list[str] = []
    for candidate in candidates:
        metrics, outcome, error = _export(run, record, training, candidate), None, None
        if metrics:  # from here on the others wait for rank 0's word
            outcome = _ready(run, metrics)
            write_atomically(run.folder / STANDBY, encode(outcome))
            error = _verify(run, training, dev, candidate) if Part.VERIFY in parts else None
        outcome, error = run.team.tell((outcome, error))
        if outcome and error is None:
            run.reporter.phase(Phase.DONE)
            return outcome
        (run.folder / STANDBY).unlink(missing_ok=True)
        wrong.append(f"{candidate.name}: {error}")
        run.reporter.message(f"the export of the {candidate.name} weights is refused: {error}")
    raise EngineError(ErrorCode.INTERNAL, f"no export is what was trained: {'; '.join(wrong)}")


def submit_as_is(
    run: Run, record: Record, plan: Plan, model: torch.nn.Module, found: Checkpoint, why: str
) -> Outcome:
    """Export a checkpoint without data or scoring: its loss is not measured. Rank 0 needs no help with it."""
    if not run.team.leads:
        return Outcome(status=OutcomeStatus.READY)
    run.reporter.message(f"{why}: the newest checkpoint is submitted as it is")
    deltas = add_deltas(model, plan, run.job.seed)
    deltas.load_state(found.tensors("weights"))
    position = found.manifest.position
    run.reporter.phase(Phase.EXPORT)
    metrics = _metrics(record, None, position.step, position.tokens, position.train_s)
    outcome = _ready(run, export.write(deltas, plan, run.job, metrics, run.folder / "export"))
    run.reporter.phase(Phase.DONE)
    return outcome


def standby(run: Run) -> Outcome | None:
    """What an earlier start exported but had no time to verify, if its files are still as it wrote them."""
    try:
        outcome = decode_outcome((run.folder / STANDBY).read_bytes())
        if folder_digest(run.folder / "export") != outcome.digest:
            return None
    except FileNotFoundError:
        return None
    run.reporter.message("no time is left to verify: the finished export is submitted as it is")
    run.reporter.phase(Phase.DONE)
    return outcome


def _export(run: Run, record: Record, training: Training, candidate: Candidate) -> Metrics | None:
    """Rank 0 writes the export; the others, who may hold parts of the weights, hand them over: None."""
    metrics = _metrics(record, candidate.score, training.step, training.tokens, training.train_s)
    run.reporter.losses(dev=metrics.final_loss)
    run.reporter.phase(Phase.EXPORT)
    target = run.folder / "export"
    average = training.average if candidate.name == "average" else None
    with average.applied() if average else nullcontext():
        deltas = _whole(run, training)
        return export.write(deltas, training.plan, run.job, metrics, target) if deltas else None


def _whole(run: Run, training: Training) -> Deltas | None:
    """What rank 0 exports: sharded weights are put together in main memory, in a base model loaded anew."""
    state = gathered(training.deltas.state(), run.team)
    if not run.team.leads:
        return None
    if training.plan.parallel != "fsdp2":
        return training.deltas
    model = load_model(run.job.model_path, getattr(torch, training.plan.dtype))
    whole = add_deltas(model, training.plan, run.job.seed)
    whole.load_state(state)
    return whole


def _verify(run: Run, training: Training, dev: Examples, candidate: Candidate) -> str | None:
    """What is wrong with the exported files, or None; without time to load them, nothing is known."""
    run.reporter.phase(Phase.VERIFY)
    left_s = run.job.ready_by - run.own_clock.time()  # not the team's: the others don't look
    if left_s < training.schedule.costs.load_s + SLACK_S:
        run.reporter.message("short of time, skipped: verify")
        return None
    limit_s = min(VERIFY_SHARE * (run.job.ready_by - run.job.start_at), left_s / 4)
    folder, dtype = run.folder / "export", getattr(torch, training.plan.dtype)
    try:
        return export.verify(folder, run.job, dev, candidate.score, limit_s, training.device, dtype)
    except export.UnverifiedError as why:
        run.reporter.message(f"the export is submitted without being loaded again: {why}")
        return None


def _metrics(record: Record, score: Score | None, step: int, tokens: int, train_s: float) -> Metrics:
    """What a finished run measured; both losses are over the same rows."""
    rows = len(score.per_example) if score else len(record.base_losses)
    base_loss = float(np.mean(record.base_losses[:rows]))
    return Metrics(
        base_loss=base_loss,
        final_loss=score.loss if score else None,
        dev_examples=rows if score else 0,
        train_examples=record.train_examples,
        dropped_rows=record.dropped,
        steps=step,
        tokens=tokens,
        tokens_per_s=tokens / train_s if train_s > 0 else 0.0,
        train_s=train_s,
        epochs=tokens / record.train_tokens,
        resumes=record.resumes,
    )


def _ready(run: Run, metrics: Metrics) -> Outcome:
    return Outcome(
        status=OutcomeStatus.READY,
        digest=folder_digest(run.folder / "export"),
        export="export",
        metrics=metrics,
        step=metrics.steps,
    )
