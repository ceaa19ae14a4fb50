"""`podium train`: run one fine-tune on this machine, without gateway and broker.

podium train --model DIR --data rows.json --dataset-type '{"field_instruction": "q", "field_output": "a"}' \
    --minutes 5 --out run1

Ctrl-C stops it at a checkpoint; the same command with the same --out resumes, with the first deadline.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from podium.dataset_type import dataset_type
from shared.errors import PodiumError, SettingsError
from shared.messages import (
    FileFormat,
    Outcome,
    OutcomeStatus,
    Phase,
    Progress,
    TaskType,
    WorkerJob,
    decode_outcome,
    decode_progress,
    decode_worker_job,
    encode,
)
from shared.planning.hardware import parse_hardware
from shared.planning.profiles import PROFILES

POLL_S = 0.3
STOP_S = 30.0  # for a checkpoint of a large model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="run one fine-tune here, without gateway and broker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a folder, a GGUF file or a hub id")
    parser.add_argument("--model-id", help="base model named in the export (default: --model)")
    parser.add_argument("--data", required=True, help="a file or an https URL")
    parser.add_argument("--file-format", default="json", choices=[item.value for item in FileFormat])
    parser.add_argument(
        "--dataset-type",
        required=True,
        metavar="JSON",
        help="the meaning of the columns; JSON or a JSON file",
    )
    parser.add_argument("--task-type", default="InstructTextTask", choices=[item.value for item in TaskType])
    parser.add_argument("--minutes", type=float, required=True, help="until the result must be on disk")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--profile", default="maximum_accuracy", help=f"one of {', '.join(sorted(PROFILES))}")
    parser.add_argument("--hardware", default="cpu", help="cpu, or for example 1xH100-80GB (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: half of the cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, show progress, print the outcome as one JSON object; exit code 1 if the run failed."""
    job = job_from(args)
    outcome = finished(args.out)
    if outcome is None:
        outcome = follow(job, args.out)
    print(msgspec.json.encode(outcome).decode())
    if outcome.status is OutcomeStatus.FAILED:
        print(f"podium train: {outcome.error}", file=sys.stderr)
        return 1
    return 0 if outcome.status is OutcomeStatus.READY else 130


def job_from(args: argparse.Namespace) -> WorkerJob:
    """Return the job in --out if it is of the same model and data; else write a new one there."""
    if not args.minutes > 0:
        raise SettingsError(f"--minutes must be more than 0, not {args.minutes}")
    path: Path = args.out / "job.json"
    model = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    data = str(Path(args.data).absolute()) if Path(args.data).exists() else args.data
    if path.exists():
        job = decode_worker_job(path.read_bytes())
        if (job.model_path, job.dataset, job.profile) != (model, data, args.profile):
            raise SettingsError(f"{args.out} holds a run of another model, data or profile")
        return job
    now = time.time()
    job = WorkerJob(
        task_id=args.out.name,
        task=args.out.name,
        slot="local",
        task_type=TaskType(args.task_type),
        model=args.model_id or args.model,
        model_path=model,
        dataset=data,
        file_format=FileFormat(args.file_format),
        dataset_type=dataset_type(args.dataset_type),
        start_at=now,
        ready_by=now + 60 * args.minutes,
        hardware=parse_hardware(args.hardware),
        profile=args.profile,
        seed=args.seed,
        threads=args.threads,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(job))
    return job


def finished(folder: Path) -> Outcome | None:
    """Return the outcome of a run that is already finished."""
    path = folder / "outcome.json"
    if not path.exists():
        return None
    outcome = decode_outcome(path.read_bytes())
    return outcome if outcome.status is OutcomeStatus.READY else None


def follow(job: WorkerJob, folder: Path) -> Outcome:
    """Start the worker, show its progress, and wait for its outcome."""
    (folder / "outcome.json").unlink(missing_ok=True)
    lines = folder / "progress.jsonl"
    start = lines.stat().st_size if lines.exists() else 0
    command = [sys.executable, "-m", "trainer_node.engine", str(folder / "job.json")]
    with (folder / "worker.log").open("ab") as log:
        # Its own session, so that this process handles Ctrl-C and passes it on.
        worker = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        with Screen() as screen:
            for progress in _progress(lines, start, worker):
                screen.show(progress)
    except KeyboardInterrupt:
        print("stopping at a checkpoint; press Ctrl-C again to kill it", file=sys.stderr)
    finally:
        end(worker)
    path = folder / "outcome.json"
    if not path.exists():
        raise PodiumError(f"the worker died with status {worker.returncode}; see {folder / 'worker.log'}")
    return decode_outcome(path.read_bytes())


def end(worker: subprocess.Popen[bytes]) -> None:
    """Let the worker write a checkpoint and wait for its exit; kill it on a second Ctrl-C or a timeout."""
    worker.terminate()
    try:
        worker.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)  # with its ranks: it leads a process group
            worker.wait()


def _progress(path: Path, start: int, worker: subprocess.Popen[bytes]) -> Iterator[Progress]:
    """Yield the worker's progress lines until it has exited and all are read."""
    buffer, ended = b"", False
    while not ended:
        ended = worker.poll() is not None
        if path.exists():
            with path.open("rb") as file:
                file.seek(start)
                fresh = file.read()
            start += len(fresh)
            *whole, buffer = (buffer + fresh).split(b"\n")
            yield from (decode_progress(line) for line in whole if line)
        if not ended:
            time.sleep(POLL_S)


class Screen:
    """Progress display: a bar on a terminal, else one line per phase and per 10%."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._said: tuple[Phase, int] | None = None
        self._bars: Bars | None = None
        self._bar: TaskID | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bars = Bars(*columns, console=self.console)
            self._bar = self._bars.add_task("loading", total=1.0)

    def __enter__(self) -> Screen:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Draw the newest state; messages stay on the screen."""
        if progress.message:
            self.console.print(f"  {progress.message}", markup=False, highlight=False, soft_wrap=True)
        elif self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=progress.progress, description=_line(progress))
        elif self._said != (news := (progress.phase, int(10 * progress.progress))):
            self._said = news
            self.console.print(_line(progress), markup=False, highlight=False, soft_wrap=True)


def _line(progress: Progress) -> str:
    parts = [progress.phase.value]
    if progress.phase is Phase.TRAIN and progress.loss is not None:
        parts += [f"{progress.progress:.0%}", f"step {progress.step}", f"loss {progress.loss:.3f}"]
        if progress.tokens_per_s:
            parts.append(f"{progress.tokens_per_s:.0f} tokens/s")
    if progress.base_loss is not None:
        parts.append(f"base {progress.base_loss:.3f}")
    if progress.dev_loss is not None and progress.phase in (Phase.EXPORT, Phase.VERIFY, Phase.DONE):
        parts.append(f"held-out {progress.dev_loss:.3f}")
    return "  ".join(parts)
