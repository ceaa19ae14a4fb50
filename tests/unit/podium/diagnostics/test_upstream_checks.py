"""What doctor says of refused validators and of the nodes file."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from gateway.telemetry.refusals import RefusalReason
from gateway.views.schemas import RefusedCaller
from podium.diagnostics.findings import Severity
from podium.diagnostics.monitor import Monitor
from podium.diagnostics.probe import GatewayVitals, Vitals
from podium.diagnostics.upstream_checks import CAUSES, check_upstream
from shared.settings import Settings
from tests.unit.podium.diagnostics.test_checks import INFO, NOW

SETTINGS = Settings(hotkey="5H", upstream_nodes_file="nodes.json")


def refused(reason: RefusalReason, *validators: str) -> list[RefusedCaller]:
    times = {"first_at": NOW, "last_at": NOW}
    return [
        RefusedCaller(validator=name, reason=reason, detail="", requests=1, **times) for name in validators
    ]


def vitals(callers: list[RefusedCaller], **values: Any) -> Vitals:
    gateway = GatewayVitals(url="", info=replace(INFO, refused=callers))
    fields: dict[str, Any] = {"settings": SETTINGS, "nodes_file_age_s": 60.0, **values}
    return Vitals(now=NOW, version="1", monitor=Monitor(url=""), gateway=gateway, **fields)


def test_each_reason_is_one_finding_with_its_callers() -> None:
    callers = refused(RefusalReason.UNKNOWN, "5A") + refused(RefusalReason.CLOCK, "5A", "5B", "5C", "5D")
    (_, unknown, update), (_, clock, ntp) = check_upstream(vitals(callers))
    assert unknown == ("1 validator was refused in the last hour, because they are not in the nodes file: 5A")
    assert "update nodes.json" in update
    assert clock == (
        "4 validators were refused in the last hour, because their nonces are too old or too new: "
        "5B, 5C, 5D and 1 more"
    )
    assert "NTP" in ntp


def test_every_reason_has_its_cause() -> None:
    assert set(CAUSES) == set(RefusalReason)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"nodes_file_age_s": None}, ["the nodes file nodes.json is not there"]),
        ({"nodes_file_age_s": 90_000.0}, ["was written 25 hours ago: new validators are refused"]),
        ({"nodes_file_age_s": None, "settings": Settings(hotkey="5H")}, []),
        ({"nodes_file_age_s": None, "settings": Settings(upstream_nodes_file="nodes.json")}, []),
    ],
)
def test_an_old_nodes_file_is_named(values: dict[str, Any], said: list[str]) -> None:
    found = check_upstream(vitals([], **values))
    assert len(found) == len(said)
    for (_, what, _), words in zip(found, said, strict=True):
        assert words in what


def test_a_wrong_entry_is_a_warning() -> None:
    (found,) = check_upstream(vitals([], entry_faults=("the training repository for text tasks is wrong",)))
    severity, what, do = found
    assert severity is Severity.WARNING
    assert what == "the training repository for text tasks is wrong"
    assert "docs/tournament.md" in do
