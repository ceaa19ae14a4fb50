"""`podium offer FILE`: check an offer, send it, print the decision with every term."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.markup import escape
from rich.table import Table

from podium.client import Refusal, find_gateway
from podium.commands.up import EXAMPLES
from podium.console import make_console
from shared.errors import PodiumError
from shared.messages import DatasetType, Decision, FileFormat, Offer, TaskType, Terms

REFUSED = 3  # exit code: the offer is valid and was rejected


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `offer` to the command line."""
    parser = subparsers.add_parser("offer", help="check an offer and send it", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the offer, one JSON object")
    parser.add_argument("--url", help="the gateway's URL (default: from the settings)")
    parser.add_argument("--task-id", help="use this task id instead of the file's")
    parser.add_argument("--check", action="store_true", help="only check the file, send nothing")
    parser.add_argument("--json", action="store_true", help="print the decision as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, send, print. Exit codes: 0 = accepted, 1 = invalid or not delivered, 3 = rejected."""
    offer = read_offer(args.file)
    if args.task_id:
        offer = msgspec.structs.replace(offer, task_id=args.task_id)
    note = check_data(offer)
    if not args.json:
        print(f"{args.file}: {note}")
    if args.check:
        return 0
    answer = find_gateway(args.url).offer(msgspec.json.encode(offer))
    if isinstance(answer, Refusal):
        raise PodiumError(f"the gateway answered {answer.status}: {answer.detail}")
    if args.json:
        print(msgspec.json.encode(answer).decode())
    else:
        show(answer)
    return 0 if answer.accepted else REFUSED


def read_offer(path: Path) -> Offer:
    """Read the offer in a file. Raises PodiumError that names the error and its place."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PodiumError(f"{path} can't be read: {error.strerror}") from error
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise PodiumError(f"{path} is not JSON: {error}") from error
    if isinstance(fields, dict) and (unknown := sorted(fields.keys() - set(Offer.__struct_fields__))):
        known = ", ".join(Offer.__struct_fields__)
        raise PodiumError(f"{path}: unknown field {', '.join(unknown)}; an offer has {known}")
    try:
        return msgspec.convert(fields, Offer)
    except msgspec.ValidationError as error:
        raise PodiumError(f"{path} is not an offer: {error}") from error


def check_data(offer: Offer) -> str:
    """Check the offer's data if it is on this machine; return what was checked.

    Raises PodiumError if columns that the task type needs are not named, or are not in the first row.
    """
    columns = named_columns(offer.task_type, offer.dataset_type)
    path = local_file(offer.dataset)
    if offer.file_format is FileFormat.HF or "://" in offer.dataset:
        return f"data not checked, the trainer fetches it: {offer.dataset}"
    if path is None:
        return f"data not checked, it is not on this machine: {offer.dataset}"
    if offer.file_format is FileFormat.PARQUET:
        return f"data not checked, only the trainer reads Parquet: {path}"
    row = first_row(path, offer.file_format)
    if missing := [column for column in columns if column not in row]:
        raise PodiumError(
            f"{path}: the first row has no column {', '.join(missing)}; it has {', '.join(row)}"
        )
    return f"data {path} has the columns {', '.join(columns)}" if columns else f"data {path} is readable"


def named_columns(task_type: TaskType, names: DatasetType) -> list[str]:
    """Return the data columns an offer names. Raises PodiumError if a required one is missing."""
    needed: dict[TaskType, tuple[str, ...]] = {
        TaskType.INSTRUCT: ("field_instruction",),
        TaskType.DPO: ("field_prompt", "field_chosen", "field_rejected"),
    }
    if task_type is TaskType.INSTRUCT and names.field:
        return [names.field]
    for field in needed.get(task_type, ()):
        if not getattr(names, field):
            raise PodiumError(f"an offer of type {task_type} must name {field} in dataset_type")
    fields = (
        *("field_system", "field_instruction", "field_input", "field_output"),
        *("field_prompt", "field_chosen", "field_rejected", "chat_column"),
    )
    return [column for field in fields if (column := getattr(names, field))]


def local_file(dataset: str) -> Path | None:
    """Return the data file if it is on this machine: a local path, or one of the examples."""
    if "://" in dataset:
        return None
    candidates = (Path(dataset).expanduser(), EXAMPLES / dataset)
    return next((path for path in candidates if path.is_file()), None)


def first_row(path: Path, file_format: FileFormat) -> dict[str, Any]:
    """Return the first row of a JSON, JSONL or CSV file. Raises PodiumError if there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: Iterable[Any]
            if file_format is FileFormat.CSV:
                rows = csv.DictReader(file)
            elif file_format is FileFormat.JSONL:
                rows = (json.loads(line) for line in file if line.strip())
            else:
                rows = json.load(file)
            if not isinstance(rows, Iterable) or isinstance(rows, (dict, str)):
                raise PodiumError(f"{path} is not a JSON array of objects")
            row = next(iter(rows), None)
    except OSError as error:
        raise PodiumError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise PodiumError(f"{path} is not {file_format}: {error}") from error
    if row is None:
        raise PodiumError(f"{path} has no rows")
    if not isinstance(row, dict):
        raise PodiumError(f"{path}: the first row is not an object")
    return row


def show(decision: Decision) -> None:
    """Print a decision and its terms."""
    console = make_console()
    word = "[green]accepted[/]" if decision.accepted else "[red]rejected[/]"
    console.print(f"{word}: {escape(decision.reason)}", soft_wrap=True)
    if decision.accepted and decision.deadline_at is not None:
        left = decision.deadline_at - time.time()
        console.print(f"task {decision.task} on slot {decision.slot}, due in {left / 3600:.2f} hours")
    if decision.terms is not None:
        console.print(terms_table(decision.terms))


def terms_table(terms: Terms) -> Table:
    """Return a table with one row per term of the score."""
    table = Table("term", "value", "x weight", "because", box=None)
    for name in terms.__struct_fields__:
        term = getattr(terms, name)
        table.add_row(name, f"{term.value:.3f}", f"{term.weight:.2f}", escape(term.cause))
    return table
