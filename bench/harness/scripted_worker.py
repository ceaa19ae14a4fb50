"""A worker without torch that follows the run folder's contract, so a trainer node sees no difference.

Its data is a JSON object of knobs, so that each job can choose its behaviour:
steps, step_s, checkpoint_every, die_at (dies there, every time it comes by), die_before_checkpoint,
no_checkpoints, hang_at (once), fail (an error code), ignore_sigterm, last_line (what it says before it dies),
weight_bytes (written at every checkpoint), eat_at (there it takes memory until it is killed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from shared.files import folder_digest
from shared.messages.encoding import encode
from shared.messages.runs import (
    ErrorCode,
    Metrics,
    Outcome,
    OutcomeStatus,
    Phase,
    Progress,
    WorkerJob,
    decode_worker_job,
)


class Script:
    """One scripted run."""

    def __init__(self, job_file: Path) -> None:
        self.folder = job_file.parent
        self.job: WorkerJob = decode_worker_job(job_file.read_bytes())
        self.knobs: dict[str, Any] = json.loads(Path(self.job.dataset).read_text())
        self.checkpoints = self.folder / "checkpoints"
        self.stopped = False
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Note SIGTERM."""
        self.stopped = not self.knobs.get("ignore_sigterm", False)

    def run(self) -> int:
        """Play the stages of a run."""
        step = self.newest()
        self.report(Phase.LOADING, step)
        if code := self.knobs.get("fail"):
            return self.end(
                Outcome(status=OutcomeStatus.FAILED, code=ErrorCode(code), error=f"scripted {code}")
            )
        if not step and time.time() >= self.job.ready_by:
            why = "no time is left and there is no checkpoint to submit"
            return self.end(Outcome(status=OutcomeStatus.FAILED, code=ErrorCode.TOO_LATE, error=why))
        steps = self.knobs.get("steps", 10)
        while step < steps and not (self.newest() and time.time() >= self.job.ready_by):
            if self.stopped:
                self.checkpoint(step)
                return self.end(Outcome(status=OutcomeStatus.STOPPED, step=step))
            time.sleep(self.knobs.get("step_s", 0.05))
            step += 1
            self.misbehave(step)
            if step % self.knobs.get("checkpoint_every", 5) == 0:
                self.checkpoint(step)
            self.report(Phase.TRAIN, step)
        return self.export(step)

    def misbehave(self, step: int) -> None:
        """Do what the knobs ask for at this step."""
        if step == self.knobs.get("die_at"):
            print(self.knobs.get("last_line", "ScriptedError: scripted crash"), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.knobs.get("eat_at"):
            eaten = []
            while True:
                eaten.append(bytearray(os.urandom(1 << 20)))
        marker = self.folder / "hung"
        if step == self.knobs.get("hang_at") and not marker.exists():
            marker.touch()
            while True:
                time.sleep(1)

    def newest(self) -> int:
        """Return the step of the newest checkpoint."""
        names = (path.name for path in self.checkpoints.glob("step-*"))
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint."""
        if step and not self.knobs.get("no_checkpoints", False):
            name = f"step-{step:08d}"
            if size := self.knobs.get("weight_bytes"):  # whole or not at all, like the engine's
                part = self.checkpoints / f".tmp-{name}"
                part.mkdir(parents=True, exist_ok=True)
                (part / "weights").write_bytes(b"0" * size)
                part.rename(self.checkpoints / name)
            else:
                (self.checkpoints / name).mkdir(parents=True, exist_ok=True)

    def export(self, step: int) -> int:
        """Write an export that is ready to submit."""
        self.report(Phase.EXPORT, step)
        export = self.folder / "export"
        export.mkdir(exist_ok=True)
        # no two runs export the same bytes, so that a test can identify the submitted export
        (export / "adapter.txt").write_text(f"{self.job.task} {step} {os.getpid()} {time.time()}\n")
        if config := self.knobs.get("adapter_config"):
            (export / "adapter_config.json").write_text(config)
        time.sleep(self.knobs.get("export_s", 0.0))
        self.report(Phase.DONE, step)
        metrics = Metrics(base_loss=2.0, final_loss=1.0, steps=step)
        return self.end(
            Outcome(
                status=OutcomeStatus.READY,
                digest=folder_digest(export),
                export="export",
                metrics=metrics,
                step=step,
                at=time.time(),
            )
        )

    def report(self, phase: Phase, step: int) -> None:
        """Report progress."""
        line = Progress(task=self.job.task, slot=self.job.slot, phase=phase, step=step, at=time.time())
        with (self.folder / "progress.jsonl").open("ab") as file:
            file.write(encode(line) + b"\n")

    def end(self, outcome: Outcome) -> int:
        """Write the outcome and return the exit code."""
        temporary = self.folder / "outcome.json.tmp"
        temporary.write_bytes(msgspec.json.encode(outcome))
        temporary.rename(self.folder / "outcome.json")
        return int(outcome.status is OutcomeStatus.FAILED)


if __name__ == "__main__":
    sys.exit(Script(Path(sys.argv[1])).run())
