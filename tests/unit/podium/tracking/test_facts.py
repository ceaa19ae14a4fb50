"""What a tracker shows as a run's configuration."""

from __future__ import annotations

from typing import Any

from gateway.views.run import RunMessage
from gateway.views.schemas import TaskState, TaskView
from podium.tracking.facts import plan_facts, result_facts, task_facts
from shared.messages.jobs import Result, ResultStatus
from shared.messages.offers import Decision, TaskType, Term, Terms
from shared.messages.runs import ErrorCode, Metrics, Phase

TERM = Term(0.25, 0.15)


def task(**fields: Any) -> TaskView:
    terms = Terms(**dict.fromkeys(Terms.__struct_fields__, TERM))
    values: dict[str, Any] = {
        "task_id": "1/2",
        "task": "1-2",
        "slot": "a",
        "state": TaskState.RUNNING,
        "decision": Decision(task_id="1/2", task="1-2", accepted=True, reason="r", priority=0.7, terms=terms),
        "model": "org/name",
        "task_type": TaskType.DPO,
        "hours_to_complete": 4.0,
        "received_at": 0.0,
        "deadline_at": 14400.0,
        "attempts": 1,
        "node": None,
        "epoch": None,
        "progress": None,
        "result": None,
    }
    return TaskView(**values | fields)


def test_a_tasks_facts_are_plain_values_and_nothing_that_is_unknown() -> None:
    assert task_facts(task()) == {
        "task_id": "1/2",
        "slot": "a",
        "model": "org/name",
        "task_type": "DpoTask",
        "hours_to_complete": 4.0,
        "received_at": "1970-01-01T00:00:00+00:00",
        "deadline_at": "1970-01-01T04:00:00+00:00",
        "attempts": 1,
        "decision.policy": "maximum_accuracy",
        "decision.priority": 0.7,
        "decision.task_weight": 0.25,
        "decision.model_performance": 0.25,
        "decision.task_success": 0.25,
        "decision.maximum_accuracy_bonus": 0.25,
        "decision.h100_maximum_bonus": 0.25,
    }
    assert type(task_facts(task())["task_type"]) is str


def test_a_result_names_its_losses_or_its_reason() -> None:
    base: dict[str, Any] = {"record_id": "r", "task": "t", "task_id": "t", "slot": "a"}
    failed = Result(status=ResultStatus.FAILED, reason="no memory", code=ErrorCode.OUT_OF_MEMORY, **base)
    assert result_facts(failed) == {
        "result.status": "failed",
        "result.reason": "no memory",
        "result.code": "out_of_memory",
    }
    stored = Result(
        status=ResultStatus.SUBMITTED,
        artifact="/x",
        digest="d",
        deadline_margin_s=-1.0,
        metrics=Metrics(base_loss=3.0, final_loss=2.0),
        **base,
    )
    assert result_facts(stored) == {
        "result.status": "submitted",
        "result.artifact": "/x",
        "result.digest": "d",
        "result.margin_s": -1.0,
        "result.base_loss": 3.0,
        "result.held_out_loss": 2.0,
    }


def test_the_plan_is_facts_and_other_messages_are_none() -> None:
    texts = [
        "plan: examples of a step is 16 instead of 128: is 128 rows",
        "3 of 40 rows dropped: empty",
        "plan: fits",
        "the plan in numbers: profile=auto lr_lora=0.0005 devices=4",
    ]
    messages = [RunMessage(1.0, Phase.LOADING, 0, text) for text in texts]
    facts = plan_facts(messages)
    assert type(facts["plan.devices"]) is int  # a tracker shows 4, not 4.0
    assert facts == {
        "plan.deviation.examples of a step": "16 instead of 128: is 128 rows",
        "plan.profile": "auto",
        "plan.lr_lora": 0.0005,
        "plan.devices": 4,
    }
