"""What a tracker shows as a run's configuration: the task, the decision, the plan, and how it ended."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from gateway.views.run import RunMessage
from gateway.views.schemas import TaskView
from shared.messages.jobs import Result
from shared.messages.runs import Metrics, Outcome, WorkerJob
from shared.planning.plan import numbers_in

Facts = dict[str, str | int | float]

_DEVIATION = re.compile(r"plan: (?P<what>.+?) is (?P<words>.+ instead of .+)", re.DOTALL)


def task_facts(task: TaskView) -> Facts:
    """Return what is known of an accepted task. Never its data set: the address may hold a signature."""
    decision = task.decision
    facts: dict[str, object] = {
        "task_id": task.task_id,
        "slot": task.slot,
        "node": task.node,
        "model": task.model,
        "task_type": task.task_type,
        "hours_to_complete": task.hours_to_complete,
        "received_at": _time(task.received_at),
        "deadline_at": _time(task.deadline_at),
        "attempts": task.attempts,
        "decision.policy": decision.policy,
        "decision.priority": decision.priority,
    }
    if decision.terms is not None:
        terms = decision.terms
        facts |= {f"decision.{name}": getattr(terms, name).value for name in terms.__struct_fields__}
    if task.score is not None:
        facts |= {"score.quality_score": task.score.quality_score, "score.test_loss": task.score.test_loss}
    return _known(facts)


def job_facts(job: WorkerJob) -> Facts:
    """Return what is known of a run of `podium train`."""
    return _known(
        {
            "task_id": job.task_id,
            "model": job.model,
            "task_type": job.task_type,
            "hours_to_complete": round((job.ready_by - job.start_at) / 3600, 4),
            "received_at": _time(job.start_at),
            "deadline_at": _time(job.ready_by),
            "hardware": job.hardware.name,
            "plan.profile": job.profile,
            "seed": job.seed,
            "kl_coefficient": job.kl_coefficient,
        }
    )


def plan_facts(messages: Iterable[RunMessage]) -> Facts:
    """Return the plan's numbers and its deviations from the profile, as the run reported them."""
    facts: Facts = {}
    for message in messages:
        facts |= {f"plan.{name}": value for name, value in numbers_in(message.text).items()}
        if match := _DEVIATION.fullmatch(message.text):
            facts[f"plan.deviation.{match['what']}"] = match["words"]
    return facts


def result_facts(result: Result) -> Facts:
    """Return how a task ended."""
    return _known(
        {
            "result.status": result.status,
            "result.reason": result.reason,
            "result.code": result.code,
            "result.artifact": result.artifact,
            "result.digest": result.digest,
            "result.model_hash": result.model_hash,
            "result.margin_s": result.deadline_margin_s,
        }
        | _losses(result.metrics)
    )


def outcome_facts(outcome: Outcome, margin_s: float | None) -> Facts:
    """Return how a run of `podium train` ended. `margin_s` is None if it failed."""
    return _known(
        {
            "result.status": outcome.status,
            "result.reason": outcome.error,
            "result.code": outcome.code,
            "result.digest": outcome.digest,
            "result.margin_s": margin_s,
        }
        | _losses(outcome.metrics)
    )


def _losses(metrics: Metrics | None) -> dict[str, object]:
    if metrics is None:
        return {}
    return {"result.base_loss": metrics.base_loss, "result.held_out_loss": metrics.final_loss}


def _known(facts: dict[str, object]) -> Facts:
    """Return the facts that are there, as plain values."""
    plain: Facts = {}
    for name, value in facts.items():
        if isinstance(value, str) and value:
            plain[name] = str(value)  # an enum's value
        elif isinstance(value, int | float):
            plain[name] = value
    return plain


def _time(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
