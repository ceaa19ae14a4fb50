"""`podium scores`: import upstream's scores of submissions, and show the learned rates.

FILE holds the response of upstream's `GET /v1/tasks/breakdown/{task_id}`, or scores in Podium's own form
({"task_id": ..., "quality_score": ...}): one object, a list, or one object per line; - = standard input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from rich.markup import escape
from rich.table import Table

from gateway.learning.score_form import finite
from gateway.views.schemas import TablesView
from podium.arguments import add_commands, add_url, examples
from podium.client import find_gateway
from podium.console import make_console
from shared.errors import PodiumError
from shared.settings_sources import load_settings

BATCH = 100  # scores of one request
LONGEST_REASON = 500
KEYS = {"model_performance": "model family", "delivery": "task type, model family"}  # else a task type


class Read(Struct, frozen=True):
    """The scores of one hotkey in a file: forms to post, and notes on what is left out."""

    forms: list[dict[str, Any]]
    notes: list[str]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `scores` and its own commands to the command line."""
    commands = add_commands(
        subparsers,
        "scores",
        "import upstream's scores, show the learned rates",
        __doc__,
        "podium scores import breakdown.json",
        "podium scores show",
    )
    parser = commands.add_parser(
        "import",
        help="post upstream's scores to the gateway",
        description=__doc__,
        epilog=examples("podium scores import breakdown.json", "podium scores import - --hotkey 5F3s..."),
    )
    parser.add_argument("file", metavar="FILE", help="upstream's JSON, or - for standard input")
    parser.add_argument(
        "--hotkey", metavar="ADDRESS", help="the miner whose results count (default: from the settings)"
    )
    parser.set_defaults(run=run_import)
    parser = commands.add_parser(
        "show",
        help="show the learned rates, with their counts",
        epilog=examples("podium scores show", "podium scores show --json"),
    )
    parser.set_defaults(run=run_show)
    for parser in commands.choices.values():
        add_url(parser)
        parser.add_argument("--json", action="store_true", help="print the gateway's answer as JSON")


def run_import(args: argparse.Namespace) -> int:
    """Post every score of the file; exit code 0 if none was refused. Importing a file twice is harmless."""
    read = read_scores(_text(args.file), args.file, args.hotkey or load_settings().hotkey)
    client = find_gateway(args.url)
    stored, known, refused = 0, 0, list[dict[str, str]]()
    for start in range(0, len(read.forms), BATCH):
        taken = client.post_scores(read.forms[start : start + BATCH])
        stored, known = stored + len(taken.stored), known + len(taken.known)
        refused += [{"task_id": each.task_id, "why": each.why} for each in taken.refused]
    if args.json:
        print(json.dumps({"stored": stored, "known": known, "refused": refused, "notes": read.notes}))
        return 1 if refused else 0
    for note in [*read.notes, *(each["why"] for each in refused)]:
        print(note, file=sys.stderr)
    print(f"{stored} stored, {known} already known, {len(refused)} refused, {len(read.notes)} left out")
    return 1 if refused else 0


def run_show(args: argparse.Namespace) -> int:
    """Print the learned rates; exit code 1 if the gateway can't be reached."""
    view = find_gateway(args.url).tables()
    if args.json:
        print(msgspec.json.encode(view).decode())
        return 0
    console = make_console()
    console.print(summary(view), soft_wrap=True)
    for table in rates_tables(view):
        console.print(table)
    return 0


def summary(view: TablesView) -> str:
    """Return what the rates come from, and how many results count for nothing."""
    unused = view.unused_results
    return (
        f"policy {view.policy}; evidence of {view.results} results and {view.scores} scores halves every "
        f"{view.half_life_days:g} days; a house value counts as {view.prior_strength:g} trials"
        + (
            f"; {unused} more results are no evidence (cancelled, or bad_data without a score)"
            if unused
            else ""
        )
    )


def rates_tables(view: TablesView) -> list[Table]:
    """Return one table per learned rate."""
    made = []
    for name, each in view.tables.items():
        key = KEYS.get(name, "task type")
        title = f"{name} ({each.rate_of}), house value {each.house:g}"
        table = Table(key, "rate", "yes", "of", "because", title=title, title_justify="left", box=None)
        for label, rate in each.rates.items():
            counts = (f"{rate.successes:.1f}", f"{rate.trials:.1f}")
            table.add_row(escape(label), f"{rate.value:.3f}", *counts, escape(rate.cause))
        if not each.rates:
            table.add_row("-", f"{each.house:.3f}", "0.0", "0.0", "house value, no evidence yet")
        made.append(table)
    return made


def read_scores(text: str, name: str, hotkey: str | None) -> Read:
    """Return the forms for upstream's results of `hotkey`. Raises PodiumError that names a bad item."""
    read = Read([], [])
    for index, item in enumerate(_items(text, name)):
        where = f"{name}, item {index}"
        if isinstance(item, dict) and "miner_results" in item:
            _add_breakdown(read, item, where, hotkey)
        elif isinstance(item, dict) and "task_id" in item:
            read.forms.append({key: value for key, value in item.items() if value is not None})
        else:
            raise PodiumError(
                f"{where}: neither upstream's breakdown (id and miner_results) nor a score (task_id and "
                "quality_score)"
            )
    return read


def _add_breakdown(read: Read, item: dict[str, Any], where: str, hotkey: str | None) -> None:
    task_id, results = item.get("id"), item["miner_results"]
    if not isinstance(task_id, str) or not isinstance(results, list | None):
        raise PodiumError(f"{where}: a breakdown has an id and a list of miner_results")
    of_miners = [each for each in results or [] if isinstance(each, dict)]
    if hotkey is None and len(of_miners) > 1:
        raise PodiumError(
            f"{where}: {len(of_miners)} miners have results of task {task_id}; choose one with "
            "--hotkey, or set PODIUM_HOTKEY"
        )
    mine = next((each for each in of_miners if hotkey is None or each.get("hotkey") == hotkey), None)
    if mine is None:
        read.notes.append(f"task {task_id}: no result of {hotkey or 'any miner'}")
    elif finite(mine.get("quality_score")) is None:
        read.notes.append(f"task {task_id}: not scored yet")
    else:
        read.forms.append(_form(task_id, item, mine))


def _form(task_id: str, item: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Return a score in our own form. Upstream may leave out the task type and the model."""
    form = {
        "task_id": task_id,
        "quality_score": mine["quality_score"],
        "test_loss": finite(mine.get("test_loss")),
        "synth_loss": finite(mine.get("synth_loss")),
        "reason": str(mine.get("score_reason") or "")[:LONGEST_REASON],
        "task_type": item.get("task_type"),
        "model": item.get("model_id") or item.get("model"),
    }
    return {key: value for key, value in form.items() if value is not None}


def _items(text: str, name: str) -> list[Any]:
    """Parse one object, a list of objects, or one object per line. NaN and Infinity are accepted."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else _no_json(name, error)
        except (ValueError, RecursionError) as of_line:
            return _no_json(name, of_line)
    except RecursionError as error:
        return _no_json(name, error)
    return whole if isinstance(whole, list) else [whole]


def _no_json(name: str, error: Exception) -> list[Any]:
    raise PodiumError(f"{name} is neither JSON nor JSON lines: {error}") from error


def _text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise PodiumError(f"{name} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PodiumError(f"{name} is not UTF-8: {error}") from error
