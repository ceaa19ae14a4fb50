"""Kill a container where it matters: in training, in an export, in a replacement of the submission.

The bench watches the run's folder and the container's processes. It kills a random while after it has seen
what it aims at, and notes what the container was doing then.
"""

from __future__ import annotations

import math
import random
import re
import subprocess
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from msgspec import Struct

from bench.tournament.container import Ended, Runtime
from bench.tournament.mounts import Mounted
from shared.processes import command_line

STEPS: Final = re.compile(rb'"phase":"train","step":([1-9]\d*)')
PHASE: Final = re.compile(rb'"phase":"(\w+)"')
EXPORTER: Final = "trainer_node.engine.early_export"
LAST_SHARE: Final = 0.8  # of the time: a run may end by itself after it
POLL_S: Final = 0.02
REPLACEMENT_POLL_S: Final = 0.0005


class Aim(StrEnum):
    """What a container is doing when it is to be killed."""

    TRAINING = "training"
    EARLY_EXPORT = "early export"
    FINAL_EXPORT = "final export"
    REPLACEMENT = "replacement"


AIMS: Final = (
    *(Aim.TRAINING, Aim.TRAINING, Aim.EARLY_EXPORT, Aim.TRAINING, Aim.REPLACEMENT),
    *(Aim.TRAINING, Aim.TRAINING, Aim.FINAL_EXPORT, Aim.TRAINING, Aim.REPLACEMENT),
)
# The longest wait after it was seen, in seconds: about as long as it takes.
LONGEST_S: Final = {Aim.EARLY_EXPORT: 5.0, Aim.FINAL_EXPORT: 0.5, Aim.REPLACEMENT: 0.015}


class Kill(Struct, frozen=True):
    """How a container is to be killed."""

    aim: Aim
    seed: int
    earliest_s: float = 0.0
    within_s: float = math.inf  # of the first step, where training is the aim


class KilledAt(Struct, frozen=True):
    """What a container was doing when it was killed."""

    aim: Aim
    step: int  # of its training; 0: it had not begun
    exporting: bool
    replacing: bool  # a half-made submission is left next to the whole one


class Watch:
    """Looks at one running container from outside."""

    def __init__(self, runtime: Runtime, mounted: Mounted, process: subprocess.Popen[bytes]) -> None:
        self.runtime = runtime
        self.mounted = mounted
        self.process = process

    def step(self) -> int:
        """Return the last training step that the run has told of."""
        return max((int(found) for found in STEPS.findall(self._progress())), default=0)

    def finishing(self) -> bool:
        """Return whether the worker makes its own export."""
        return (PHASE.findall(self._progress()) or [b""])[-1] in (b"export", b"verify")

    def exporting_early(self) -> bool:
        """Return whether an early export is under way."""
        return any(EXPORTER in command_line(pid) for pid in self.runtime.processes(self.process))

    def replacing(self) -> bool:
        """Return whether a submission is being put together."""
        return self.mounted.staged.exists()

    def _progress(self) -> bytes:
        found = [path.read_bytes() for path in self.mounted.runs.glob("*/progress.jsonl")]
        return b"\n".join(found)


def run_and_kill(
    runtime: Runtime, mounted: Mounted, profiles: str, seconds: float, kill: Kill
) -> tuple[Ended, KilledAt | None]:
    """Run a container and kill it as aimed, at the end of its time at the latest.

    Returns None in place of what it was doing if it ended by itself before.
    """
    began = time.monotonic()
    with (mounted.root / "log").open("ab") as log:
        process = runtime.start(mounted, profiles, log)
        watch = Watch(runtime, mounted, process)
        try:
            await_aim(watch, kill, began, seconds)
            status = process.poll()
            exporting = status is None and (watch.finishing() or watch.exporting_early())
        except BaseException:  # of the bench: the folder can't be removed while something runs in it
            runtime.kill(process)
            raise
        if status is not None:
            return Ended(status, time.monotonic() - began), None
        runtime.kill(process)
    killed = KilledAt(kill.aim, watch.step(), exporting, watch.replacing())
    return Ended(None, time.monotonic() - began), killed


def await_aim(watch: Watch, kill: Kill, began: float, seconds: float) -> None:
    """Return at the moment at which the container is to be killed, or when it has ended."""
    wait = random.Random(kill.seed).random()

    def until(seen: Callable[[], bool], poll_s: float = POLL_S) -> None:
        while not seen() and watch.process.poll() is None and time.monotonic() < began + seconds:
            time.sleep(poll_s)

    until(lambda: watch.step() > 0 and time.monotonic() >= began + kill.earliest_s)
    if kill.aim is Aim.TRAINING:
        left = max(0.0, began + LAST_SHARE * seconds - time.monotonic())
        time.sleep(wait * min(left, kill.within_s))
        return
    seen = {
        Aim.EARLY_EXPORT: watch.exporting_early,
        Aim.FINAL_EXPORT: watch.finishing,
        Aim.REPLACEMENT: watch.replacing,
    }[kill.aim]
    until(seen, REPLACEMENT_POLL_S if kill.aim is Aim.REPLACEMENT else POLL_S)
    time.sleep(wait * LONGEST_S[kill.aim])
