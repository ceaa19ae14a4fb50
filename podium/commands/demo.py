"""`podium demo`: send real offers, run two real fine-tunes at once, measure held-out losses.

The last line of the output is one JSON object with the figures of the table; exit code 0 only if all is well.
With --compare the same demo runs once with each of two profiles, and their losses are printed side by side.
Runs on the CPU, in its own folder, and ignores PODIUM_* variables.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Coroutine, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from rich.console import Console

from gateway.views.schemas import TaskState, TaskView
from podium.arguments import examples
from podium.client import ENDED, Client, Refusal
from podium.commands.up import EXAMPLES, make_stack
from podium.commands.watch import WatchView
from podium.console import make_console
from podium.demo.model import HOME as MODEL_FOLDER
from podium.demo.report import Played, Row, compare, report, score_row, take_result
from shared.errors import PodiumError, SettingsError
from shared.messages.offers import DatasetType, Offer, TaskType
from shared.planning.profiles import DEFAULT_PROFILE, resolve

if TYPE_CHECKING:
    from podium.local.stack import Stack

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COLUMNS = DatasetType(field_instruction="instruct", field_output="output")
COMPARED = ("maximum_accuracy", DEFAULT_PROFILE)
FOLDER = Path("~/.cache/podium/demo")
READY_S, CLAIM_S, LATE_S, POLL_S = 60.0, 60.0, 60.0, 0.5
MALFORMED = b'{"task_id": "demo-malformed", "task_type": "InstructTextTask", "hours_to_complete": "soon"}'
SETTINGS: dict[str, Any] = {
    "gateway_port": 0,
    "nats_url": "nats://127.0.0.1:0",
    "deadline_margin_s": 10.0,
    "stop_grace_s": 20.0,
    "hardware": "cpu",
    "expected_hardware": "cpu",
    "models": {MODEL: str(MODEL_FOLDER)},
    "dataset_roots": (str(EXAMPLES),),
}


class DemoStep(Struct, frozen=True):
    """One offer of the demo, and the expected decision."""

    task: str
    body: bytes
    accepted: bool
    words: str  # the reason must contain them
    test_file: str = ""  # held out: not part of any job's data
    malformed: bool = False


def steps(minutes: float) -> list[DemoStep]:
    """Return the six offers, in order; the last one is sent while both jobs run."""
    hours = minutes / 60
    image: dict[str, Any] = {"task_type": TaskType.IMAGE, "model": "stabilityai/stable-diffusion-xl-base-1.0"}
    full, long = "At maximum accuracy capacity (2 jobs for #1)", "Job duration too long (>96 hours)"
    return [
        DemoStep("demo-malformed", MALFORMED, False, "hours_to_complete", malformed=True),
        DemoStep("demo-image", _offer("demo-image", hours, **image), False, "ImageTask"),
        DemoStep("demo-97-hours", _offer("demo-97-hours", 97), False, long),
        DemoStep("demo-nouns", _offer("demo-nouns", hours), True, "Accepted", "nouns_test.json"),
        DemoStep("demo-others", _offer("demo-others", hours, "others"), True, "Accepted", "others_test.json"),
        DemoStep("demo-one-more", _offer("demo-one-more", hours), False, full),
    ]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole system once on this machine",
        description=__doc__,
        epilog=examples("podium demo", "podium demo --minutes 3"),
    )
    parser.add_argument("--minutes", type=float, default=4.5, help="time for each job (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, default=FOLDER, help="emptied first (default: %(default)s)")
    parser.add_argument(
        "--profile", default=DEFAULT_PROFILE, help="recipe of both jobs (default: %(default)s)"
    )
    parser.add_argument(
        "--compare", action="store_true", help=f"run it with {' and '.join(COMPARED)}, one after the other"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; exit code 0 if everything is as expected."""
    profiles = COMPARED if args.compare else (args.profile,)
    try:
        for profile in profiles:
            resolve(profile)
        return asyncio.run(demo(args.minutes, args.data_dir.expanduser().absolute(), profiles))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except asyncio.CancelledError:  # by a signal; the cleanup is done
        return 128 + signal.SIGINT


async def demo(minutes: float, folder: Path, profiles: Sequence[str]) -> int:
    """Run the demo once for each profile; print its table, and all losses if there are several."""
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not stop the cleanup
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    console = make_console()
    await _have_model()
    played: dict[str, Played] = {}
    for profile in profiles:
        if len(profiles) > 1:
            console.print(f"profile {profile}", style="bold", highlight=False)
        played[profile] = await _once(console, minutes, folder, profile)
        report(console, played[profile])
    if len(profiles) > 1:
        compare(console, played)
    return 0 if all(one.well for one in played.values()) else 1


