"""Build what /v1 answers: tasks and slots from ledger and presence, and the learned rates."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import msgspec
from msgspec import Struct

from gateway.learning.rates import DELIVERED, MEANINGS, LearnedRates, Table
from gateway.state.ledger import Ledger, Task, TaskState
from gateway.state.presence import Presence
from gateway.views.schemas import SlotView, TableView, TaskPage, TaskRecords, TaskView
from shared.messages.jobs import Job
from shared.messages.offers import TaskType
from shared.settings import Settings

# If two services differ in these, one of them breaks a promise of the other, or two gateways decide
# differently on the same offer.
AGREED_SETTINGS = (
    *("slots", "expected_hardware", "profile", "max_hours", "deadline_margin_s", "submit_reserve_s"),
    *("expire_after_s", "heartbeat_missing_s", "hang_s", "max_attempts", "log_max_bytes", "nats_replicas"),
    "artifacts_kind",
    *("policy", "prior_strength", "evidence_half_life_days", "min_points_per_hour"),
)


def agreed_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that all services must agree on, as JSON values."""
    named = {name: getattr(settings, name) for name in AGREED_SETTINGS}
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(named))
    return values


def task_view(task: Task, ledger: Ledger, presence: Presence, now: float) -> TaskView:
    """Return the view of one task now."""
    record, job, offer = task.record, task.job, task.record.offer
    chain = ledger.chain_of(record)
    claimed = chain.claimed
    return TaskView(
        task_id=record.task_id,
        task=record.task,
        slot=record.slot,
        state=ledger.state(task, now),
        decision=record.decision,
        model=offer.model if offer else None,
        task_type=offer.task_type if offer else None,
        hours_to_complete=offer.hours_to_complete if offer else None,
        received_at=record.received_at if isinstance(record, Job) else record.reserved_at,
        deadline_at=job.deadline_at if job else None,
        attempts=claimed.attempt if claimed else 0,
        node=claimed.node if claimed else None,
        epoch=claimed.epoch if claimed else None,
        progress=presence.progress(record.task),
        result=chain.result,
        damaged=chain.damaged,
    )


def task_records(task: Task, ledger: Ledger, presence: Presence, now: float) -> TaskRecords:
    """Return all that is stored of one task."""
    return TaskRecords(
        now=task_view(task, ledger, presence, now),
        reservation=task.reservation,
        job=task.job,
        chain=ledger.chain_of(task.record).records,
    )


class TaskFilter(Struct, frozen=True):
    """Which tasks are wanted; None matches all."""

    states: Set[TaskState] | None = None
    slot: str | None = None

    def holds(self, task: Task, ledger: Ledger, now: float) -> bool:
        """Return whether a task is wanted."""
        if self.slot is not None and task.record.slot != self.slot:
            return False
        return self.states is None or ledger.state(task, now) in self.states


ANY_TASK = TaskFilter()


def task_page(
    ledger: Ledger,
    presence: Presence,
    now: float,
    *,
    limit: int,
    after: int | None,
    wanted: TaskFilter = ANY_TASK,
) -> TaskPage:
    """Return up to `limit` wanted tasks that were accepted before the one with sequence `after`."""
    older = (task for task in ledger.tasks() if after is None or task.first < after)
    found = [task for task in older if wanted.holds(task, ledger, now)]
    page = found[:limit]
    views = [task_view(task, ledger, presence, now) for task in page]
    return TaskPage(views, page[-1].first if len(found) > limit else None)


def slot_view(slot: str, ledger: Ledger, presence: Presence, now: float) -> SlotView:
    """Return the view of one slot now."""
    holder = ledger.holder(slot, now)
    sign, age, live = presence.sign(slot), presence.age(slot), presence.live(slot)
    task = holder.record.task if holder else None
    heartbeat = sign.heartbeat if sign and sign.heartbeat and sign.heartbeat.task == task else None
    run = (presence.progress(task) or heartbeat) if task else None
    state = "free" if holder is None else "busy" if holder.job else "reserved"
    beat = sign.heartbeat if sign else None
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
        gpus=beat.gpus if beat else [],
        memory_total=beat.memory_total if beat else 0,
        memory_used=beat.memory_used if beat else 0,
        faults=beat.faults if beat else [],
        version=beat.version if beat else "",
        drain=ledger.drain_of(slot),
        damaged=ledger.chain_of(holder.record).damaged if holder else None,
    )


def table_views(tables: LearnedRates) -> dict[str, TableView]:
    """Return each table with the rate of every task type, or of every family with evidence."""
    views = {}
    for name, rate_of in MEANINGS.items():
        table: Table = getattr(tables, name)
        keys = set(table.learned) | (set() if name == "model_performance" else set(map(str, TaskType)))
        views[name] = TableView(rate_of, table.house, {key: table.rate(key) for key in sorted(keys)})
    pairs = {
        key: rate for key, rate in tables.delivery.learned.items() if rate.trials
    }  # with trials of their own
    views["delivery"] = TableView(DELIVERED, tables.delivery.house, pairs)
    return views
