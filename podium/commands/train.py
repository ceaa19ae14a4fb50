"""`podium train`: run one fine-tune on this machine, without gateway and broker.

CONFIG is a JSON or TOML file with an offer's names: model, dataset, dataset_type, hours_to_complete, and
task_type, file_format, profile, hardware, threads, seed, out. Options override it. A model or data
file that `podium up` would find is also found here.
Ctrl-C stops the run at a checkpoint; the same command with the same --out resumes, with the first deadline.
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

from podium.arguments import examples, hours, positive
from podium.commands.up import EXAMPLES, MODELS
from podium.console import make_console
from podium.dataset_type import dataset_type
from podium.own_hardware import HELP as HARDWARE_HELP
from podium.token_preview import preview, show
from podium.tracking.runs import job_of
from podium.training_config import (
    TRAINED,
    TrainConfig,
    config_format,
    config_task_type,
    local_data,
    local_model,
    read_config,
    worker_job_of,
)
from shared.errors import PodiumError, SettingsError
from shared.files import write_atomically
from shared.json_files import read_json
from shared.messages.encoding import encode
from shared.messages.offers import FileFormat
from shared.messages.runs import (
    Outcome,
    OutcomeStatus,
    Phase,
    Progress,
    WorkerJob,
    decode_progress,
)
from shared.planning.profiles import DEFAULT_PROFILE, PROFILES

POLL_S = 0.3
STOP_S = 30.0  # for a checkpoint of a large model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="run one fine-tune here, without gateway and broker",
        description=__doc__,
        epilog=examples(
            "podium train examples/offer.json --hours 10m --out run1",
            "podium train examples/offer_chat.json --preview 3",
            "podium train --model DIR --data rows.jsonl --hours 5m --out run2 --dataset-type "
            """'{"field_instruction": "q", "field_output": "a"}'""",
        ),
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="a JSON or TOML file")
    parser.add_argument("--model", help="a folder, a GGUF file or a hub id")
    parser.add_argument("--model-id", help="base model named in the export (default: --model)")
    parser.add_argument("--data", dest="dataset", metavar="DATA", help="a file or an https URL")
    formats = [item.value for item in FileFormat]
    parser.add_argument("--file-format", choices=formats, help="default: by the name of the data, else json")
    parser.add_argument(
        "--dataset-type", metavar="JSON", help="the meaning of the columns; JSON or a JSON file"
    )
    types = [str(kind) for kind in TRAINED]
    parser.add_argument("--task-type", choices=types, help="default: derived from the named columns")
    parser.add_argument(
        "--hours",
        type=hours,
        dest="hours_to_complete",
        metavar="TIME",
        help="until the result must be on disk: hours, or 30m, 90s",
    )
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    profiles = ", ".join(sorted(PROFILES))
    parser.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        metavar="PROFILE",
        help=f"one of {profiles} (default: {DEFAULT_PROFILE})",
    )
    parser.add_argument("--hardware", help=HARDWARE_HELP)
    parser.add_argument("--threads", type=positive, help="CPU threads (default: half of the cores)")
    parser.add_argument("--seed", type=int, help="of data order, adapters and dropout (default: 0)")
    parser.add_argument(
        "--kl-coef",
        type=float,
        metavar="NUMBER",
        help="weight of the divergence from the base model in the score (default: 0)",
    )
    parser.add_argument(
        "--preview",
        type=positive,
        nargs="?",
        const=5,
        metavar="ROWS",
        help="train nothing: print the first rows (default: 5) as tokens, with those that are trained",
    )
    parser.add_argument("--json", action="store_true", help="with --preview: print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, show progress, print the outcome as one JSON object; exit code 1 if the run failed."""
    config = config_of(args)
    if args.preview is not None:
        return show_preview(config, args.preview, as_json=args.json)
    job = job_from(config)
    folder = Path(config.out)
    outcome = finished(folder)
    if outcome is None:
        outcome = follow(job, folder)
    print(msgspec.json.encode(outcome).decode())
    if outcome.status is OutcomeStatus.FAILED:
        print(f"podium train: {outcome.error}", file=sys.stderr)
        return 1
    return 0 if outcome.status is OutcomeStatus.READY else 130


def config_of(args: argparse.Namespace) -> TrainConfig:
    """Return the configuration: the file's values, and the options over them. Raises SettingsError."""
    options = {name: getattr(args, name, None) for name in TrainConfig.__struct_fields__}
    if args.dataset_type is not None:
        options["dataset_type"] = dataset_type(args.dataset_type)
    if args.preview is not None:  # needs neither time nor a place
        options = {"hours_to_complete": 1.0, "out": "preview"} | {
            name: value for name, value in options.items() if value is not None
        }
    return read_config(args.config, options)


def show_preview(config: TrainConfig, count: int, *, as_json: bool) -> int:
    """Print the first rows as training would see them."""
    found = preview(
        local_model(config.model, MODELS),
        local_data(config.dataset, EXAMPLES),
        config_format(config),
        config.dataset_type,
        config_task_type(config),
        count,
    )
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        show(found, make_console())
    return 0


def job_from(config: TrainConfig) -> WorkerJob:
    """Return the job in `out` if it is of the same model and data; else write a new one there."""
    folder = Path(config.out)
    path = folder / "job.json"
    model, data = local_model(config.model, MODELS), local_data(config.dataset, EXAMPLES)
    if path.exists():
        job = job_of(folder)
        known = (job.model_path, job.dataset, job.profile, job.kl_coefficient)
        if known != (model, data, config.profile, config.kl_coef):
            raise SettingsError(
                f"{folder} holds a run of another model, data, profile or kl_coef: name another folder with "
                "--out"
            )
        return job
    job = worker_job_of(config, model, data)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode(job))  # a cut one would keep the folder from being used again
    return job


def finished(folder: Path) -> Outcome | None:
    """Return the outcome of a run that is already finished. Raises PodiumError if it can't be read."""
    outcome = _outcome(folder)
    return outcome if outcome is not None and outcome.status is OutcomeStatus.READY else None


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
    outcome = _outcome(folder)
    if outcome is None:
        raise PodiumError(f"the worker died with status {worker.returncode}; see {folder / 'worker.log'}")
    return outcome


def _outcome(folder: Path) -> Outcome | None:
    """Return a run's outcome; None without one, or for one that a disk's fault damaged: it trains again."""
    path = folder / "outcome.json"
    try:
        return read_json(path, Outcome)
    except OSError as error:
        raise PodiumError(f"{path} can't be read: {error.strerror}") from error


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
            for line in filter(None, whole):
                try:
                    progress = decode_progress(line)
                except ValueError:  # cut off by a full disk
                    continue
                yield progress
        if not ended:
            time.sleep(POLL_S)


class Screen:
    """Progress display: a bar on a terminal, else one line per phase and per 10%."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._printed: tuple[Phase, int] | None = None
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
        elif self._printed != (news := (progress.phase, int(10 * progress.progress))):
            self._printed = news
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
