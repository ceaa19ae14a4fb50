"""What the stages of a run share: the job and its machinery, its data, and what is kept across restarts."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import Struct

from shared.clock import Clock, TokenClock
from shared.files import write_atomically
from shared.json_files import read_json
from shared.messages.runs import WorkerJob
from shared.planning.plan import Plan
from shared.planning.throughput import Costs
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup, common_clock
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import STOP_FILE, Stop

RECORD_FILE = "run.json"
PATIENCE = 0.25  # share of the time left that one silent call may take
LEAST_PATIENCE_S = 20.0


@dataclass(frozen=True)
class RunContext:
    """What every part of the pipeline is given."""

    job: WorkerJob
    folder: Path
    own_clock: Clock
    reporter: Reporter
    stop: Stop
    process_group: ProcessGroup = SINGLE_PROCESS
    import_s: float = 0.0  # what this process's imports took
    own_checkpoints: str = "checkpoints"  # in the folder

    @property
    def clock(self) -> Clock:
        """Return the clock of all the run's processes, rank 0's: all ranks must read it together."""
        return common_clock(self.own_clock, self.process_group)

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints that this process writes and goes on from."""
        return self.folder / self.own_checkpoints

    @property
    def left_s(self) -> float:
        """Return the seconds until the outcome must be on disk."""
        return self.job.ready_by - self.clock.time()

    def alone(self) -> RunContext:
        """Return what this process is given while each trains something else: its own clock and checkpoints.

        A request to stop reaches rank 0 as a signal; for the others it is a file that they look for.
        """
        group, clock, stop = self.process_group, self.own_clock, self.stop
        if isinstance(clock, TokenClock):
            clock = TokenClock(clock.start, clock.rate, devices=group.world)
        if not group.is_main:
            stop = Stop(elsewhere=self.stop_file.exists)
        own = "checkpoints" if group.is_main else f"checkpoints/rank-{group.rank}"
        return replace(self, own_clock=clock, process_group=group.alone(), stop=stop, own_checkpoints=own)

    @property
    def stop_file(self) -> Path:
        """Return the file by which rank 0, or the ranks' parent, asks all to stop while each is alone."""
        return self.folder / STOP_FILE

    def patience(self) -> AbstractContextManager[None]:
        """Around one call that can't say that the run is alive: up to PATIENCE of the time left."""
        left_s = self.job.ready_by - self.own_clock.time()  # not rank 0's: the others don't ask
        return self.reporter.patience(max(LEAST_PATIENCE_S, PATIENCE * left_s))

    @property
    def simulated(self) -> bool:
        """Return whether time is counted in trained tokens: then nothing else takes any."""
        return isinstance(self.own_clock, TokenClock)


class RunRecord(Struct, frozen=True, kw_only=True):
    """What a run found out before its first step (`run.json`): a resumed run doesn't measure it again."""

    fingerprint: str  # of the training rows
    base_losses: list[float]  # the base model's, row by row: these are the development rows of the run
    train_examples: int
    train_tokens: int
    dropped: dict[str, int]
    costs: Costs
    resumes: int = 0
    copies: int = 0  # rows that are the same as an earlier one, or nearly
    devices: int = 0  # that the costs are of; 0: not known, of an older version
    without_divergence: bool = False  # it is a part of the score, and there was no room to train with it

    @property
    def base_loss(self) -> float:
        """Return the base model's development metric."""
        return float(np.mean(self.base_losses))

    def resumed(self, devices: int) -> RunRecord:
        """Return the record of one more start, on so many devices: each scores its share of the rows."""
        if not self.devices:
            return msgspec.structs.replace(self, resumes=self.resumes + 1)
        score_s = self.costs.score_s * self.devices / devices
        costs = msgspec.structs.replace(self.costs, score_s=score_s)
        return msgspec.structs.replace(self, resumes=self.resumes + 1, costs=costs, devices=devices)


class JobData(Struct, frozen=True):
    """The job's rows, tokenised."""

    train: Examples
    dev: Examples
    dropped: dict[str, int]
    max_length: int  # of the scorer
    copies: int = 0  # rows that are the same as an earlier one, or nearly


def read_record(folder: Path) -> tuple[RunRecord, Plan] | None:
    """Return what an earlier start of this run recorded; None if it did not, or if that is damaged."""
    record = read_json(folder / RECORD_FILE, RunRecord)
    plan = None if record is None else read_json(folder / "plan.json", Plan)
    return None if record is None or plan is None else (record, plan)


def write_record(run: RunContext, record: RunRecord, plan: Plan) -> None:
    """Write down what a resume needs; the plan first, as the record without it would be of no use."""
    if run.process_group.is_main:
        write_plan(run.folder, plan)
        write_atomically(run.folder / RECORD_FILE, msgspec.json.encode(record))


def write_plan(folder: Path, plan: Plan) -> None:
    """Write down the plan, for people and for a resume."""
    write_atomically(folder / "plan.json", msgspec.json.format(msgspec.json.encode(plan), indent=2))


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint is made with."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
