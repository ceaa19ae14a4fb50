"""Run one contest task: a submission that changes nothing, then better ones, until the time is over.

    untrained adapter -> the worker trains, started again when it dies -> early exports -> its own export

Every submission replaces the one before in one step, so SIGKILL at any moment leaves a complete one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from shared.errors import PodiumError
from shared.logs import get_logger
from shared.messages.offers import TaskType
from shared.settings import Settings
from shared.settings_sources import load_settings
from trainer_node.contest.arguments import ContestTask
from trainer_node.contest.best_submission import BestSubmission
from trainer_node.contest.devices import hardware_of
from trainer_node.contest.mounts import Mounts, mounts_of
from trainer_node.contest.submission import SubmissionFolder
from trainer_node.contest.training_run import STOP_S, TrainingRun
from trainer_node.contest.worker_jobs import Times, times_of, worker_job
from trainer_node.hardware import worker_threads

GIVEN: Final = ("PODIUM_HARDWARE", "PODIUM_THREADS")  # settings that a container's environment may change

log = get_logger()


async def run_task(task: ContestTask, started_at: float) -> list[str]:
    """Run a task; return what upstream would object to in the submission then, empty if it is valid."""
    mounts, times = mounts_of(task), times_of(task, started_at)
    folder = SubmissionFolder(mounts.submission, mounts.model)
    best = BestSubmission(folder, started_at)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        await asyncio.to_thread(best.begin, mounts.model, task.model)
        if task.trainable is None:
            log.error("the engine doesn't train this type of task", task_type=task.task_type)
        else:
            await train(task, task.trainable, mounts, times, best, stopping)
    except (PodiumError, OSError) as error:
        log.error("the run ends early", error=str(error))
    finally:
        await asyncio.to_thread(shutil.rmtree, mounts.work, ignore_errors=True)
    return await asyncio.to_thread(folder.objections)


async def train(
    task: ContestTask,
    task_type: TaskType,
    mounts: Mounts,
    times: Times,
    best: BestSubmission,
    stopping: asyncio.Event,
) -> None:
    """Train with the first profile, and with the next one if that can't be."""
    settings = settings_of(mounts, os.environ)
    await asyncio.to_thread(make_folders, mounts)
    hardware = await hardware_of(settings)
    log.info("hardware", device=hardware.device, count=hardware.count, bytes=hardware.memory_bytes)
    for number, profile in enumerate(task.profiles, 1):
        job = worker_job(task, task_type, mounts, times, hardware, worker_threads(settings), profile)
        run = TrainingRun(job, times, settings, best, len(task.profiles) - number)
        if not await run.follow(stopping):
            return


def make_folders(mounts: Mounts) -> None:
    """Remove what a killed container's run left, and make the folders that libraries expect."""
    shutil.rmtree(mounts.work, ignore_errors=True)
    for name in ("HOME", "TMPDIR"):
        Path(mounts.environment[name]).mkdir(parents=True, exist_ok=True)


def settings_of(mounts: Mounts, environment: Mapping[str, str]) -> Settings:
    """Return the settings that the parts of a node need here; the machine is one slot.

    Raises SettingsError if a variable can't be used.
    """
    return load_settings(
        {name: environment[name] for name in GIVEN if name in environment},
        data_dir=str(mounts.work),
        node_dir=str(mounts.work),
        slots=("contest",),
        slot="contest",
        stop_grace_s=STOP_S,
    )
