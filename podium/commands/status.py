"""`podium status`: show the current state of slots and tasks."""

from __future__ import annotations

import argparse

import msgspec
from rich.markup import escape
from rich.table import Table

from gateway.views.schemas import SlotView, TaskView
from podium.arguments import add_url, examples, positive
from podium.client import find_gateway
from podium.commands.watch import deadline, task_state
from podium.console import make_console


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `status` to the command line."""
    parser = subparsers.add_parser(
        "status",
        help="show slots and tasks",
        description=__doc__,
        epilog=examples("podium status", "podium status --limit 3", "podium status --json"),
    )
    add_url(parser)
    parser.add_argument(
        "--limit", type=positive, default=10, help="tasks to show, newest first (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: slots and tasks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print both tables; exit code 1 if the gateway can't be reached."""
    client = find_gateway(args.url)
    slots, tasks = client.slots(), client.tasks(args.limit)
    if args.json:
        print(msgspec.json.encode({"slots": slots, "tasks": tasks}).decode())
        return 0
    console = make_console()
    console.print(slots_table(slots))
    console.print(tasks_table(tasks))
    return 0


def slots_table(slots: list[SlotView]) -> Table:
    """Return a table with one row per slot."""
    table = Table(
        "slot", "state", "node", "hardware", "task", "phase", "step", "last seen", title="slots", box=None
    )
    for slot in slots:
        age = slot.last_heartbeat_age_s
        table.add_row(
            slot.slot,
            state_of(slot),
            (slot.node or "-") if slot.live else "[red]not seen[/]",
            slot.hardware.name if slot.hardware else "-",
            slot.task or "-",
            slot.phase or "-",
            "-" if slot.step is None else str(slot.step),
            "never" if age is None else f"{age:.0f} s ago",
        )
    return table


def state_of(slot: SlotView) -> str:
    """Return a slot's state, with an operator's drain."""
    if slot.drain is None:
        return slot.state
    return "drained" if slot.state == "free" else f"{slot.state}, draining"


def tasks_table(tasks: list[TaskView]) -> Table:
    """Return a table with one row per task."""
    table = Table(
        "task", "slot", "state", "attempts", "loss", "deadline", "artifact or reason", title="tasks", box=None
    )
    for task in tasks:
        result = task.result
        outcome = (result.artifact or result.reason) if result else task.damaged or ""
        table.add_row(
            task.task,
            task.slot,
            task_state(task),
            str(task.attempts),
            _loss(task),
            deadline(task),
            escape(outcome),
        )
    return table


def _loss(task: TaskView) -> str:
    if task.result is not None and task.result.metrics is not None:
        final = task.result.metrics.final_loss
        return f"{task.result.metrics.base_loss:.3f} -> {'not measured' if final is None else f'{final:.3f}'}"
    progress = task.progress
    return "" if progress is None or progress.loss is None else f"{progress.loss:.3f}"
