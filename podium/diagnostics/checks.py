"""What is wrong, and what to do: pure judgements of what `podium doctor` has gathered."""

from __future__ import annotations

from collections.abc import Callable

from gateway.views.build import agreed
from podium.diagnostics.findings import Finding, Found, Severity, live, newest
from podium.diagnostics.job_checks import check_jobs
from podium.diagnostics.probe import Vitals
from shared import subjects

LOGS = {subjects.JOBS_STREAM, subjects.STATE_STREAM}
FULL, NEARLY_FULL = 0.95, 0.80  # of a log or of the broker's store
LITTLE_ROOM, NO_ROOM = 20 << 30, 2 << 30  # bytes: a dense 8B checkpoint takes 100 GB, a LoRA's one some GB
SKEW_S, BAD_SKEW_S = 2.0, 10.0  # deadlines are wall clock; the margin before upstream's is 150 s
OLDEST_BROKER = (2, 15)  # before, compaction could lose acknowledged writes in a power cut


def examine(vitals: Vitals) -> list[Finding]:
    """Every check's findings, worst first; a check without any is ok."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        if vitals.broker_error is not None and name in NEED_BROKER:
            continue
        found = [Finding(name, severity, what, do) for severity, what, do in check(vitals)]
        findings += found or [Finding(name, Severity.OK, "fine")]
    order = list(reversed(Severity))
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def check_broker(vitals: Vitals) -> Found:
    """Reachable, and of a version whose acknowledged writes last."""
    if vitals.broker_error is not None:
        return [(Severity.ERROR, vitals.broker_error, "start the broker; training goes on meanwhile")]
    version = _version(vitals.broker_version)
    if version is not None and version < OLDEST_BROKER:
        what = f"nats-server {'.'.join(map(str, version))} can lose acknowledged writes in a power cut"
        return [(Severity.WARNING, what, f"use {'.'.join(map(str, OLDEST_BROKER))} or newer")]
    return []


def check_store(vitals: Vitals) -> Found:
    """It stores, has room, and syncs what it acknowledges."""
    monitor, found = vitals.monitor, Found()
    thaw = "make room on its disk and start the broker again: it doesn't thaw by itself, and loses nothing"
    for action, error in (("read", vitals.read_error), ("store", vitals.append_error)):
        if error is not None:
            found.append((Severity.ERROR, f"the broker doesn't {action}: {error}", thaw))
    if monitor.error is not None:
        what = f"monitoring at {monitor.url} can't be asked ({monitor.error}): sync and health are not known"
        if not vitals.appended:
            what += ", and this user may store nothing to try it"
        found.append((Severity.NOTE, what, "run this where it can be reached, or name it with --monitor"))
    else:
        if monitor.health != "ok":
            found.append((Severity.ERROR, f"the broker says of itself: {monitor.health}", thaw))
        if not monitor.sync_always:
            what = "the broker doesn't sync every write: a power cut can lose accepted jobs"
            found.append((Severity.ERROR, what, "set sync_interval: always in its jetstream block"))
        found += _room("the broker's store", monitor.store_bytes, monitor.store_limit, "max_file_store")
    silent = [slot for slot in live(vitals) if slot not in vitals.leases]
    if silent and vitals.read_error is None:
        what = f"the node of slot {', '.join(silent)} is there, but holds no lease"
        found.append((Severity.WARNING, what, "if this stays, the broker stores nothing: see its log"))
    return found


def check_streams(vitals: Vitals) -> Found:
    """Each as Podium makes it, and far from full."""
    found = Found()
    for stream in vitals.streams:
        spec, info, name = stream.spec, stream.found, stream.spec.config["name"]
        if stream.error is not None:
            found.append(
                (Severity.ERROR, f"{name} can't be looked at: {stream.error}", "see the broker's log")
            )
            continue
        if info is None:
            lost = "`podium bootstrap` makes it; if it was there before: docs/operations.md, 'lost disk'"
            found.append((Severity.ERROR, f"{name} is not there", lost))
            continue
        for field, wanted in spec.config.items():
            got = info.config.get(field)
            if got == wanted or (got is None and wanted in (0, -1, False)):
                continue
            severity = Severity.ERROR if field in spec.binding else Severity.WARNING
            do = "services refuse it: move it away" if field in spec.binding else f"`nats stream edit {name}`"
            found.append((severity, f"{name} has {field}={got!r} where Podium makes {wanted!r}", do))
        if name in LOGS:
            found += _room(
                name, info.bytes, info.config.get("max_bytes", -1), "log_max_bytes, then edit the stream"
            )
    if vitals.malformed:
        what = f"{vitals.malformed} stored records can't be used and are passed over"
        found.append(
            (Severity.WARNING, what, "the gateway's log names each; somebody else wrote into the logs")
        )
    return found


def _room(what: str, used: int, limit: int, setting: str) -> Found:
    share = used / limit if limit > 0 else 0.0
    if share < NEARLY_FULL:
        return []
    severity = Severity.ERROR if share >= FULL else Severity.WARNING
    do = f"raise {setting}; full means that nothing is accepted any more, nothing is dropped"
    return [(severity, f"{what} is {share:.0%} full ({used >> 20} of {limit >> 20} MiB)", do)]


def check_permissions(vitals: Vitals) -> Found:
    """Nobody was denied anything."""
    found: Found = [(Severity.ERROR, what, "") for what in vitals.denied]
    if vitals.gateway.info is not None:
        found += [
            (Severity.ERROR, f"the broker denied the gateway: {what}", "")
            for what in vitals.gateway.info.denied
        ]
    return found


def check_gateway(vitals: Vitals) -> Found:
    """Answers, decides, writes its files, and means the same by every setting."""
    gateway, info = vitals.gateway, vitals.gateway.info
    if info is None:
        return [(Severity.ERROR, str(gateway.error), "start a gateway; until then no offer is answered")]
    found = Found()
    if info.not_ready is not None:
        found.append((Severity.ERROR, f"the gateway decides nothing: {info.not_ready}", "see its log"))
    if info.mirror.error is not None:
        what = f"the mirror doesn't follow: {info.mirror.error}"
        found.append((Severity.ERROR, what, "make room or repair the folder, then start the gateway again"))
    elif info.mirror.behind:
        found.append(
            (Severity.NOTE, f"the mirror {info.mirror.path} is behind", "if this stays, see its log")
        )
    if info.lost_decisions:
        what = f"{info.lost_decisions} decisions are missing in decisions.jsonl"
        found.append((Severity.WARNING, what, "its disk was full or slow; jobs are not affected"))
    for name, ours in agreed(vitals.settings).items():
        if name in vitals.chosen and (theirs := info.settings.get(name, ours)) != ours:
            variable = f"PODIUM_{name.upper()}"
            what = f"{variable} is {theirs!r} for the gateway and {ours!r} for this command"
            found.append(
                (Severity.WARNING, what, "give all services the same settings, and this command too")
            )
    return found


def check_nodes(vitals: Vitals) -> Found:
    """Every slot has one living node, and shows the hardware it should."""
    found, holders = Found(), live(vitals)
    expected = vitals.settings.expected_hardware
    if vitals.gateway.info is not None:  # it is the one that decides
        expected = str(vitals.gateway.info.settings.get("expected_hardware", expected))
    for slot in vitals.settings.slots:
        if slot not in holders:
            do = f"start its node; look at the log of trainer node {slot}"
            found.append((Severity.ERROR, f"no node of slot {slot} holds it", do))
            continue
        hardware = holders[slot].hardware.name
        if hardware != expected:
            what = f"slot {slot} shows {hardware}, expected is {expected}: no offer is accepted for it"
            found.append((Severity.WARNING, what, "set PODIUM_EXPECTED_HARDWARE, or find the missing GPU"))
    for slot in sorted({each.heartbeat.slot for each in vitals.heartbeats} - set(vitals.settings.slots)):
        what = f"a node serves slot {slot}, which is none of {', '.join(vitals.settings.slots)}"
        found.append((Severity.WARNING, what, "add it to PODIUM_SLOTS of every service, or stop that node"))
    return found


def check_gpus(vitals: Vitals) -> Found:
    """No GPU is shown by two slots."""
    owners: dict[str, set[str]] = {}
    for heartbeat in newest(vitals.heartbeats):
        for gpu in heartbeat.gpus:
            if gpu.uuid:
                owners.setdefault(gpu.uuid, set()).add(heartbeat.slot)
    return [
        (
            Severity.ERROR,
            f"GPU {uuid} belongs to slots {' and '.join(sorted(slots))}: two jobs would share its memory",
            "give each half its own with PODIUM_GPUS, or with device_ids in the compose file",
        )
        for uuid, slots in owners.items()
        if len(slots) > 1
    ]


def check_clocks(vitals: Vitals) -> Found:
    """Everybody's wall clock is ours: deadlines and expiry are wall clock."""
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
    """Room for checkpoints and submissions on this machine."""
    found = Found()
    for folder in vitals.folders:
        if folder.free < LITTLE_ROOM:
            severity = Severity.ERROR if folder.free < NO_ROOM else Severity.WARNING
            what = f"{folder.free / 2**30:.1f} GiB of {folder.total / 2**30:.0f} are free for {folder.path}"
            found.append(
                (severity, what, "make room: a run keeps two checkpoints and an export at the same time")
            )
    return found


