"""A start is for the task that was accepted, and from its validator."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.policy.start_check import difference, is_foreign
from shared.messages import BareOffer, Offer, TaskType

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
