"""The checks of `podium doctor`: pure functions from the gathered facts to findings."""

from __future__ import annotations

from collections.abc import Callable

from gateway.state.log_reader import lost_log
from gateway.state.log_room import FULL, in_words
from gateway.views.build import agreed_settings
from podium.diagnostics.findings import Finding, Found, Severity, live, newest
from podium.diagnostics.job_checks import check_jobs
from podium.diagnostics.machine_checks import (
    check_devices,
    check_hotkey,
    check_hub,
    check_large_run,
    check_reachability,
    check_time_source,
)
from podium.diagnostics.probe import StreamVitals, Vitals
from podium.diagnostics.upstream_checks import check_upstream
from shared import subjects

NEARLY_FULL = 0.80  # of a log or of the broker's store; FULL is an error
# Bytes for any run: a LoRA checkpoint has a few GB. A dense 8B one has 84 GB: check_large_run asks for these.
LITTLE_ROOM, NO_ROOM = 20 << 30, 2 << 30
SKEW_S, BAD_SKEW_S = 2.0, 10.0  # deadlines are wall clock; ours is 150 s before upstream's
OLDEST_BROKER = (2, 15)  # older ones can lose acknowledged writes in a power cut, by compaction
TOKEN_VARIABLE = "HF_TOKEN"  # by which the hub's library finds a token


