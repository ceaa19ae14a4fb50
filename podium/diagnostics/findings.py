"""What a check can find, and who of the nodes is there."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from podium.diagnostics.probe import ReceivedHeartbeat, Vitals
from shared.messages import Heartbeat


class Severity(StrEnum):
    """How bad it is; only an error makes `podium doctor` fail."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Finding(Struct, frozen=True):
    """One thing that was found, and what to do about it."""

    check: str
    severity: Severity
    what: str
    do: str = ""


Found = list[tuple[Severity, str, str]]  # how bad, what, what to do


def newest(heartbeats: tuple[ReceivedHeartbeat, ...]) -> list[Heartbeat]:
    """The last heartbeat of each node."""
    return list({(each.heartbeat.slot, each.heartbeat.node): each.heartbeat for each in heartbeats}.values())


def live(vitals: Vitals) -> dict[str, Heartbeat]:
    """By slot, the node that holds it."""
    return {heartbeat.slot: heartbeat for heartbeat in newest(vitals.heartbeats) if heartbeat.epoch > 0}
