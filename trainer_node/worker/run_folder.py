"""One job's run folder: the messages between node and worker, and all that a resume needs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from shared.files import write_atomically
from shared.json_files import DamagedFileError, load_json, read_json
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.jobs import Job
from shared.messages.runs import (
    ErrorCode,
    ModelDownload,
    Outcome,
    OutcomeStatus,
    WorkerJob,
)

RUNS_KEPT = 5  # finished run folders kept for people, newest first
LOG_TAIL_BYTES = 16 << 10
# Only a job that goes on needs these; tokens and hidden states can be larger than the data.
DATA_FILES = (
    "data",
    "data.part",
    "tokens.safetensors",
    "reference.safetensors",
    "base_states.bin",
    "base_states.json",
)

_CHECKPOINT = re.compile(r"step-(\d+)")

log = get_logger()


class RunFolder:
    """`<node folder>/runs/<task>`. Every method blocks for the time of a few file operations."""

    def __init__(self, node_folder: Path, task: str) -> None:
        self.task = task
        self.path = node_folder / "runs" / task
        self.job_file = self.path / "job.json"
        self.progress_file = self.path / "progress.jsonl"
        self.outcome_file = self.path / "outcome.json"
        self.download_file = self.path / "download.json"
        self.checkpoints = self.path / "checkpoints"
        self.log_file = self.path / "worker.log"

    def write_job(self, job: WorkerJob) -> None:
        """Make the folder and put `job.json` there."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.job_file, encode(job))

    def begun(self, job: Job) -> WorkerJob | None:
        """Return what this job's worker was given; None without one, or for an older job of this name."""
        given = read_json(self.job_file, WorkerJob)
        return given if given is not None and given.start_at == job.received_at else None

    def remove(self) -> None:
        """Delete the whole folder, if there is one."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def discard(self) -> None:
        """Delete the whole folder, or log why not: the slot's next job must not wait for it."""
        try:
            self.remove()
        except OSError as error:
            log.warning("run folder not removed", folder=str(self.path), error=str(error))

    def outcome(self) -> Outcome | None:
        """Return the worker's outcome, if there is one; one that can't be read counts as a failure."""
        try:
            outcome = load_json(self.outcome_file, Outcome)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedFileError as error:
            return _failed(f"the worker's outcome can't be read: {error}")
        if outcome.status is OutcomeStatus.READY and not (outcome.digest and outcome.export):
            return _failed("the worker's outcome names no export")
        return outcome

    def take_download(self) -> ModelDownload | None:
        """Return how the model was downloaded, once; None if it wasn't, or not yet."""
        if not self.download_file.exists():
            return None
        found = read_json(self.download_file, ModelDownload)
        self.download_file.unlink(missing_ok=True)
        return found

    def remove_outcome(self) -> None:
        """Delete the outcome, before another worker starts."""
        self.outcome_file.unlink(missing_ok=True)

    def remove_parts(self) -> None:
        """Delete what a dead worker left half-written: the next one may need the space."""
        for path in self.checkpoints.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
        (self.path / "data.part").unlink(missing_ok=True)

    def export(self, outcome: Outcome) -> Path:
        """Return the folder that a READY outcome names."""
        return self.path / (outcome.export or "export")

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, or None. A half-written one has another name."""
        if not self.checkpoints.is_dir():
            return None
        names = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return max((int(match[1]) for match in names if match), default=None)

    def last_error(self) -> str | None:
        """Return the last line a worker left in its log: for a Python worker, the exception."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return None
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), None)

    def free_bytes(self) -> int:
        """Room left on the folder's disk."""
        return shutil.disk_usage(self.path).free

    def clean(self) -> None:
        """After the result: free checkpoints and data, keep export and logs, and prune older run folders."""
        for folder in (self.checkpoints, self.path / "trials"):
            shutil.rmtree(folder, ignore_errors=True)
        for name in DATA_FILES:
            (self.path / name).unlink(missing_ok=True)
        runs = self.path.parent
        if not runs.is_dir():
            return
        others = [path for path in runs.iterdir() if path.is_dir() and path != self.path]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for old in others[RUNS_KEPT - 1 :]:
            log.info("run folder pruned", task=old.name, folder=str(old))
            shutil.rmtree(old, ignore_errors=True)


def _failed(reason: str) -> Outcome:
    return Outcome(status=OutcomeStatus.FAILED, code=ErrorCode.INTERNAL, error=reason)
