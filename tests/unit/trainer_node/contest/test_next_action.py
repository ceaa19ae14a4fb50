"""What the runner does next, and when it exports early."""

from __future__ import annotations

from typing import Any

import pytest

from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus
from trainer_node.contest.next_action import (
    MOST_ATTEMPTS,
    Action,
    End,
    NextProfile,
    RunObservation,
    StartWorker,
    TakeExport,
    Wait,
    export_due,
    next_action,
)

READY = Outcome(status=OutcomeStatus.READY, digest="d", export="export")


def failed(code: ErrorCode) -> Outcome:
    return Outcome(status=OutcomeStatus.FAILED, code=code, error="why")


@pytest.mark.parametrize(
    ("seen", "action"),
    [
        ({}, StartWorker()),
        ({"worker_alive": True}, Wait()),
        ({"worker_alive": True, "outcome": READY}, TakeExport()),
        ({"outcome": READY, "time_left": False}, TakeExport()),
        ({"deaths": MOST_ATTEMPTS - 1}, StartWorker()),
        ({"deaths": MOST_ATTEMPTS}, NextProfile("its worker ended without an outcome")),
        ({"deaths": MOST_ATTEMPTS, "profiles_left": 0}, End("its worker ended without an outcome")),
        ({"time_left": False}, End("the time is over")),
        ({"outcome": failed(ErrorCode.BAD_DATA), "deaths": 1}, End("why")),
        ({"outcome": failed(ErrorCode.MODEL_UNAVAILABLE), "deaths": 1}, End("why")),
        ({"outcome": failed(ErrorCode.DOES_NOT_FIT), "deaths": 1}, NextProfile("why")),
        ({"outcome": failed(ErrorCode.OUT_OF_MEMORY), "deaths": 1}, NextProfile("why")),
        ({"outcome": failed(ErrorCode.OUT_OF_MEMORY), "deaths": 1, "profiles_left": 0}, End("why")),
        ({"outcome": failed(ErrorCode.DEVICE), "deaths": 1}, StartWorker()),
        ({"outcome": failed(ErrorCode.INTERNAL), "deaths": MOST_ATTEMPTS}, NextProfile("why")),
        ({"outcome": failed(ErrorCode.DISK_FULL), "deaths": 2}, StartWorker()),
        ({"outcome": Outcome(status=OutcomeStatus.STOPPED)}, StartWorker()),
    ],
)
def test_next_action(seen: dict[str, Any], action: Action) -> None:
    usual: dict[str, Any] = {
        "worker_alive": False,
        "outcome": None,
        "deaths": 0,
        "profiles_left": 1,
        "time_left": True,
    }
    assert next_action(RunObservation(**(usual | seen))) == action


@pytest.mark.parametrize(
    ("seen", "due"),
    [
        ({}, True),
        ({"news": False}, False),
        ({"last_at": 100.0, "now": 199.0}, False),  # a tenth of the time between two
        ({"last_at": 100.0, "now": 200.0}, True),
        ({"last_at": 100.0, "now": 200.0, "last_s": 20.0}, False),  # a tenth of the time for all
        ({"last_at": 100.0, "now": 300.0, "last_s": 20.0}, True),
        ({"last_at": 100.0, "now": 980.0, "last_s": 20.0}, False),  # it would be late
        ({"now": 1000.0}, False),
    ],
)
def test_an_early_export_is_due(seen: dict[str, Any], due: bool) -> None:
    usual: dict[str, Any] = {
        "now": 100.0,
        "ready_by": 1000.0,
        "started_at": 0.0,
        "last_at": None,
        "last_s": 0.0,
        "news": True,
    }
    assert export_due(**(usual | seen)) is due