def examine(vitals: Vitals) -> list[Finding]:
    """Return every check's findings, worst first; a check without findings is ok."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        if vitals.broker_error is not None and name in NEED_BROKER:
            continue
        found = [Finding(name, severity, what, do) for severity, what, do in check(vitals)]
        findings += found or [Finding(name, Severity.OK, "fine")]
    order = list(reversed(Severity))
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def check_broker(vitals: Vitals) -> Found:
    """Check that the broker is reachable, and that its version keeps acknowledged writes."""
    if vitals.broker_error is not None:
        return [(Severity.ERROR, vitals.broker_error, "do what it says; training goes on without the broker")]
    version = _version(vitals.broker_version)
    if version is not None and version < OLDEST_BROKER:
        what = f"nats-server {'.'.join(map(str, version))} can lose acknowledged writes in a power cut"
        return [(Severity.WARNING, what, f"use {'.'.join(map(str, OLDEST_BROKER))} or newer")]
    return []


def check_store(vitals: Vitals) -> Found:
    """Check that the broker stores records, has room, and syncs every write."""
    monitor, found = vitals.monitor, Found()
    thaw = "free disk space and restart the broker: it doesn't recover by itself, and a restart loses nothing"
    for action, error in (("read", vitals.read_error), ("store", vitals.append_error)):
        if error is not None:
            found.append((Severity.ERROR, f"the broker doesn't {action}: {error}", thaw))
    if monitor.error is not None:
        what = f"monitoring at {monitor.url} can't be reached ({monitor.error}): sync and health are unknown"
        if not vitals.appended:
            what += ", and this user may not store a test record"
        found.append((Severity.NOTE, what, "run this where it can be reached, or set its URL with --monitor"))
    else:
        if monitor.health != "ok":
            found.append((Severity.ERROR, f"the broker reports: {monitor.health}", thaw))
        if not monitor.sync_always:
            what = "the broker doesn't sync every write: a power cut can lose accepted jobs"
            found.append((Severity.ERROR, what, "set sync_interval: always in its jetstream block"))
        found += _room("the broker's store", monitor.store_bytes, monitor.store_limit, "max_file_store")
    known = vitals.leases.keys() | vitals.unread_leases.keys()
    silent = [slot for slot in live(vitals) if slot not in known]
    if silent and vitals.read_error is None:
        what = f"the node of slot {', '.join(silent)} sends heartbeats, but holds no lease"
        found.append((Severity.WARNING, what, "if this persists, the broker stores nothing: see its log"))
    for slot, why in vitals.unread_leases.items():
        what = f"the lease of slot {slot} can't be read, and no node can take it: {why}"
        do = f"find out what wrote it, then delete it: `nats kv del {subjects.LEASES_BUCKET} {slot}`"
        found.append((Severity.ERROR, what, do))
    return found


def check_streams(vitals: Vitals) -> Found:
    """Check that each stream is configured as Podium creates it, and far from full."""
    states = [subjects.state_stream(slot) for slot in vitals.settings.slots]
    upgrade = _unfinished_upgrade(vitals)
    found = upgrade or [
        (Severity.ERROR, lost_log(name), "never delete the log of a slot that was removed")
        for name in vitals.unread
        if name not in states
    ]
    for stream in vitals.streams:
        if not upgrade or not _waits_for_upgrade(stream, states):
            found += _check_stream(stream, states)
    if vitals.malformed:
        what = f"{vitals.malformed} stored records are malformed and skipped"
        found.append(
            (Severity.WARNING, what, "the gateway's log names each; something else wrote into the logs")
        )
    return found


def _unfinished_upgrade(vitals: Vitals) -> Found:
    """Find STATE, or logs that are still copies of it: they differ from what Podium creates."""
    copies = any(stream.found and stream.found.config.get("mirror") for stream in vitals.streams)
    if not copies and not vitals.old_log:
        return []
    severity = Severity.ERROR if copies or vitals.unread else Severity.WARNING  # else its records are copied
    what = "the upgrade from one log of states isn't finished"
    return [(severity, what, "run `podium bootstrap`, which says what is left; move no stream away")]


def _waits_for_upgrade(stream: StreamVitals, states: list[str]) -> bool:
    """Return whether a log of states is absent, or a copy."""
    absent = stream.found is None and stream.error is None
    return stream.spec.config["name"] in states and (
        absent or (stream.found is not None and bool(stream.found.config.get("mirror")))
    )


def _check_stream(stream: StreamVitals, states: list[str]) -> Found:
    spec, info, name = stream.spec, stream.found, stream.spec.config["name"]
    if stream.error is not None:
        return [(Severity.ERROR, f"{name} can't be inspected: {stream.error}", "see the broker's log")]
    if info is None:
        lost = "`podium bootstrap` creates it; if its records don't return: docs/operations.md, 'lost disk'"
        return [(Severity.ERROR, f"{name} does not exist", lost)]
    found = Found()
    for field, wanted in spec.config.items():
        got = info.config.get(field)
        if got == wanted or (got is None and wanted in (0, -1, False)):
            continue
        severity = Severity.ERROR if field in spec.binding else Severity.WARNING
        do = "services refuse it: move it away" if field in spec.binding else f"`nats stream edit {name}`"
        found.append((severity, f"{name} has {field}={got!r}, Podium sets {wanted!r}", do))
    if name == subjects.JOBS_STREAM or name in states:
        whose = f" for slot {subjects.slot_of_log(name)}" if name in states else ""
        raised = "log_max_bytes and run `podium bootstrap`"
        found += _room(name, info.bytes, info.config.get("max_bytes", -1), raised, whose)
    return found


def _room(what: str, used: int, limit: int, setting: str, whose: str = "") -> Found:
    share = used / limit if limit > 0 else 0.0
    if share < NEARLY_FULL:
        return []
    severity = Severity.ERROR if share >= FULL else Severity.WARNING
    do = f"raise {setting}; when full, nothing more is accepted{whose}, and nothing is dropped"
    return [(severity, in_words(what, used, limit), do)]


def check_permissions(vitals: Vitals) -> Found:
    """Check that the broker denied nothing."""
    found: Found = [(Severity.ERROR, what, "") for what in vitals.denied]
    if vitals.gateway.info is not None:
        found += [
            (Severity.ERROR, f"the broker denied the gateway: {what}", "")
            for what in vitals.gateway.info.denied
        ]
    return found


def check_gateway(vitals: Vitals) -> Found:
    """Check that the gateway answers, decides, writes its files, and agrees on the settings."""
    gateway, info = vitals.gateway, vitals.gateway.info
    if info is None:
        return [(Severity.ERROR, str(gateway.error), "start a gateway; without one no offer is answered")]
    found = Found()
    if info.not_ready is not None:
        found.append((Severity.ERROR, f"the gateway decides nothing: {info.not_ready}", "see its log"))
    if info.mirror.error is not None:
        what = f"the mirror can't be written: {info.mirror.error}"
        found.append((Severity.ERROR, what, "free disk space or repair the folder, then restart the gateway"))
    elif info.mirror.behind:
        found.append(
            (Severity.NOTE, f"the mirror {info.mirror.path} is behind", "if this persists, see its log")
        )
    if info.lost_decisions:
        what = f"{info.lost_decisions} decisions are missing from decisions.jsonl"
        found.append((Severity.WARNING, what, "its disk was full or slow; jobs are not affected"))
    for name, ours in agreed_settings(vitals.settings).items():
        if name in vitals.chosen and (theirs := info.settings.get(name, ours)) != ours:
            variable = f"PODIUM_{name.upper()}"
            what = f"{variable} is {theirs!r} for the gateway and {ours!r} for this command"
            found.append(
                (Severity.WARNING, what, "use the same settings for all services and for this command")
            )
    return found


def check_nodes(vitals: Vitals) -> Found:
    """Check that every slot has one live node with the expected hardware."""
    found, holders = Found(), live(vitals)
    expected = vitals.settings.expected_hardware
    if vitals.gateway.info is not None:  # the gateway's setting decides
        expected = str(vitals.gateway.info.settings.get("expected_hardware", expected))
    for slot in vitals.settings.slots:
        if slot not in holders:
            do = f"start its node; see the log of trainer node {slot}"
            found.append((Severity.ERROR, f"no live node holds slot {slot}", do))
            continue
        hardware = holders[slot].hardware.name
        if hardware != expected:
            what = f"slot {slot} has {hardware} instead of {expected}: no offer is accepted for it"
            found.append((Severity.WARNING, what, "set PODIUM_EXPECTED_HARDWARE, or find the missing GPU"))
    for slot in sorted({each.heartbeat.slot for each in vitals.heartbeats} - set(vitals.settings.slots)):
        what = f"a node serves slot {slot}, which is not one of {', '.join(vitals.settings.slots)}"
        found.append((Severity.WARNING, what, "add it to PODIUM_SLOTS of every service, or stop that node"))
    return found


def check_self_tests(vitals: Vitals) -> Found:
    """Check that the test at the start of each node found no fault, and nothing slower than it should be."""
    do = "repair it, then restart the node: it tests again; its log is self_test/log in the node's folder"
    found: Found = []
    for beat in newest(vitals.heartbeats):
        failed = f"slot {beat.slot} failed its self-test and is offered no job"
        found += [(Severity.ERROR, f"{failed}: {fault}", do) for fault in beat.faults]
        versions = (
            "see the versions of torch, flash-attn and the driver; then restart the node, to test again"
        )
        found += [(Severity.WARNING, f"slot {beat.slot}: {warning}", versions) for warning in beat.warnings]
    return found


def check_gpus(vitals: Vitals) -> Found:
    """Check that no two slots report the same GPU."""
    owners: dict[str, set[str]] = {}
    for heartbeat in newest(vitals.heartbeats):
        for gpu in heartbeat.gpus:
            if gpu.uuid:
                owners.setdefault(gpu.uuid, set()).add(heartbeat.slot)
    return [
        (
            Severity.ERROR,
            f"GPU {uuid} belongs to slots {' and '.join(sorted(slots))}: two jobs would share its memory",
            "give each slot its own GPUs with PODIUM_GPUS, or with device_ids in the compose file",
        )
        for uuid, slots in owners.items()
        if len(slots) > 1
    ]


def check_clocks(vitals: Vitals) -> Found:
    """Check that all wall clocks agree with this machine's: deadlines and expiry are wall clock."""
    clocks = {f"node {each.heartbeat.node}": each.heartbeat.at - each.at for each in vitals.heartbeats}
    if vitals.gateway.skew_s is not None:
        clocks["the gateway"] = vitals.gateway.skew_s
    if vitals.broker_skew_s is not None:
        clocks["the broker"] = vitals.broker_skew_s
    found = Found()
    for who, skew in clocks.items():
        if abs(skew) > SKEW_S:
            severity = Severity.ERROR if abs(skew) > BAD_SKEW_S else Severity.WARNING
            way = "ahead of" if skew > 0 else "behind"
            what = f"the clock of {who} is {abs(skew):.1f} s {way} this machine's"
            found.append((severity, what, "synchronise both with NTP: deadlines are wall clock"))
    return found


