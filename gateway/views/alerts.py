"""What needs an operator now, each with what to do: a pure function of what the gateway knows."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from msgspec import Struct

from gateway.state.ledger import Ledger, TaskState
from gateway.state.presence import Presence
from gateway.views.schemas import GatewayInfo
from shared.messages.jobs import ResultStatus
from shared.planning.hardware import parse_hardware
from shared.settings import Settings

RECENT_S = 86400.0  # how long a task without a submission is shown
SOON_S = 60.0  # to the deadline of a job that has not been submitted
STARTING_S = 60.0  # a node may take so long to claim a job
DAMAGED = "cancel it, unless it is being submitted; see docs/operations.md"


class AlertLevel(StrEnum):
    """How bad it is."""

    ERROR = "error"  # jobs are lost or will be
    WARNING = "warning"


class Alert(Struct, frozen=True, kw_only=True):
    """One thing that needs an operator."""

    level: AlertLevel
    what: str
    do: str
    slot: str | None = None
    task: str | None = None


class AlertPage(Struct, frozen=True):
    """Every alert, errors first."""

    alerts: list[Alert]


def alerts_of(
    info: GatewayInfo, ledger: Ledger, presence: Presence, settings: Settings, now: float
) -> list[Alert]:
    """Return all alerts, errors first."""
    found = [*_of_gateway(info), *_of_slots(ledger, presence, settings, now), *_of_tasks(ledger, now)]
    return sorted(found, key=lambda alert: alert.level is not AlertLevel.ERROR)


def _of_gateway(info: GatewayInfo) -> Iterator[Alert]:
    if info.not_ready:
        yield _error(f"no offer is decided: {info.not_ready}", "run `podium doctor`")
    if info.full_log:
        do = "raise PODIUM_LOG_MAX_BYTES and run `podium bootstrap`; see docs/operations.md"
        yield _error(f"no offer is accepted: {info.full_log}", do)
    for slot, full in info.full_slots.items():
        do = "find out what its node writes (docs/security.md); raise PODIUM_LOG_MAX_BYTES as for any log"
        yield _error(f"no offer is accepted for slot {slot}: {full}", do, slot=slot)
    for denial in info.denied:
        yield _error(denial, "compare the broker's users with `podium keys`; see docs/security.md")
    if info.mirror.error:
        what = f"the mirror of the logs is not written: {info.mirror.error}"
        yield _error(what, f"free or repair the disk of {info.mirror.path}")
    if info.lost_decisions:
        what = f"{info.lost_decisions} decisions are not in this gateway's file"
        yield _warning(what, "look for `decisions lost` in the gateway's log: its disk is full or slow")
    if info.malformed_records:
        what = f"{info.malformed_records} records of the logs can't be read and are skipped"
        yield _warning(what, "look for `malformed record` in the gateway's log; run `podium doctor`")


def _of_slots(ledger: Ledger, presence: Presence, settings: Settings, now: float) -> Iterator[Alert]:
    for slot in settings.slots:
        sign, drain, holder = presence.sign(slot), ledger.drain_of(slot), ledger.holder(slot, now)
        task = holder.record.task if holder is not None and holder.job is not None else None
        # A drained slot without a job may be stopped and repaired: its operator is there.
        trouble = _error if drain is None or task is not None else _warning
        if not presence.live(slot):
            kept = f"; it holds {task}" if task is not None else ""
            do = "start its trainer node, or look at its log"
            yield trouble(f"slot {slot} has no live node{kept}", do, slot=slot)
        elif sign and sign.heartbeat:
            if (shows := sign.hardware.name) != (wanted := parse_hardware(settings.expected_hardware).name):
                what = f"slot {slot} shows {shows} instead of {wanted}: no offer is accepted for it"
                yield trouble(what, "repair its GPUs, or set PODIUM_EXPECTED_HARDWARE", slot=slot)
            for fault in sign.heartbeat.faults:
                do = "repair it; until then this slot is offered no job (`podium doctor --self-test`)"
                yield trouble(f"slot {slot}: {fault}", do, slot=slot)
            for warning in sign.heartbeat.warnings:
                do = "see the versions of torch, flash-attn and the driver; then restart its node"
                yield _warning(f"slot {slot}: {warning}", do, slot=slot)
        if drain is not None:
            since = f"has been drained for {_span(now - drain.at)}"
            what = f"slot {slot} {since}: it gets no new job ({drain.reason})"
            yield _warning(what, f"`podium resume {slot}` when it may work again", slot=slot)


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _of_tasks(ledger: Ledger, now: float) -> Iterator[Alert]:
    for task in ledger.tasks():
        job = task.job
        if job is None:
            continue
        chain, key, state = ledger.chain_of(job), job.task, ledger.state(task, now)
        result = chain.result
        if chain.damaged is not None:
            what = f"{key} is stuck: the newest record of its states can't be read ({chain.damaged})"[:300]
            yield _error(what, DAMAGED, slot=job.slot, task=key)
        elif result is None:
            left = job.deadline_at - now
            if left < SOON_S:
                when = f"is due in {left:.0f} s" if left > 0 else f"is {-left:.0f} s late"
                what = f"{key} {when} and not submitted ({state})"
                yield _error(what, "see its page: phase and messages", slot=job.slot, task=key)
            elif state is TaskState.QUEUED and now - job.received_at > STARTING_S:
                what = f"{key} has waited for its node for {now - job.received_at:.0f} s"
                yield _warning(what, "look at the node's log", slot=job.slot, task=key)
        elif now - result.at < RECENT_S:
            yield from _of_result(key, result.status, result.reason, result.deadline_margin_s)


def _of_result(key: str, status: ResultStatus, reason: str, spare_s: float | None) -> Iterator[Alert]:
    if status in (ResultStatus.FAILED, ResultStatus.EXPIRED):
        do = "see its page; the same cause may end the next job"
        yield _warning(f"{key} {status}: {reason}"[:300], do, task=key)
    elif spare_s is not None and spare_s < 0:
        do = "raise deadline_margin_s or submit_reserve_s if this happens again"
        yield _warning(f"{key} was submitted {-spare_s:.0f} s after its deadline", do, task=key)


def _error(what: str, do: str, *, slot: str | None = None, task: str | None = None) -> Alert:
    return Alert(level=AlertLevel.ERROR, what=what, do=do, slot=slot, task=task)


def _warning(what: str, do: str, *, slot: str | None = None, task: str | None = None) -> Alert:
    return Alert(level=AlertLevel.WARNING, what=what, do=do, slot=slot, task=task)
