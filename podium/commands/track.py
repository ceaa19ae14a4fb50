"""`podium track`: write the runs of a gateway's tasks into trackio, a run tracker, while they train.

It reads the gateway's history as `podium watch` does: no job waits for it, and none notices if it fails. Each
task is a run: curve, held-out losses, plan, decision and result. Start it when you like, and again after a
break: what is stored already is not written twice. With --run it is the run of a `podium train`.

Nothing leaves this machine. `trackio show --project podium` opens the runs in a browser; TRACKIO_DIR says in
which folder they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from gateway.views.schemas import TaskView
from podium.arguments import add_url, examples, positive
from podium.client import GatewayAwayError, find_gateway, refuse_damaged, stuck
from podium.tracking.runs import FolderRuns, GatewayRuns, RunUpdate
from podium.tracking.trackio_store import TrackerError, TrackioStore
from shared.errors import SettingsError
from shared.logs import TroubleLog

EVERY_S = 15


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `track` to the command line."""
    parser = subparsers.add_parser(
        "track",
        help="write runs into trackio, a run tracker",
        description=__doc__,
        epilog=examples(
            "podium track",
            "podium track --once --project box-7",
            "podium track wordnet-nouns-1",
            "podium track --run run1",
        ),
    )
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help="task ids; exit when all have ended (default: the newest 200)",
    )
    parser.add_argument(
        "--run", type=Path, dest="folder", metavar="DIR", help="the --out of a `podium train`"
    )
    parser.add_argument("--project", default="podium", help="trackio's project (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="write what there is, and exit")
    parser.add_argument(
        "--every",
        type=positive,
        default=EVERY_S,
        metavar="SECONDS",
        help="between writes (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON line for each write")
    add_url(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write until Ctrl-C, or until what is named has ended.

    Raises PodiumError if that can't be known: a task's states, or a run's outcome, are damaged.
    """
    if args.folder and args.tasks:
        raise SettingsError("name tasks or --run, not both")
    source = FolderRuns(args.folder) if args.folder else GatewayRuns(find_gateway(args.url), args.tasks)
    store = TrackioStore(args.project)
    lines, trouble, begun = WriteLines(args.project, as_json=args.json), TroubleLog(), False
    while True:
        try:
            for update in written(source, store):
                lines.show(update)
            begun = True
            trouble.over()
        except (GatewayAwayError, TrackerError) as error:  # wait for what has worked before
            if args.once or not begun:
                raise
            if trouble.is_new(error):
                print(f"waiting: {error}", file=sys.stderr, flush=True)
        if args.once or source.have_ended():
            refuse_damaged(source.damaged() if args.tasks else ())
            return 0
        lines.show_damaged(source.damaged())
        time.sleep(args.every)


def written(source: GatewayRuns | FolderRuns, store: TrackioStore) -> Iterator[RunUpdate]:
    """Store what is new, and yield each update that was stored. Raises PodiumError."""
    for update in source.updates(store.facts):
        if update.rows:
            store.write(update)
            yield update


class WriteLines:
    """What was written: a JSON line for each write, or a line when a run is new and when it has ended."""

    def __init__(self, project: str, *, as_json: bool) -> None:
        self._project = project
        self._as_json = as_json
        self._said: set[tuple[str, bool]] = set()
        self._damaged: set[str] = set()

    def show(self, update: RunUpdate) -> None:
        """Print a line about an update, unless it says nothing new."""
        if self._as_json:
            shown = {"run": update.name, "id": update.id, "rows": len(update.rows), "ended": update.ended}
            print(msgspec.json.encode(shown).decode(), flush=True)
        elif (update.id, update.ended) not in self._said:
            self._said.add((update.id, update.ended))
            state = update.facts.get("result.status", "ended") if update.ended else "running"
            print(f"{update.name}: {state}, in project {self._project}", flush=True)

    def show_damaged(self, tasks: Iterable[TaskView]) -> None:
        """Print a line about each task that is stuck, once: the others are followed further."""
        for task in tasks:
            if task.task not in self._damaged:
                self._damaged.add(task.task)
                print(stuck(task.task, task.state, str(task.damaged)), file=sys.stderr, flush=True)
