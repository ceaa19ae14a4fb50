"""Findings of the checks, and the live nodes among the received heartbeats."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct

from shared.messages.slots import Heartbeat

if TYPE_CHECKING:
    from podium.diagnostics.probe import ReceivedHeartbeat, Vitals


class Severity(StrEnum):
    """Severity of a finding; only an error makes `podium doctor` fail."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Finding(Struct, frozen=True):
    """One problem, and what to do about it."""

    check: str
    severity: Severity
    what: str
    do: str = ""


Problem = tuple[Severity, str, str]  # severity, what is wrong, what to do
Found = list[Problem]


def newest(heartbeats: tuple[ReceivedHeartbeat, ...]) -> list[Heartbeat]:
    """Return the last heartbeat of each node."""
    return list({(each.heartbeat.slot, each.heartbeat.node): each.heartbeat for each in heartbeats}.values())


def live(vitals: Vitals) -> dict[str, Heartbeat]:
    """Return the heartbeat of the node that holds each slot."""
    return {heartbeat.slot: heartbeat for heartbeat in newest(vitals.heartbeats) if heartbeat.epoch > 0}
