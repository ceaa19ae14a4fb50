"""`podium jobs`: list accepted tasks; inspect, cancel or requeue one."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.views.schemas import ChainRecord, TaskRecords, TaskState
from podium.arguments import add_commands, add_url, examples, positive
from podium.client import Client, find_gateway
from podium.commands.offer import terms_table
from podium.commands.status import tasks_table
from podium.commands.watch import deadline, line
from podium.console import make_console
from shared.messages.jobs import Claimed, Moved, StateRecord, Submitting
from shared.messages.runs import Metrics

OPERATIONS = {
    "cancel": "end a task as cancelled, unless it has a result or is being submitted",
    "requeue": "end a job's worker and restart it from its newest checkpoint; attempts count from 1 again",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `jobs` and its own commands to the command line."""
    commands = add_commands(
        subparsers,
        "jobs",
        "list, inspect, cancel and requeue jobs",
        __doc__,
        "podium jobs list --state queued,running",
        "podium jobs inspect wordnet-nouns-1",
    )
    parser = commands.add_parser(
        "list",
        help="list accepted tasks, newest first",
        epilog=examples("podium jobs list", "podium jobs list --slot a --state failed,expired --json"),
    )
    states = ", ".join(TaskState)
    parser.add_argument("--state", default="", help=f"only tasks in these states, comma-separated: {states}")
    parser.add_argument("--slot", help="only tasks of this slot")
    parser.add_argument(
        "--limit", type=positive, default=50, help="maximum number of tasks (default: %(default)s)"
    )
    parser.set_defaults(run=run_list)
    parser = commands.add_parser(
        "inspect",
        help="show everything that is stored about one task",
        epilog=examples("podium jobs inspect wordnet-nouns-1"),
    )
    parser.add_argument("task", metavar="TASK", help="the task's id")
    parser.set_defaults(run=run_inspect)
    for parser in commands.choices.values():
        _add_output(parser)
    for name in OPERATIONS:
        add_operation(commands, name, f"podium jobs {name}")


def add_operation(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: str
) -> None:
    """Add `cancel` or `requeue`, which are commands of their own and of `jobs`."""
    words = OPERATIONS[name]
    example = examples(f'{command} wordnet-nouns-1 --reason "wrong data"')
    parser = commands.add_parser(name, help=words, description=words, epilog=example)
    parser.add_argument("task", metavar="TASK", help="the task's id")
    parser.add_argument("--reason", default="", help="stored with the operation")
    _add_output(parser)
    parser.set_defaults(run=run_operation, operation=name)


def _add_output(parser: argparse.ArgumentParser) -> None:
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="print the gateway's answer as JSON")


def run_list(args: argparse.Namespace) -> int:
    """Print tasks; exit code 1 if the gateway can't be reached."""
    tasks = _client(args).tasks(args.limit, states=args.state, slot=args.slot)
    if args.json:
        print(msgspec.json.encode(tasks).decode())
    else:
        make_console().print(tasks_table(tasks))
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print one task's history; exit code 1 if there is no such task."""
    records = _client(args).records(args.task)
    if args.json:
        print(msgspec.json.encode(records).decode())
    else:
        show(make_console(), records)
    return 0


def run_operation(args: argparse.Namespace) -> int:
    """Cancel or requeue; exit code 1 and the reason if it is refused."""
    client = _client(args)
    operation = client.cancel if args.operation == "cancel" else client.requeue
    task = operation(args.task, args.reason)
    if args.json:
        print(msgspec.json.encode(task).decode())
    elif args.operation == "cancel":
        print(f"{task.task} is cancelled; slot {task.slot} is free, and its node ends the worker")
    else:
        print(f"{task.task} restarts on slot {task.slot} (attempt {task.attempts}, node {task.node})")
    return 0


