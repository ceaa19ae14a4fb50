"""Every refusal of the house policy falls into its class, by the policy's own words and no copies of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.learning.rates import Tables
from gateway.policy.house import PolicyView, SlotFacts, Verdict, maximum_accuracy
from gateway.reasons import ReasonClass, reason_class
from shared.messages import BareOffer, Decision, Hardware, TaskType
from shared.planning.planner import Feasibility

CPU = Hardware(device="cpu", count=8, memory_bytes=64 << 30)
FREE = SlotFacts(slot="a", busy=False, live=True, hardware=CPU)


def decision(verdict: Verdict) -> Decision:
    return Decision(
        task_id="t",
        task="t",
        accepted=verdict.accepted,
        reason=verdict.reason,
        priority=verdict.priority,
        terms=verdict.terms,
        decided_at=10.0,
    )


@pytest.mark.parametrize(
    ("hours", "slot", "feasible", "expected"),
    [
        (2.0, FREE, True, ReasonClass.ACCEPTED),
        (2.0, msgspec.structs.replace(FREE, busy=True), True, ReasonClass.CAPACITY),
        (97.0, FREE, True, ReasonClass.TOO_LONG),
        (2.0, FREE, False, ReasonClass.PLAN),
        (0.01, FREE, True, ReasonClass.PLAN),
        (2.0, msgspec.structs.replace(FREE, live=False), True, ReasonClass.HARDWARE),
        (2.0, msgspec.structs.replace(FREE, live=False), False, ReasonClass.PLAN),
    ],
)
def test_each_refusal_has_its_class(
    hours: float, slot: SlotFacts, feasible: bool, expected: ReasonClass
) -> None:
    offer = BareOffer(task_id="t", task_type=TaskType.INSTRUCT, model="org/m", hours_to_complete=hours)
    view = PolicyView(
        slots=(slot,),
        tables=Tables(),
        expected=CPU,
        max_hours=96.0,
        deadline_margin_s=150.0,
        feasible=lambda *_: Feasibility(feasible, "a cause with 17 numbers"),
    )
    assert reason_class(decision(maximum_accuracy(offer, view)), 9.0) is expected


def test_the_same_answer_again_is_not_a_new_acceptance() -> None:
    accepted = decision(Verdict(reason="Accepted", slot="a"))
    assert reason_class(accepted, 9.0) is ReasonClass.ACCEPTED
    assert reason_class(accepted, 11.0) is ReasonClass.AGAIN


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("Task id is the token of another accepted task, 'x'; offer it", ReasonClass.TOKEN_TAKEN),
        ("whatever another policy says", ReasonClass.OTHER),
        ("Priority 0.1 below #1 threshold", ReasonClass.OTHER),  # without terms nothing is known
    ],
)
def test_the_others(reason: str, expected: ReasonClass) -> None:
    fields: dict[str, Any] = {"task_id": "t", "task": "t", "accepted": False, "decided_at": 10.0}
    assert reason_class(Decision(reason=reason, **fields), 9.0) is expected