async def _once(console: Console, minutes: float, folder: Path, profile: str) -> Played:
    """Send offers, train and score; all services are stopped before scoring."""
    began = time.monotonic()
    plan = steps(minutes)
    stack = await make_stack({**SETTINGS, "data_dir": str(folder), "profile": profile}, {})
    try:
        await stack.start(fresh=True)
        await stack.ready(READY_S)
        console.print(f"gateway {stack.url}, data in {folder}", highlight=False)
        play = Play(console, stack)
        await play.run(plan)
    finally:
        await _to_its_end(stack.stop(kill_workers=True))
    seconds = time.monotonic() - began
    for step, row in zip(plan, play.rows, strict=True):
        if step.accepted and row.artifact is not None:
            console.print(f"scoring {row.task}, and the base model, on {step.test_file}", highlight=False)
            await score_row(row, MODEL_FOLDER, EXAMPLES / "wordnet" / step.test_file, COLUMNS)
    return Played(rows=play.rows, overlap_s=play.overlap_s, seconds=seconds)


class Play:
    """The part of the demo that needs the running services."""

    def __init__(self, console: Console, stack: Stack) -> None:
        self.console = console
        self.stack = stack
        self.client = Client(stack.url)
        self.rows: list[Row] = []
        self.overlap_s = 0.0
        self._began: dict[str, float] = {}  # when a job was first seen running, Unix seconds

    async def run(self, plan: list[DemoStep]) -> None:
        """Send the offers, the last one while both jobs run, and follow the jobs to their ends."""
        for step in plan[:-1]:
            await self._send(step)
        jobs = {row.task: row for row in self.rows if row.accepted}
        with WatchView(self.console) as view:
            await self._follow(view, jobs, until=set(TaskState) - {TaskState.QUEUED}, limit_s=CLAIM_S)
            await self._send(plan[-1])
            latest = max((row.deadline_at for row in jobs.values()), default=0.0) + LATE_S
            tasks = await self._follow(view, jobs, until=ENDED, limit_s=latest - time.time())
        for task in tasks:
            if task.result is not None:
                take_result(jobs[task.task], task.result)
        ends = [task.result.at for task in tasks if task.result is not None]
        if len(ends) == len(self._began) == 2:
            self.overlap_s = max(0.0, min(ends) - max(self._began.values()))

    async def _send(self, step: DemoStep) -> None:
        answer = await asyncio.to_thread(self.client.offer, step.body)
        row = Row(task=step.task, expected=step.accepted)
        if isinstance(answer, Refusal):
            row.reason = f"HTTP {answer.status}: {answer.detail}"
            row.as_expected = step.malformed and answer.status == 400
        else:
            row.slot, row.accepted, row.reason = answer.slot, answer.accepted, answer.reason
            row.deadline_at = answer.deadline_at or 0.0
            row.as_expected = not step.malformed and answer.accepted == step.accepted
        row.as_expected = row.as_expected and step.words in row.reason
        self.rows.append(row)
        word = f"accepted on slot {row.slot}" if row.accepted else "refused"
        self.console.print(
            f"{step.task}: {word}: {row.reason}", markup=False, highlight=False, soft_wrap=True
        )

    async def _follow(
        self, view: WatchView, jobs: dict[str, Row], *, until: Set[TaskState], limit_s: float
    ) -> list[TaskView]:
        """Show the jobs until each is in one of these states. Raises PodiumError if a service failed."""
        end = time.monotonic() + limit_s
        while True:
            self.stack.check()
            tasks = [task for task in await asyncio.to_thread(self.client.tasks) if task.task in jobs]
            for task in tasks:
                if task.state is TaskState.RUNNING:
                    self._began.setdefault(task.task, time.time())
            view.update(tasks)
            there = len(tasks) == len(jobs) and all(task.state in until for task in tasks)
            if there or time.monotonic() > end:
                return tasks
            await asyncio.sleep(POLL_S)


async def _have_model() -> None:
    """Convert the demo model in a separate process, unless it exists."""
    if (MODEL_FOLDER / "config.json").is_file():
        return
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "podium.demo.model")
    if await process.wait() != 0:
        raise PodiumError("can't make the demo model; `make setup` installs what it needs")


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that no Ctrl-C may interrupt, not even a second one."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


def _offer(task: str, hours: float, data: str = "nouns", **other: Any) -> bytes:
    fields: dict[str, Any] = {"task_type": TaskType.INSTRUCT, "model": MODEL, "dataset_type": COLUMNS}
    dataset = f"wordnet/{data}_train.json"
    return msgspec.json.encode(
        Offer(**fields | other, task_id=task, hours_to_complete=hours, dataset=dataset)
    )
