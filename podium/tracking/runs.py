"""Where tracked runs come from: a gateway's tasks, or the folder of a `podium train`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from gateway.telemetry.run_history import missing, point_of
from gateway.views.run import LONGEST_CURVE, RunPoint, RunView, run_view
from gateway.views.schemas import TaskView
from podium.client import ENDED, Client
from podium.tracking.facts import Facts, job_facts, outcome_facts, plan_facts, result_facts, task_facts
from podium.tracking.rows import TrackedRow, result_row, rows_of, score_row
from shared.errors import PodiumError
from shared.messages.runs import (
    Outcome,
    OutcomeStatus,
    WorkerJob,
    decode_outcome,
    decode_progress,
    decode_worker_job,
)
from shared.subjects import task_key

NEWEST = 200  # tasks; a gateway keeps the course of so many runs
# After its result a run's course is complete: the gateway writes what it received every second. The result's
# time is the node's; the other two seconds are for clocks that differ (doctor warns from SKEW_S on).
SETTLED_S = 3.0

Stored = Callable[[str], Facts | None]  # a run's id -> its facts in the store; None: it has no such run


class RunUpdate(Struct, frozen=True, kw_only=True):
    """What is new of one run."""

    id: str
    name: str
    rows: list[TrackedRow]
    facts: Facts
    ended: bool


class _Seen(Struct):
    """What a store has of one run."""

    newest: float = 0.0  # time of the newest part of the course
    plan: Facts = {}
    facts: Facts = {}  # of the task
    ended: bool = False
    damaged: TaskView | None = None  # if nobody can read how it goes on


class GatewayRuns:
    """The newest tasks of a gateway, or those that are named.

    What it remembers saves requests only: without it, as after a restart, everything is read again, and the
    store drops the rows that it has.
    """

    def __init__(self, client: Client, tasks: Sequence[str] = ()) -> None:
        self._client = client
        self._tasks = sorted({task_key(task) for task in tasks})
        self._seen: dict[str, _Seen] = {}  # by run id

    def updates(self, stored: Stored) -> Iterator[RunUpdate]:
        """Yield what is new; it counts as stored when the next one is asked for. Raises PodiumError."""
        for task in [self._client.task(each) for each in self._tasks] or self._client.tasks(NEWEST):
            run_id, ended = id_of(task.task, task.received_at), has_ended(task, time.time())
            facts = task_facts(task) | (result_facts(task.result) if ended and task.result else {})
            if (seen := self._seen.get(run_id)) is None:
                kept = stored(run_id) or {}
                # A gateway may have lost the course since, and a store replaces all facts at once.
                seen = _Seen(plan={name: value for name, value in kept.items() if name.startswith("plan.")})
                if ended and facts.items() <= kept.items():
                    seen = self._seen[run_id] = _Seen(facts=facts, ended=True)
            if seen.ended and seen.facts == facts:
                continue
            # All of it at the end: a gateway that was down adds what it missed.
            course = self._client.progress(task.task, LONGEST_CURVE, 0.0 if ended else seen.newest)
            plan = seen.plan | plan_facts(course.messages)
            rows = rows_of(course, task.received_at) + (ending_rows(task) if ended else [])
            yield RunUpdate(id=run_id, name=task.task, rows=rows, facts=facts | plan, ended=ended)
            damaged = None if task.damaged is None else task
            self._seen[run_id] = _Seen(max(seen.newest, newest_of(course)), plan, facts, ended, damaged)

    def have_ended(self) -> bool:
        """Return whether all named tasks are stored, and ended or damaged; never if none is named."""
        over = sum(seen.ended or seen.damaged is not None for seen in self._seen.values())
        return bool(self._tasks) and over == len(self._tasks)

    def damaged(self) -> list[TaskView]:
        """Return the tasks of which nobody can read how they go on."""
        return [seen.damaged for seen in self._seen.values() if seen.damaged is not None]


class FolderRuns:
    """One run of `podium train`, by its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises PodiumError if the folder has no job."""
        self._folder = folder
        self._job = job_of(folder)
        self._newest = 0.0
        self._plan: Facts = {}
        self._ended = False

    def updates(self, stored: Stored) -> Iterator[RunUpdate]:
        """Yield what is new; it counts as stored when the next one is asked for. Raises PodiumError."""
        job, outcome = self._job, self._outcome()
        course = run_view(job.task, self._points(), LONGEST_CURVE, self._newest)
        ended = outcome is not None and outcome.status is not OutcomeStatus.STOPPED
        plan = self._plan | plan_facts(course.messages)
        facts, rows = job_facts(job) | plan, rows_of(course, job.start_at)
        if outcome is not None and ended:
            margin_s = job.ready_by - outcome.at if outcome.status is OutcomeStatus.READY else None
            facts |= outcome_facts(outcome, margin_s)
            rows.append(result_row(outcome.metrics, margin_s, outcome.at, job.start_at))
        run_id = id_of(job.task, job.start_at)
        yield RunUpdate(id=run_id, name=job.task, rows=rows, facts=facts, ended=ended)
        self._newest, self._plan, self._ended = max(self._newest, newest_of(course)), plan, ended

    def have_ended(self) -> bool:
        """Return whether the run has ended and is stored. One that was stopped can be resumed."""
        return self._ended

    def damaged(self) -> list[TaskView]:
        """Return nothing: a damaged file raises where it is read."""
        return []

    def _outcome(self) -> Outcome | None:
        path = self._folder / "outcome.json"
        try:
            return decode_outcome(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PodiumError(f"{path} can't be read: {error.strerror}") from error
        except ValueError as error:  # it is written in one step: no later look finds another
            raise PodiumError(f"{path} is no outcome of a run: {error}") from error

    def _points(self) -> list[RunPoint]:
        path = self._folder / "progress.jsonl"
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:  # the worker has not begun
            return []
        except OSError as error:
            raise PodiumError(f"{path} can't be read: {error.strerror}") from error
        points = []
        for line in lines:
            try:
                points.append(point_of(decode_progress(line)))
            except ValueError:  # half-written, or cut off by a kill
                continue
        return missing([], points)


def job_of(folder: Path) -> WorkerJob:
    """Return the job of a run's folder. Raises PodiumError without one."""
    path = folder / "job.json"
    try:
        return decode_worker_job(path.read_bytes())
    except OSError as error:
        what = f"{folder} is no folder of a `podium train`: {path.name} can't be read"
        raise PodiumError(f"{what} ({error.strerror})") from error
    except ValueError as error:
        raise PodiumError(f"{path} is no job of a `podium train`: {error}") from error


def id_of(name: str, began_at: float) -> str:
    """Return a run's id: a name may come again after a broker or a folder was emptied, with another time."""
    return f"{name}-{began_at:.3f}"


def newest_of(course: RunView) -> float:
    """Return the time of the newest part of a course; 0 without any."""
    parts = (course.development, course.phases, course.messages)
    return max((*course.curve.at, *(each.at for part in parts for each in part)), default=0.0)


def has_ended(task: TaskView, now: float) -> bool:
    """Return whether a task has ended, long enough ago that its course is complete."""
    return task.state in ENDED and (task.result is None or now - task.result.at >= SETTLED_S)


def ending_rows(task: TaskView) -> list[TrackedRow]:
    """Return the rows of a task's result and of its score."""
    rows: list[TrackedRow] = []
    if task.result is not None:
        rows.append(
            result_row(task.result.metrics, task.result.deadline_margin_s, task.result.at, task.received_at)
        )
    if task.score is not None:
        rows.append(score_row(task.score, task.received_at))
    return rows