def show(console: Console, records: TaskRecords) -> None:
    """Print the history of one task: its state, why it was accepted, and what happened when."""
    now, job = records.now, records.job
    console.print(line(now), markup=False, highlight=False, soft_wrap=True)
    console.print(_facts(records))
    console.print(f"\ndecision: {escape(now.decision.reason)}", soft_wrap=True)
    if now.decision.terms is not None:
        console.print(terms_table(now.decision.terms))
    console.print()
    console.print(_history(records))
    result = now.result
    if result is not None and result.metrics is not None:
        console.print(f"\nmeasured: {_measured(result.metrics)}", soft_wrap=True)
    if job is not None and result is None:
        console.print(f"\n{deadline(now)}; the model is {escape(job.offer.model)}", soft_wrap=True)


def _facts(records: TaskRecords) -> Table:
    now, job = records.now, records.job
    table = Table(box=None, show_header=False)
    rows = [("task", f"{now.task_id} (key {now.task})"), ("slot", now.slot), ("state", now.state)]
    if job is not None:
        offer = job.offer
        rows += [
            ("job", f"{offer.task_type} of {offer.model}, {offer.hours_to_complete:g} hours"),
            ("data", f"{offer.dataset} ({offer.file_format})"),
            ("accepted", f"{_moment(job.received_at)} by gateway {job.gateway} (record {job.record_id})"),
            ("deadline", _moment(job.deadline_at)),
        ]
    if records.reservation is not None:
        rows.append(("reserved", f"until {_moment(records.reservation.expires_at)}"))
    if now.damaged is not None:
        rows.append(("damaged", f"the newest record can't be read: {now.damaged}"))
    if now.node is not None:
        rows.append(("node", f"{now.node}, epoch {now.epoch}, attempt {now.attempts}"))
    if now.progress is not None:
        age = time.time() - now.progress.at
        rows.append(("progress", f"{now.progress.phase}, step {now.progress.step}, reported {age:.0f} s ago"))
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _history(records: TaskRecords) -> Table:
    """Return the stored records, oldest first, with the broker's time."""
    table = Table("stored", "sequence", "record", "node", "epoch", "what", box=None)
    if records.job is not None:
        table.add_row(_moment(records.job.decision.decided_at), "", "job", "", "", f"slot {records.job.slot}")
    for each in records.chain:
        record = each.record
        table.add_row(
            _stored(each),
            str(each.sequence),
            type(record).__name__.lower(),
            record.node or "a gateway",
            str(record.epoch) if record.epoch else "",
            escape(_details(record)),
        )
    return table


def _details(record: StateRecord) -> str:
    if isinstance(record, Claimed):
        return f"attempt {record.attempt} from step {record.step}"
    if isinstance(record, Submitting):
        return record.digest
    if isinstance(record, Moved):
        return f"off slot {record.slot}: {record.reason}"
    parts = [f"{record.status} ({record.code})" if record.code else str(record.status), record.reason]
    if record.artifact is not None:
        parts.append(record.artifact)
    if record.deadline_margin_s is not None:
        parts.append(f"{record.deadline_margin_s:.0f} s to spare")
    return ", ".join(filter(None, parts))


def _measured(metrics: Metrics) -> str:
    final = "not measured" if metrics.final_loss is None else f"{metrics.final_loss:.4f}"
    dropped = sum(metrics.dropped_rows.values())
    skipped = f", {metrics.skipped_steps} steps skipped" if metrics.skipped_steps else ""
    return (
        f"loss {metrics.base_loss:.4f} -> {final} on {metrics.dev_examples} held-out rows; {metrics.steps} "
        f"steps, {metrics.tokens} tokens, {metrics.epochs:.2f} epochs, {metrics.resumes} resumes, {dropped} "
        f"rows dropped{skipped}"
    )


def _stored(each: ChainRecord) -> str:
    return f"{each.stored.replace('T', ' ')[:23]} UTC" if each.stored else _moment(each.record.at)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "milliseconds").replace("+00:00", " UTC")


def _client(args: argparse.Namespace) -> Client:
    return find_gateway(args.url)
