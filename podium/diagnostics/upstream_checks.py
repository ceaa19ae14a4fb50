"""The check of upstream's side: who was refused in the last hour, old stakes, wrong entries. Pure."""

from __future__ import annotations

from gateway.telemetry.refusals import RefusalReason
from podium.diagnostics.findings import Found, Severity
from podium.diagnostics.probe import Vitals

STALE_S = 86_400.0  # of the nodes file; the subnet's own miners read the chain every five minutes
SHOWN = 3  # validators that a finding names

# Why they were refused, and what to do.
CAUSES: dict[RefusalReason, tuple[str, str]] = {
    RefusalReason.UNKNOWN: (
        "they are not in the nodes file",
        "update nodes.json (docs/upstream.md), or add them to PODIUM_UPSTREAM_VALIDATORS",
    ),
    RefusalReason.STAKE: (
        "their stake is below upstream_min_stake",
        "update nodes.json (docs/upstream.md); lower PODIUM_UPSTREAM_MIN_STAKE only if they are known",
    ),
    RefusalReason.NO_HOTKEY: ("this gateway has no hotkey", "set PODIUM_HOTKEY to the miner's ss58 address"),
    RefusalReason.FOREIGN: (
        "signatures are off, and they are not on this machine",
        "set PODIUM_HOTKEY and PODIUM_UPSTREAM_AUTH=signed",
    ),
    RefusalReason.CLOCK: ("their nonces are too old or too new", "synchronise this machine's clock with NTP"),
    RefusalReason.REPLAY: (
        "their nonces were used before",
        "a proxy may send requests twice: let it retry nothing",
    ),
    RefusalReason.OTHER_MINER: (
        "they address another hotkey",
        "PODIUM_HOTKEY must be the hotkey for which this address is posted on chain (docs/upstream.md)",
    ),
    RefusalReason.SIGNATURE: (
        "their signatures don't match",
        "someone uses their address, or a proxy changes bodies: forward them byte by byte",
    ),
    RefusalReason.TOO_MANY: ("they sent more nonces than are kept", "nothing, if it is a flood: others pass"),
}


def check_upstream(vitals: Vitals) -> Found:
    """Check that validators are let in, and that the stakes are not old."""
    found = Found()
    refused = vitals.gateway.info.refused if vitals.gateway.info is not None else []
    for reason, (because, do) in CAUSES.items():
        callers = [caller for caller in refused if caller.reason == reason]
        if not callers:
            continue
        named = ", ".join(caller.validator or "(no address)" for caller in callers[-SHOWN:])
        more = f" and {len(callers) - SHOWN} more" if len(callers) > SHOWN else ""
        who = f"{len(callers)} validator{'s were' if len(callers) > 1 else ' was'}"
        what = f"{who} refused in the last hour, because {because}: {named}{more}"
        found.append((Severity.WARNING, what, do))
    return found + _check_nodes_file(vitals) + _check_entries(vitals)


def _check_entries(vitals: Vitals) -> Found:
    do = "correct it before the tournament starts: such a kind is answered with 404 (docs/tournament.md)"
    return [(Severity.WARNING, fault, do) for fault in vitals.entry_faults]


def _check_nodes_file(vitals: Vitals) -> Found:
    path, age_s = vitals.settings.upstream_nodes_file, vitals.nodes_file_age_s
    if path is None or vitals.settings.hotkey is None:
        return []
    keep = "keep it current: docs/upstream.md, 'The nodes file'"
    if age_s is None:
        return [(Severity.WARNING, f"the nodes file {path} is not there", keep)]
    if age_s > STALE_S:
        what = f"the nodes file {path} was written {age_s / 3600:.0f} hours ago: new validators are refused"
        return [(Severity.WARNING, what, keep)]
    return []