def check_versions(vitals: Vitals) -> Found:
    """Everybody runs the same Podium."""
    versions = {f"node {each.heartbeat.node}": each.heartbeat.version for each in vitals.heartbeats}
    if vitals.gateway.info is not None:
        versions["the gateway"] = vitals.gateway.info.version
    return [
        (Severity.NOTE, f"{who} runs {theirs or 'an older version'}, this command {vitals.version}", "")
        for who, theirs in versions.items()
        if theirs != vitals.version
    ]


def _version(text: str) -> tuple[int, ...] | None:
    """The first two numbers of something like `<nats server v2.15.1>`."""
    numbers = text.rpartition("v")[2].rstrip(">").split(".")[:2]
    return tuple(map(int, numbers)) if len(numbers) == 2 and all(map(str.isdigit, numbers)) else None


CHECKS: dict[str, Callable[[Vitals], Found]] = {
    "broker": check_broker,
    "store": check_store,
    "streams": check_streams,
    "permissions": check_permissions,
    "gateway": check_gateway,
    "nodes": check_nodes,
    "jobs": check_jobs,
    "gpus": check_gpus,
    "clocks": check_clocks,
    "disks": check_disks,
    "versions": check_versions,
}
NEED_BROKER = {"store", "streams", "nodes", "jobs", "gpus"}