def check_disks(vitals: Vitals) -> Found:
    """Check that this machine has room for checkpoints and submissions."""
    found = Found()
    for folder in vitals.folders:
        if folder.error is not None:
            what = f"the disk of {folder.path} can't be read: {folder.error}"
            found.append((Severity.ERROR, what, "repair its mount, or let this user read it"))
        elif folder.free < LITTLE_ROOM:
            severity = Severity.ERROR if folder.free < NO_ROOM else Severity.WARNING
            what = f"{folder.free / 2**30:.1f} GiB of {folder.total / 2**30:.0f} are free for {folder.path}"
            found.append(
                (
                    severity,
                    what,
                    "free disk space: a run keeps two checkpoints and an export at the same time",
                )
            )
    return found


def check_versions(vitals: Vitals) -> Found:
    """Check that all processes run the same version of Podium."""
    versions = {f"node {each.heartbeat.node}": each.heartbeat.version for each in vitals.heartbeats}
    if vitals.gateway.info is not None:
        versions["the gateway"] = vitals.gateway.info.version
    return [
        (Severity.NOTE, f"{who} runs {theirs or 'an older version'}, this command {vitals.version}", "")
        for who, theirs in versions.items()
        if theirs != vitals.version
    ]


def _version(text: str) -> tuple[int, ...] | None:
    """Return the first two numbers of text like `<nats server v2.15.1>`."""
    numbers = text.rpartition("v")[2].rstrip(">").split(".")[:2]
    return tuple(map(int, numbers)) if len(numbers) == 2 and all(map(str.isdigit, numbers)) else None


