"""The check of open jobs: which are stuck, and what to do. Pure, like checks.py."""

from __future__ import annotations

from gateway.state.ledger import TaskState
from podium.diagnostics.findings import Found, Problem, Severity, live
from podium.diagnostics.probe import OpenJob, Vitals
from shared.messages.jobs import Submitting
from shared.messages.slots import Heartbeat

QUEUED_S = 30.0  # a node receives a job at once, and polls every 5 s
SUBMITTING_S = 600.0
EXPIRY_S = 60.0  # gateways check every 5 s


def check_jobs(vitals: Vitals) -> Found:
    """Check that every job without a result makes progress."""
    if vitals.read_error is not None:
        return [(Severity.NOTE, "jobs are unknown while the logs can't be read", "")]
    holders, found = live(vitals), Found()
    for job in vitals.jobs:
        trouble = _stuck(vitals, job, holders.get(job.job.slot)) or _unread(job)
        if trouble is not None:
            severity, what, do = trouble
            found.append((severity, f"{job.job.task} ({job.state} on slot {job.job.slot}): {what}", do))
    return found


def _stuck(vitals: Vitals, job: OpenJob, node: Heartbeat | None) -> Problem | None:
    """Return the worst finding about one open job."""
    if job.chain.damaged is not None:
        what = f"the newest record of its states can't be read: {job.chain.damaged}"
        do = f"`podium cancel {job.job.task}`, unless it is being submitted; see docs/operations.md"
        return Severity.ERROR, what, do
    over_s = vitals.now - job.job.deadline_at
    overdue = f"its deadline passed {over_s:.0f} s ago"
    if over_s > vitals.settings.expire_after_s + EXPIRY_S and job.state is not TaskState.SUBMITTING:
        return Severity.ERROR, overdue, "no gateway has expired it: is one running?"
    if node is None:
        do = f"start the node of slot {job.job.slot}: it resumes the job or adopts its worker"
        return Severity.ERROR, "no node of its slot sends heartbeats; a worker may still be training", do
    if over_s > 0:
        do = f"its node submits what it has: `podium jobs inspect {job.job.task}`"
        return Severity.WARNING, overdue, do
    if job.state is TaskState.SUBMITTING:
        return _slow_submission(vitals, job)
    waited_s = vitals.now - job.job.received_at
    if job.state is TaskState.QUEUED and waited_s > QUEUED_S:
        what = f"its node is live but has not claimed it for {waited_s:.0f} s"
        return Severity.ERROR, what, "see the node's log"
    if job.state is TaskState.RUNNING:
        return _not_running(vitals, job, node)
    return None


def _slow_submission(vitals: Vitals, job: OpenJob) -> Problem | None:
    moments = [each.record.at for each in job.chain.records if isinstance(each.record, Submitting)]
    since = _since(vitals.now, moments)
    if since is None or since <= SUBMITTING_S:
        return None
    return Severity.WARNING, f"submitting for {since:.0f} s", "see the node's log: is the store full?"


def _not_running(vitals: Vitals, job: OpenJob, node: Heartbeat) -> Problem | None:
    """Return why a job that is said to run makes no progress."""
    task, hang_s = job.job.task, vitals.settings.hang_s
    if node.task != task:
        what = f"its node works on {node.task or 'no task'}"
        return Severity.WARNING, what, "if this persists, see the node's log"
    if job.unread is not None:
        return None
    reports = [each.record.at for each in job.chain.records] + [job.progress_at or 0.0]
    silent = _since(vitals.now, reports)
    if silent is None or silent <= hang_s / 2:
        return None
    severity = Severity.ERROR if silent > hang_s else Severity.WARNING
    do = f"its node kills it after {hang_s:g} s; `podium jobs requeue {task}` does it now"
    return severity, f"no progress for {silent:.0f} s", do


def _unread(job: OpenJob) -> Problem | None:
    if job.unread is None:
        return None
    do = "its node writes the next one in a second; if this stays, see that all run the same version"
    return Severity.WARNING, f"its newest progress can't be read: {job.unread}", do


def _since(now: float, moments: list[float]) -> float | None:
    newest = max(moments, default=0.0)
    return now - newest if newest else None
