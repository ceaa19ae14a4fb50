"""Decisions are counted by the kind that was set where the decision was made, for every policy."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from gateway.learning.rates import LearnedRates, Rate, Table
from gateway.offers import AskedOffer, Records
from gateway.policy.builtin import BUILT_IN
from gateway.policy.interface import PolicyView, SlotFacts, Verdict
from gateway.telemetry.counters import AGAIN, DECISIONS, Measures
from shared.messages.hardware import Hardware
from shared.messages.offers import BareOffer, Decision, DecisionKind, TaskType
from shared.planning.feasibility import Feasibility
from shared.settings import Settings

CPU = Hardware(device="cpu", count=8, memory_bytes=64 << 30)
FREE = SlotFacts(slot="a", busy=False, live=True, hardware=CPU)
BUSY, DOWN = replace(FREE, busy=True), replace(FREE, live=False)
BAD = LearnedRates(
    task_weight=Table(0.0, {"InstructTextTask": Rate(0.0, "lost")}),
    model_performance=Table(0.1, {}),
    task_success=Table(0.0, {"InstructTextTask": Rate(0.0, "failed")}),
)


def judge(policy: str, slot: SlotFacts, hours: float = 2.0, fits: bool = True, **fields: Any) -> Verdict:
    offer = BareOffer(task_id="t", task_type=TaskType.INSTRUCT, model="org/m", hours_to_complete=hours)
    values: dict[str, Any] = {
        "slots": (slot,),
        "tables": LearnedRates(),
        "expected": CPU,
        "max_hours": 96.0,
        "deadline_margin_s": 150.0,
        "feasible": lambda *_: Feasibility(fits, "a cause with 17 numbers"),
    }
    return BUILT_IN[policy](offer, PolicyView(**(values | fields)))


def counted(verdict: Verdict) -> str:
    """The reason that a verdict is counted under, through the decision that a gateway makes of it."""
    offer = BareOffer(task_id="t", task_type=TaskType.INSTRUCT, model="org/m", hours_to_complete=2.0)
    measures = Measures()
    decision = Records(Settings()).decision(AskedOffer(offer, "t", 9.0), verdict)
    assert decision.kind is verdict.kind
    measures.decided(decision, 9.0)
    (found,) = measures.decisions
    assert found in DECISIONS
    return found


@pytest.mark.parametrize(
    ("slot", "hours", "fits", "expected"),
    [
        (FREE, 2.0, True, DecisionKind.ACCEPTED),
        (BUSY, 2.0, True, DecisionKind.CAPACITY),
        (BUSY, 97.0, False, DecisionKind.CAPACITY),
        (FREE, 97.0, True, DecisionKind.TOO_LONG),
        (FREE, 2.0, False, DecisionKind.PLAN),
        (FREE, 0.01, True, DecisionKind.PLAN),
        (DOWN, 2.0, True, DecisionKind.HARDWARE),
    ],
)
@pytest.mark.parametrize("policy", sorted(BUILT_IN))
def test_every_policy_sets_the_kind(
    policy: str, slot: SlotFacts, hours: float, fits: bool, expected: DecisionKind
) -> None:
    verdict = judge(policy, slot, hours, fits)
    assert verdict.kind is expected
    assert counted(verdict) == expected


@pytest.mark.parametrize(
    ("policy", "expected"), [("maximum_accuracy", DecisionKind.PLAN), ("first_come", DecisionKind.HARDWARE)]
)
def test_with_neither_plan_nor_slot_the_policy_names_its_first_obstacle(
    policy: str, expected: DecisionKind
) -> None:
    assert judge(policy, DOWN, fits=False).kind is expected


@pytest.mark.parametrize("policy", ["maximum_accuracy", "expected_value"])
def test_poor_rates_are_a_matter_of_priority(policy: str) -> None:
    verdict = judge(policy, FREE, tables=BAD)
    assert counted(verdict) == DecisionKind.PRIORITY
    assert judge("first_come", FREE, tables=BAD).kind is DecisionKind.ACCEPTED


def test_too_few_points_per_hour_are_a_matter_of_priority() -> None:
    assert counted(judge("expected_value", FREE, min_points_per_hour=1e6)) == DecisionKind.PRIORITY


def test_a_verdict_without_a_kind_is_accepted_or_other() -> None:
    assert Verdict(reason="mine", slot="a").kind is DecisionKind.ACCEPTED
    assert Verdict(reason="At maximum accuracy capacity, as it were").kind is DecisionKind.OTHER
    assert Verdict(reason="mine", kind=DecisionKind.ACCEPTED).kind is DecisionKind.OTHER
    assert replace(Verdict(reason="no", kind=DecisionKind.PLAN), slot="a").kind is DecisionKind.ACCEPTED


@pytest.mark.parametrize("kind", [DecisionKind.ACCEPTED, DecisionKind.OTHER])  # OTHER: an older record
def test_the_same_answer_again_is_not_a_new_acceptance(kind: DecisionKind) -> None:
    accepted = Decision(task_id="t", task="t", accepted=True, reason="", kind=kind, slot="a", decided_at=10.0)
    measures = Measures()
    measures.decided(accepted, 9.0)
    assert measures.decisions == {DecisionKind.ACCEPTED: 1}
    measures.decided(accepted, 11.0)
    assert measures.decisions == {DecisionKind.ACCEPTED: 1, AGAIN: 1}
