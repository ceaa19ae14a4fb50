"""`podium watch`: show the live progress of all tasks, or of the named ones until they end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from types import MappingProxyType

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from gateway.views.schemas import TaskView
from podium.arguments import add_url, examples
from podium.client import (
    ENDED,
    Client,
    GatewayAwayError,
    NotFoundError,
    find_gateway,
    is_over,
    refuse_damaged,
)
from podium.console import make_console
from podium.sparkline import sparkline
from shared.messages.runs import Phase
from shared.subjects import task_key

POLL_S = 1.0
CURVE_WIDTH = 16  # columns


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `watch` to the command line."""
    parser = subparsers.add_parser(
        "watch",
        help="follow progress",
        description=__doc__,
        epilog=examples("podium watch", "podium watch my-task", "podium watch --json my-task"),
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="task ids; exit when all of them have ended")
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON line for each change of a task")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Follow until Ctrl-C, or until all named tasks have ended; exit code 1 if one was not submitted.

    Raises PodiumError if the states of a named task are damaged.
    """
    client, wanted = find_gateway(args.url), {task_key(task) for task in args.tasks}
    connected, console = False, make_console()
    with ChangeLines() if args.json else WatchView(console) as view:
        while True:
            try:
                tasks, connected = client.tasks(), True
                shown = named(client, wanted, tasks) if wanted else tasks[:10]
            except GatewayAwayError as error:  # wait for a gateway that has answered before
                if not connected:
                    raise
                print(f"waiting: {error}", file=sys.stderr)
                time.sleep(POLL_S)
                continue
            view.update(shown)
            if wanted and len(shown) == len(wanted) and all(is_over(task) for task in shown):
                refuse_damaged(shown)
                return 0 if all(task.state == "submitted" for task in shown) else 1
            time.sleep(POLL_S)


def named(client: Client, wanted: Set[str], newest: Iterable[TaskView]) -> list[TaskView]:
    """Return those of the wanted tasks that were accepted, however long ago. Raises PodiumError."""
    found = [task for task in newest if task.task in wanted]
    for key in sorted(wanted - {task.task for task in found}):
        with suppress(NotFoundError):  # it may be offered yet
            found.append(client.task(key))
    return found


class ChangeLines:
    """The changes of some tasks as JSON lines: each is a task as `GET /v1/tasks/{id}` shows it."""

    def __init__(self) -> None:
        self._printed: dict[str, TaskView] = {}

    def __enter__(self) -> ChangeLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, tasks: list[TaskView]) -> None:
        """Print the tasks that have changed, the oldest first."""
        for task in reversed(tasks):
            if self._printed.get(task.task) != task:
                self._printed[task.task] = task
                print(msgspec.json.encode(task).decode(), flush=True)


class WatchView:
    """Progress of some tasks: redrawn in place on a terminal, else one line per phase and per 10%."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._printed: dict[str, tuple[object, ...]] = {}
        self._losses: dict[str, list[float]] = {}

    def __enter__(self) -> WatchView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, tasks: list[TaskView]) -> None:
        """Show the current state of the tasks."""
        if self._live is not None:
            for task in tasks:
                self._note_loss(task)
            self._live.update(drawn(tasks, self._losses), refresh=True)
            return
        for task in tasks:
            progress = task.progress
            tenth = int(progress.progress * 10) if progress else 0
            news = (task.state, task.damaged, progress.phase if progress else None, tenth)
            if self._printed.get(task.task) != news:
                self._printed[task.task] = news
                self.console.print(line(task), markup=False, highlight=False, soft_wrap=True)

    def _note_loss(self, task: TaskView) -> None:
        """Note a new loss of a training run: the curve begins when the watching does."""
        loss, losses = _loss_of(task), self._losses.setdefault(task.task, [])
        if loss is not None and (not losses or losses[-1] != loss):
            losses.append(loss)


def drawn(
    tasks: Iterable[TaskView], losses: Mapping[str, Sequence[float]] = MappingProxyType({})
) -> RenderableType:
    """Return a table with a progress bar and the curve of the loss per task."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("slot", "task", "state", "", "", "step", "loss", "", "tokens/s", "deadline"):
        table.add_column(column)
    for task in tasks:
        progress = task.progress
        done = task.state in ENDED
        share = 1.0 if done else progress.progress if progress else 0.0
        table.add_row(
            task.slot,
            task.task,
            task_state(task) if done or progress is None else f"{task_state(task)}: {progress.phase}",
            ProgressBar(total=1.0, completed=share, width=20),
            f"{share:4.0%}",
            str(progress.step) if progress else "",
            _number(progress.loss, ".3f") if progress else "",
            sparkline(losses.get(task.task, ()), CURVE_WIDTH),
            _number(progress.tokens_per_s, ".0f") if progress else "",
            deadline(task),
        )
    return Group(table)


def _loss_of(task: TaskView) -> float | None:
    progress = task.progress
    return progress.loss if progress is not None and progress.phase is Phase.TRAIN else None


def line(task: TaskView) -> str:
    """Return one task as one line."""
    parts = [f"slot {task.slot}", task.task, task_state(task)]
    progress = task.progress
    if progress is not None and task.state not in ENDED:
        parts += [f"{progress.phase} {progress.progress:.0%}", f"step {progress.step}"]
        if progress.phase is Phase.TRAIN:
            parts += [
                f"loss {_number(progress.loss, '.3f')}",
                f"{_number(progress.tokens_per_s, '.0f')} tokens/s",
            ]
        if progress.message:
            parts.append(progress.message)
    if task.result is not None:
        parts.append(task.result.artifact or task.result.reason)
    return "  ".join(filter(None, (*parts, deadline(task))))


def task_state(task: TaskView) -> str:
    """Return a task's state, and whether it is stuck there because its newest record can't be read."""
    return task.state if task.damaged is None else f"{task.state}, damaged"


def deadline(task: TaskView) -> str:
    """Return the time left, or the time that was left when the submission was stored."""
    if task.result is not None:
        spare = task.result.deadline_margin_s
        return f"{spare:.0f} s to spare" if spare is not None else ""
    if task.deadline_at is None:
        return ""
    return f"due in {max(0.0, task.deadline_at - time.time()):.0f} s"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
