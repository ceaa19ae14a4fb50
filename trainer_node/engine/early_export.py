"""Write what a run has reached so far as a submission, while its worker goes on training.

    python -m trainer_node.engine.early_export RUN_FOLDER TARGET [BELOW]

A process of its own, on the CPU: it reads the newest checkpoint, or the best finished trial of a search, and
the base model, and writes the folder TARGET and the outcome TARGET.json. With BELOW it writes weights only
whose held-out loss was measured and is lower. Exit status 0 = written, 3 = there is nothing (better) yet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace

from shared.clock import WallClock
from shared.files import write_atomically
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.runs import Outcome, OutcomeStatus, WorkerJob, decode_worker_job
from shared.planning.hardware import machine_memory
from shared.planning.plan import Plan
from trainer_node.engine import context
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.damage.repair import undo_scaling
from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress, loss_over_base
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.export import writer
from trainer_node.engine.finish import reached_at
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.choose import reached_in
from trainer_node.engine.search.kept_trials import groups_of, kept_weights, trial_folder
from trainer_node.engine.search.strategy.best_trial import best_of
from trainer_node.engine.search.trial import SearchRecord, read_search
from trainer_node.engine.signals import Stop
from trainer_node.engine.submission import metrics_of
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position

NOTHING_YET = 3
NICENESS = 10
TRIES = 3  # the worker deletes older checkpoints meanwhile


@dataclass(frozen=True)
class SavedWeights:
    """Weights on disk that can be submitted, and their held-out loss if it was measured.

    The loss is that of all development rows: of fewer it is what these say of the others, as in a search.
    """

    plan: Plan
    loss: float | None
    reached: TrainProgress
    weights: Callable[[], dict[str, torch.Tensor]]


def main(arguments: list[str]) -> int:
    """Export once; return the exit status."""
    folder, target = Path(arguments[0]).absolute(), Path(arguments[1]).absolute()
    below = float(arguments[2]) if len(arguments) > 2 else None
    job = on_cpu(decode_worker_job((folder / "job.json").read_bytes()))
    run = RunContext(job, folder, WallClock(), Reporter(Path(os.devnull), job.task, job.slot), Stop())
    for left in reversed(range(TRIES)):
        try:
            known = context.read_record(folder)
            choice = best_choice(run, *known, read_search(folder)) if known else None
            if known is None or choice is None or not is_wanted(choice, below):
                return NOTHING_YET
            export(run, known[0], choice, target)
        except FileNotFoundError:
            if not left:
                raise
        else:
            break
    return 0


def on_cpu(job: WorkerJob) -> WorkerJob:
    """Return the job for a process that must leave the GPUs alone."""
    return replace(job, hardware=Hardware(device="cpu", count=1, memory_bytes=machine_memory()[0]))


def is_wanted(choice: SavedWeights, below: float | None) -> bool:
    """Return whether weights are to be exported: where a loss has to be beaten, only measured ones are."""
    return below is None or (choice.loss is not None and choice.loss < below)


def best_choice(
    run: RunContext, record: RunRecord, plan: Plan, searched: SearchRecord | None
) -> SavedWeights | None:
    """Return the lowest measured loss on disk; without any, the newest checkpoint's weights."""
    choices = [_of_checkpoint(run, record, plan, searched), _of_trial(run, searched) if searched else None]
    found = [choice for choice in choices if choice is not None]
    measured = [choice for choice in found if choice.loss is not None]
    return min(measured, key=lambda choice: choice.loss or 0.0, default=found[0] if found else None)


def _of_trial(run: RunContext, searched: SearchRecord) -> SavedWeights | None:
    best = best_of(searched.done)
    if best is None:
        return None
    folder = trial_folder(run.folder, searched.done.index(best))
    if not checkpoint.groups(folder).issuperset(groups_of(best)):
        return None
    plan = searched.plans[best.trial.arm]
    return SavedWeights(plan, best.loss, reached_in(best), lambda: kept_weights(folder, best)())


def _of_checkpoint(
    run: RunContext, record: RunRecord, plan: Plan, searched: SearchRecord | None
) -> SavedWeights | None:
    folders = sorted((run.folder / "checkpoints").glob("step-*"))
    if not folders:
        return None
    position, groups = checkpoint.position_at(folders[-1]), checkpoint.groups(folders[-1])
    if searched is not None:
        trials = [*(result.trial for result in searched.done), *([searched.trial] if searched.trial else [])]
        if position.trial >= len(trials):
            return None
        plan = searched.plans[trials[position.trial].arm]
    group, loss = measured_group(position, groups, record)
    if group not in groups:
        return None
    weights = partial(_read, folders[-1], group)
    return SavedWeights(plan, loss, reached_at(position), weights)


def _read(folder: Path, group: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder, group).tensors(group)


def measured_group(position: Position, groups: frozenset[str], record: RunRecord) -> tuple[str, float | None]:
    """Return a checkpoint's weights of the lowest measured loss and that loss; else its last weights.

    The curve is measured on the first development rows, a trial and the base model on all: only what was
    gained over the base model on the same rows can be compared.
    """
    curve = position.curve
    if curve.best is None or "best" not in groups:
        return "weights", None
    score = Evaluation(curve.best.loss or 0.0, np.array(curve.best_losses))
    return "best", record.base_loss + loss_over_base(
        Candidate("best", reached_at(position), score), record.base_losses
    )


def export(run: RunContext, record: RunRecord, choice: SavedWeights, target: Path) -> None:
    """Write the chosen weights as a submission, then the outcome that describes it."""
    weights = choice.weights()  # the worker may delete them while the model is read
    model = load_model(run.job.model_path, getattr(torch, choice.plan.dtype))
    undo_scaling(model, choice.plan.repair)
    deltas = add_deltas(model, choice.plan, run.job.seed)
    deltas.load_state(weights)
    metrics = metrics_of(record, None, choice.reached)
    if choice.loss is not None:
        metrics = replace(metrics, final_loss=choice.loss, dev_examples=len(record.base_losses))
    metrics = writer.write(deltas, choice.plan, run.job, metrics, target)
    outcome = Outcome(
        status=OutcomeStatus.READY, export=target.name, metrics=metrics, step=choice.reached.step
    )
    write_atomically(target.with_name(f"{target.name}.json"), encode(outcome))


if __name__ == "__main__":
    os.nice(NICENESS)
    torch.set_num_threads(1)  # the worker needs the others
    sys.exit(main(sys.argv[1:]))
