"""Tasks and slots as the API shows them: ledger and presence joined."""

from __future__ import annotations

from msgspec import Struct

from gateway.ledger import Ledger, Task, TaskState
from gateway.presence import Presence
from shared.messages import Decision, Hardware, Job, Phase, Progress, Result, TaskType


class TaskView(Struct, frozen=True, kw_only=True):
    """One accepted task."""

    task_id: str
    task: str  # its token
    slot: str
    state: TaskState
    decision: Decision
    model: str | None  # none while it is only reserved
    task_type: TaskType | None
    hours_to_complete: float | None
    received_at: float
    deadline_at: float | None
    attempts: int
    node: str | None
    epoch: int | None
    progress: Progress | None
    result: Result | None


class TaskPage(Struct, frozen=True):
    """Tasks, newest first; `next` is the `after` of the next page, or null."""

    tasks: list[TaskView]
    next: int | None


class SlotView(Struct, frozen=True, kw_only=True):
    """One slot: what the logs say of it, and what its node says."""

    slot: str
    state: str  # free, reserved or busy
    live: bool
    hardware: Hardware | None
    node: str | None
    epoch: int | None
    task: str | None  # the token of the job or reservation that keeps it busy
    phase: Phase | None
    step: int | None
    last_heartbeat_age_s: float | None


def task_view(task: Task, ledger: Ledger, presence: Presence, now: float) -> TaskView:
    """One task at this moment."""
    record, job = task.record, task.job
    chain = ledger.chain_of(record)
    claimed = chain.claimed
    return TaskView(
        task_id=record.task_id,
        task=record.task,
        slot=record.slot,
        state=ledger.state(task, now),
        decision=record.decision,
        model=job.offer.model if job else None,
        task_type=job.offer.task_type if job else None,
        hours_to_complete=job.offer.hours_to_complete if job else None,
        received_at=record.received_at if isinstance(record, Job) else record.reserved_at,
        deadline_at=job.deadline_at if job else None,
        attempts=claimed.attempt if claimed else 0,
        node=claimed.node if claimed else None,
        epoch=claimed.epoch if claimed else None,
        progress=presence.progress(record.task),
        result=chain.result,
    )


def task_page(ledger: Ledger, presence: Presence, now: float, *, limit: int, after: int | None) -> TaskPage:
    """Up to `limit` tasks that were accepted before the one with sequence `after`."""
    found = [task for task in ledger.tasks() if after is None or task.first < after]
    page = found[:limit]
    views = [task_view(task, ledger, presence, now) for task in page]
    return TaskPage(views, page[-1].first if len(found) > limit else None)


def slot_view(slot: str, ledger: Ledger, presence: Presence, now: float) -> SlotView:
    """One slot at this moment."""
    holder = ledger.holder(slot, now)
    sign, age, live = presence.sign(slot), presence.age(slot), presence.live(slot)
    task = holder.record.task if holder else None
    heartbeat = sign.heartbeat if sign and sign.heartbeat and sign.heartbeat.task == task else None
    run = (presence.progress(task) or heartbeat) if task else None
    state = "free" if holder is None else "busy" if holder.job else "reserved"
    return SlotView(
        slot=slot,
        state=state,
        live=live,
        hardware=sign.hardware if sign else None,
        node=sign.node if sign else None,
        epoch=sign.epoch if sign else None,
        task=task,
        phase=run.phase if run else None,
        step=run.step if run else None,
        last_heartbeat_age_s=round(age, 3) if age is not None else None,
    )
