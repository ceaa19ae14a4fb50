"""A submission of weights on disk without data or scoring: no time is left, or the data is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from shared.messages.runs import Outcome, OutcomeStatus, Phase
from shared.planning.plan import Plan
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.evaluate.candidates import TrainProgress
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.export import writer
from trainer_node.engine.finish import reached_at
from trainer_node.engine.model.adapters import add_deltas
from trainer_node.engine.submission import metrics_of, ready
from trainer_node.engine.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class AsIs:
    """Weights on disk that can be submitted without data or scoring."""

    name: str
    plan: Plan
    reached: TrainProgress
    weights: Callable[[], dict[str, torch.Tensor]]
    held_out: Evaluation | None = None  # as it was measured before; None: it was not


def checkpoint_as_is(found: Checkpoint, plan: Plan) -> AsIs:
    """Return the newest checkpoint's weights, whose loss was not measured."""
    reached = reached_at(found.manifest.position)
    return AsIs("the newest checkpoint", plan, reached, partial(found.tensors, "weights"))


def submit_as_is(
    run: RunContext, record: RunRecord, load: Callable[[], torch.nn.Module], chosen: AsIs, why: str
) -> Outcome:
    """Export weights without data or scoring, in the base model. Rank 0 does it alone, and loads alone."""
    if not run.process_group.is_main:
        return Outcome(status=OutcomeStatus.READY)
    run.reporter.message(f"{why}: {chosen.name} is submitted as it is")
    deltas = add_deltas(load(), chosen.plan, run.job.seed)
    deltas.load_state(chosen.weights())
    metrics = metrics_of(record, chosen.held_out, chosen.reached)
    run.reporter.losses(base=metrics.base_loss, dev=metrics.final_loss)
    run.reporter.phase(Phase.EXPORT)
    with run.patience():
        outcome = ready(run, writer.write(deltas, chosen.plan, run.job, metrics, run.folder / "export"))
    run.reporter.phase(Phase.DONE)
    return outcome
