"""A contest task as the engine's job. Pure."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from shared.messages.hardware import Hardware
from shared.messages.offers import FileFormat, TaskType
from shared.messages.runs import Scorer, WorkerJob
from trainer_node.contest.arguments import ContestTask
from trainer_node.contest.mounts import Mounts

HOUR_S: Final = 3600.0
# What the engine's end may come late by, and the rename. Nothing is kept for storing: upstream takes what is
# there after the kill.
MARGIN_S, MARGIN_SHARE = 10.0, 0.02
CHECKPOINT_S, CHECKPOINT_SHARE = 60.0, 0.02  # the first one is the first trained submission


class Times(Struct, frozen=True):
    """When the container's time began, when the result must be on disk, and when upstream kills."""

    started_at: float
    ready_by: float
    killed_at: float


def times_of(task: ContestTask, started_at: float) -> Times:
    """Return the times of a task whose container was started then."""
    seconds = task.hours * HOUR_S
    margin = min(MARGIN_S, MARGIN_SHARE * seconds)
    return Times(started_at, started_at + seconds - margin, started_at + seconds)


def worker_job(
    task: ContestTask,
    task_type: TaskType,
    mounts: Mounts,
    times: Times,
    hardware: Hardware,
    threads: int,
    profile: str,
) -> WorkerJob:
    """Return all that the engine's worker needs to know."""
    seconds = times.killed_at - times.started_at
    return WorkerJob(
        task_id=task.task_id,
        task=task.task_id,
        slot="contest",
        task_type=task_type,
        model=task.model,
        model_path=str(mounts.model),
        dataset=str(mounts.data),
        file_format=FileFormat.JSON,
        dataset_type=task.dataset_type,
        start_at=times.started_at,
        ready_by=times.ready_by,
        hardware=hardware,
        profile=profile,
        checkpoint_interval_s=min(CHECKPOINT_S, CHECKPOINT_SHARE * seconds),
        threads=threads,
        memory_share=1.0,
        scorer=Scorer.CONTESTS,
        kl_coefficient=task.kl_coefficient or 0.0,
    )
