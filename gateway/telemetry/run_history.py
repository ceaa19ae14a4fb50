"""The course of every run, one file of points per task: what is shown after a restart of the gateway.

The broker keeps progress for minutes only, in memory. So each gateway keeps what it receives, and reads at
its start what it missed (`missed_progress.py`); the rest is a gap in the curve. Nothing is decided by it.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from gateway.views.run import RunPoint
from shared.files import append_lines
from shared.logs import TroubleLog, get_logger
from shared.messages.encoding import decoder
from shared.messages.runs import Phase, Progress
from shared.subjects import task_key

FLUSH_S: Final = 1.0
REPEAT_S: Final = 10.0  # a line that says nothing new is kept this often, as a sign of life
RUNS_KEPT: Final = 200  # files, newest first: some 200 KB for an hour of training
MOST_WAITING: Final = 50_000  # points; more can only accumulate if the disk hangs
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\.jsonl")

log = get_logger()


_encode = msgspec.json.Encoder().encode
_decode = decoder(RunPoint)


def point_of(progress: Progress) -> RunPoint:
    """Return the point of a progress message."""
    return RunPoint(**{name: getattr(progress, name) for name in RunPoint.__struct_fields__})


def is_news(point: RunPoint, before: RunPoint | None) -> bool:
    """Return whether a point says more than the one before it, which was kept."""
    if before is None or point.message or point.at - before.at >= REPEAT_S:
        return True
    return (point.phase, point.step, point.base_loss, point.dev_loss) != (
        *(before.phase, before.step),
        *(before.base_loss, before.dev_loss),
    )


def missing(known: Sequence[RunPoint], candidates: Iterable[RunPoint]) -> list[RunPoint]:
    """Return the candidates that say more than the known point before them, in the order of their times."""
    have = {(point.at, point.message) for point in known}
    found: list[RunPoint] = []
    before: RunPoint | None = None
    for point in sorted((*known, *candidates), key=lambda point: point.at):
        if (point.at, point.message) not in have:
            if not is_news(point, before):
                continue
            have.add((point.at, point.message))
            found.append(point)
        before = point
    return found


class RunHistory:
    """Note points at once, write them every second."""

    def __init__(self, folder: Path) -> None:
        self.lost = 0  # points that could not be written
        self._folder = folder
        self._waiting: dict[str, list[bytes]] = defaultdict(list)
        self._count = 0
        self._newest: dict[str, RunPoint] = {}  # by task, of the runs that go on
        self._some = asyncio.Event()

    def note(self, progress: Progress) -> None:
        """Note where a run stands. A task whose name is no key is ignored: it names a file."""
        if task_key(progress.task) != progress.task:
            return
        point = point_of(progress)
        if not is_news(point, self._newest.get(progress.task)):
            return
        if self._count >= MOST_WAITING:
            self.lost += 1
            return
        self._newest[progress.task] = point
        if point.phase is Phase.DONE:
            del self._newest[progress.task]
        self._waiting[progress.task].append(_encode(point))
        self._count += 1
        self._some.set()

    async def fill(self, received: Mapping[str, Iterable[Progress]]) -> None:
        """Note what the files lack of these runs. Raises OSError."""
        await self.flush()  # so that the files have all that was noted
        for task, messages in received.items():
            if task_key(task) != task:
                continue
            points = map(point_of, messages)
            found = await asyncio.to_thread(lambda: missing(self.read(task), points))  # noqa: B023 - awaited
            self._waiting[task] += map(_encode, found)
            self._count += len(found)
        await self.flush()

    async def run(self) -> None:
        """Write what was noted; until cancelled."""
        trouble = TroubleLog()
        while True:
            await self._some.wait()
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
                trouble.over()
            except OSError as error:
                if trouble.is_new(error):
                    log.warning("points of runs are lost: they can't be written", error=str(error))

    async def flush(self) -> None:
        """Write all waiting points. Raises OSError; then they are lost."""
        self._some.clear()
        waiting, self._waiting, self._count = self._waiting, defaultdict(list), 0
        if not waiting:
            return
        try:
            await asyncio.to_thread(self._append, waiting)
        except OSError:
            self.lost += sum(map(len, waiting.values()))
            raise

    def read(self, task: str) -> list[RunPoint]:
        """Return all points of a task in the order of their times. Blocks."""
        try:
            lines = self._file(task).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        points = {}  # two gateways may share a folder: equal points are one
        for line in lines:
            try:
                point = _decode(line)
            except ValueError:  # cut off by a crash, or of a later version
                continue
            points[point.at, point.message] = point
        return sorted(points.values(), key=lambda point: point.at)

    def _append(self, waiting: dict[str, list[bytes]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for task, lines in waiting.items():
            file = self._file(task)
            new = not file.exists()
            with file.open("a+b", buffering=0) as stream:
                append_lines(stream.fileno(), b"".join(line + b"\n" for line in lines))
            if new:
                self._prune()

    def _prune(self) -> None:
        files = [file for file in self._folder.iterdir() if _NAME.fullmatch(file.name)]
        files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        for old in files[RUNS_KEPT:]:
            old.unlink(missing_ok=True)

    def _file(self, task: str) -> Path:
        return self._folder / f"{task}.jsonl"
