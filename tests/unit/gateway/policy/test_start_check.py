"""A start is for the task that was accepted, from its validator, and gets a slot where it would run."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.learning.rates import LearnedRates
from gateway.policy.interface import PolicyView, SlotFacts
from gateway.policy.start_check import difference, is_foreign, slot_of_start
from shared.messages.offers import BareOffer, Offer, TaskType
from shared.planning.feasibility import Feasibility
from shared.planning.hardware import parse_hardware

OFFERED: dict[str, Any] = {
    "task_id": "t",
    "task_type": TaskType.CHAT,
    "model": "org/m",
    "hours_to_complete": 4.0,
}
ACCEPTED = BareOffer(**OFFERED)


def start(**changed: Any) -> Offer:
    return Offer(**(OFFERED | {"dataset": "d"} | changed))


@pytest.mark.parametrize("changed", [{}, {"hours_to_complete": 0.5}, {"hours_to_complete": 4.0 + 1e-9}])
def test_the_same_task_or_less_time_is_no_difference(changed: dict[str, Any]) -> None:
    assert difference(ACCEPTED, start(**changed), 96.0) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": "org/other"}, "its model is 'org/other', and 'org/m' was offered"),
        ({"model": "org/M"}, "its model is 'org/M', and 'org/m' was offered"),
        ({"task_type": TaskType.DPO}, "its columns are those of DpoTask, and ChatTask was offered"),
        ({"hours_to_complete": 4.5}, "it is for 4.5 hours, and 4 were offered"),
        ({"hours_to_complete": 97.0}, "it is for 97 hours, and the limit is 96"),
    ],
)
def test_another_task_is_refused_with_what_differs(changed: dict[str, Any], why: str) -> None:
    assert difference(ACCEPTED, start(**changed), 96.0) == why


def test_without_the_offer_only_the_limit_counts() -> None:
    assert difference(None, start(model="any", hours_to_complete=90), 96.0) is None
    assert difference(None, start(hours_to_complete=97), 96.0) == "it is for 97 hours, and the limit is 96"


@pytest.mark.parametrize(
    ("owner", "validator", "foreign"),
    [("a", "b", True), ("a", "a", False), ("", "b", False), ("a", "", False), ("", "", False)],
)
def test_only_another_validator_is_a_stranger(owner: str, validator: str, foreign: bool) -> None:
    assert is_foreign(owner, validator) is foreign


H100 = parse_hardware("4xH100-80GB")


def slot(name: str, condition: str, reserved: str | None) -> SlotFacts:
    """A slot that is `fine`, `down`, `faulty`, `drained`, `full`, or `other`: with other hardware."""
    return SlotFacts(
        slot=name,
        busy=name == reserved,  # held by its reservation
        live=condition != "down",
        hardware=parse_hardware("cpu-8x32GB") if condition == "other" else H100,
        faults=("kernels: wrong",) if condition == "faulty" else (),
        drained=condition == "drained",
        full="96% full" if condition == "full" else None,
    )


@pytest.mark.parametrize(
    ("a", "b", "reserved", "chosen"),
    [
        ("fine", "fine", "a", "a"),
        ("fine", "fine", "b", "b"),
        ("down", "fine", "a", "b"),
        ("faulty", "fine", "a", "b"),
        ("down", "down", "a", "a"),  # its node may come back
        ("faulty", "down", "a", "a"),
        ("faulty", "fine", None, "b"),
        ("down", "faulty", None, "b"),
        ("faulty", "other", None, "b"),
        ("down", "down", None, "a"),
        ("drained", "fine", "a", "b"),
        ("drained", "down", "a", "a"),  # it was promised before
        ("drained", "down", None, "b"),
        ("drained", "drained", None, None),
        ("full", "fine", "a", "b"),
        ("full", "down", "a", "a"),
        ("full", "drained", None, None),
    ],
)
def test_a_start_goes_where_it_would_run(a: str, b: str, reserved: str | None, chosen: str | None) -> None:
    slots = (slot("a", a, reserved), slot("b", b, reserved))
    assert slot_of_start(view(slots), reserved) == chosen


def test_a_late_start_gets_no_slot_that_is_busy() -> None:
    slots = tuple(SlotFacts(slot=name, busy=True, live=True, hardware=H100) for name in "ab")
    assert slot_of_start(view(slots), None) is None


def view(slots: tuple[SlotFacts, ...]) -> PolicyView:
    return PolicyView(
        slots=slots,
        tables=LearnedRates(),
        expected=H100,
        max_hours=96,
        deadline_margin_s=0,
        feasible=lambda *_: Feasibility(True, ""),
    )
