"""`podium logs TASK`: print what a task's run said: phases, messages, and development losses, in order.

They come from the gateway, so any machine that reaches it can ask. A worker's own output, such as a
traceback, is in `<data folder>/nodes/<slot>/runs/<task>/worker.log` on the machine of its node.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from gateway.views.run import RunView
from podium.arguments import add_url, examples
from podium.client import find_gateway, is_over, refuse_damaged

POLL_S = 1.0


class LogLine(Struct, frozen=True, order=True):
    """One line of a run's log."""

    at: float
    phase: str
    step: int
    text: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `logs` to the command line."""
    parser = subparsers.add_parser(
        "logs",
        help="print what a task's run said",
        description=__doc__,
        epilog=examples("podium logs wordnet-nouns-1", "podium logs -f wordnet-nouns-1"),
    )
    parser.add_argument("task", metavar="TASK", help="the task's id")
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the task ends")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line")
    add_url(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the lines; exit code 1 if there is no such task, or its states are damaged."""
    client, printed = find_gateway(args.url), set[LogLine]()
    while True:
        task = client.task(args.task)  # before the lines: what an ended task said is complete
        # Their number tells nothing: a gateway gives the newest messages only, and some come late.
        lines = [line for line in lines_of(client.progress(args.task)) if line not in printed]
        for line in lines:
            print(msgspec.json.encode(line).decode() if args.json else text_of(line), flush=True)
        printed.update(lines)
        if not args.follow or is_over(task):
            break
        time.sleep(POLL_S)
    if not printed and not args.json:
        print(f"{task.task} is {task.state}: its run has said nothing that this gateway received")
    if task.result is not None and not args.json:
        print(f"{task.state}: {task.result.artifact or task.result.reason}")
    refuse_damaged([task])
    return 0


def lines_of(view: RunView) -> list[LogLine]:
    """Return a run's phases, messages and development losses in the order of their times."""
    lines = [LogLine(each.at, each.phase, each.step, each.text) for each in view.messages]
    lines += [LogLine(each.at, each.phase, 0, "begins") for each in view.phases]
    for each in view.development:
        if each.step == 0:
            lines.append(LogLine(each.at, "baseline", 0, f"held-out loss of the base model {each.loss:.4f}"))
        else:
            lines.append(LogLine(each.at, "train", each.step, f"held-out loss {each.loss:.4f}"))
    return sorted(lines)


def text_of(line: LogLine) -> str:
    """Return a line as people read it."""
    at = datetime.fromtimestamp(line.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    step = f"step {line.step}" if line.step else ""
    return f"{at}  {line.phase:<8}  {step:<10}  {line.text}"
