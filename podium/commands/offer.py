"""`podium offer FILE`: check an offer, send it, print the decision with every term."""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from podium.arguments import add_url, examples, nearest
from podium.client import Refusal, find_gateway
from podium.commands.up import EXAMPLES
from podium.console import make_console
from podium.dataset_type import refuse_unknown
from shared.errors import PodiumError
from shared.messages.offers import Decision, FileFormat, Offer, Terms
from trainer_node.engine.data.columns import asked_columns
from trainer_node.engine.data.formats.readers import DataFile
from trainer_node.engine.data.job_rows import read_job_rows

REFUSED = 3  # exit code: the offer is valid and was rejected


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `offer` to the command line."""
    parser = subparsers.add_parser(
        "offer",
        help="check an offer and send it",
        description=__doc__,
        epilog=examples(
            "podium offer examples/offer.json",
            "podium offer examples/offer.json --task-id second-try --json",
            "podium offer examples/offer_chat.json --check",
        ),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the offer, one JSON object")
    add_url(parser)
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
    except RecursionError as error:
        raise PodiumError(f"{path} is no offer: its JSON is nested too deeply") from error
    if isinstance(fields, dict) and (unknown := sorted(fields.keys() - set(Offer.__struct_fields__))):
        raise PodiumError(f"{path}: {nearest(unknown[0], list(Offer.__struct_fields__), 'field')}")
    try:
        offer = msgspec.convert(fields, Offer)
    except msgspec.ValidationError as error:
        raise PodiumError(f"{path} is not an offer: {error}") from error
    refuse_unknown(fields.get("dataset_type"), f"{path}: dataset_type")
    return offer


def check_data(offer: Offer) -> str:
    """Read the offer's data as the trainer does if it is on this machine; return what was found.

    Raises PodiumError if columns that the task type needs are not named, or the data can't be used.
    """
    asked = asked_columns(offer.task_type, offer.dataset_type)
    path = local_file(offer.dataset)
    if offer.file_format is FileFormat.HF or "://" in offer.dataset:
        return f"data not checked, the trainer fetches it: {offer.dataset}"
    if path is None:
        return f"data not checked, it is not on this machine: {offer.dataset}"
    if offer.file_format is FileFormat.PARQUET and find_spec("pyarrow") is None:
        return f"data not checked, only the trainer's installation reads Parquet: {path}"
    files = [DataFile(path, offer.file_format, str(path))]
    found = read_job_rows(files, offer.task_type, offer.dataset_type)
    count = f"{len(found.rows)} rows" + (f" of {len(found)}" if found.dropped else "")
    columns = f"data {path} has the columns {', '.join(asked.needed)} in {count}"
    return "; ".join([columns, *found.notices])


def local_file(dataset: str) -> Path | None:
    """Return the data file if it is on this machine: a local path, or one of the examples."""
    if "://" in dataset:
        return None
    candidates = (Path(dataset).expanduser(), EXAMPLES / dataset)
    return next((path for path in candidates if path.is_file()), None)


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