def check_workers(vitals: Vitals) -> Found:
    """Check that a token which is set here for the hub reaches the workers, if it is meant for them."""
    if TOKEN_VARIABLE not in vitals.variables or TOKEN_VARIABLE in vitals.settings.worker_environment:
        return []
    what = f"{TOKEN_VARIABLE} is set here, and workers don't get it: gated models and data sets are refused"
    do = f"PODIUM_WORKER_ENVIRONMENT={TOKEN_VARIABLE} with a token that may only read (docs/security.md)"
    return [(Severity.NOTE, what, do)]


CHECKS: dict[str, Callable[[Vitals], Found]] = {
    "broker": check_broker,
    "store": check_store,
    "streams": check_streams,
    "permissions": check_permissions,
    "gateway": check_gateway,
    "upstream": check_upstream,
    "hotkey": check_hotkey,
    "reachability": check_reachability,
    "hub": check_hub,
    "nodes": check_nodes,
    "workers": check_workers,
    "jobs": check_jobs,
    "devices": check_devices,
    "gpus": check_gpus,
    "self-tests": check_self_tests,
    "clocks": check_clocks,
    "time source": check_time_source,
    "disks": check_disks,
    "large run": check_large_run,
    "versions": check_versions,
}
NEED_BROKER = {"store", "streams", "nodes", "jobs", "gpus", "self-tests"}
