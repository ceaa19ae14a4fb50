"""The check of open jobs: which are stuck, and what to do. Pure, like checks.py."""

from __future__ import annotations

from gateway.state.ledger import TaskState
from podium.diagnostics.findings import Found, Severity, live
from podium.diagnostics.probe import OpenJob, Vitals
from shared.messages import Heartbeat, Submitting

QUEUED_S = 30.0  # a node receives a job at once, and polls every 5 s
SUBMITTING_S = 600.0
EXPIRY_S = 60.0  # gateways check every 5 s


def check_jobs(vitals: Vitals) -> Found:
    """Check that every job without a result makes progress."""
    if vitals.read_error is not None:
        return [(Severity.NOTE, "jobs are unknown while the logs can't be read", "")]
    holders, found = live(vitals), Found()
    for job in vitals.jobs:
        trouble = _stuck(vitals, job, holders.get(job.job.slot))
        if trouble is not None:
            severity, what, do = trouble
            found.append((severity, f"{job.job.task} ({job.state} on slot {job.job.slot}): {what}", do))
    return found


def _stuck(vitals: Vitals, job: OpenJob, node: Heartbeat | None) -> tuple[Severity, str, str] | None:
    """Return the worst finding about one open job."""
    settings, task = vitals.settings, job.job.task
    over_s = vitals.now - job.job.deadline_at
    inspect = f"`podium jobs inspect {task}`"
    if over_s > settings.expire_after_s + EXPIRY_S and job.state is not TaskState.SUBMITTING:
        return (
            Severity.ERROR,
            f"its deadline passed {over_s:.0f} s ago",
            "no gateway has expired it: is one running?",
        )
    if node is None:
        do = f"start the node of slot {job.job.slot}: it resumes the job or adopts its worker"
        return Severity.ERROR, "no node of its slot sends heartbeats; a worker may still be training", do
    if over_s > 0:
        return (
            Severity.WARNING,
            f"its deadline passed {over_s:.0f} s ago",
            f"its node submits what it has: {inspect}",
        )
    if job.state is TaskState.SUBMITTING:
        since = _since(
            vitals.now, [each.record.at for each in job.chain.records if isinstance(each.record, Submitting)]
        )
        if since is not None and since > SUBMITTING_S:
            return (
                Severity.WARNING,
                f"submitting for {since:.0f} s",
                "see the node's log: is the store full?",
            )
        return None
    waited = vitals.now - job.job.received_at
    if job.state is TaskState.QUEUED and waited > QUEUED_S:
        return (
            Severity.ERROR,
            f"its node is live but has not claimed it for {waited:.0f} s",
            "see the node's log",
        )
    if node.task != task and job.state is TaskState.RUNNING:
        return (
            Severity.WARNING,
            f"its node works on {node.task or 'no task'}",
            "if this persists, see the node's log",
        )
    reports = [each.record.at for each in job.chain.records] + [job.progress_at or 0.0]
    silent = _since(vitals.now, reports)
    if job.state is TaskState.RUNNING and silent is not None and silent > settings.hang_s / 2:
        severity = Severity.ERROR if silent > settings.hang_s else Severity.WARNING
        do = f"its node kills it after {settings.hang_s:g} s; `podium jobs requeue {task}` does it now"
        return severity, f"no progress for {silent:.0f} s", do
    return None


def _since(now: float, moments: list[float]) -> float | None:
    newest = max(moments, default=0.0)
    return now - newest if newest else None
