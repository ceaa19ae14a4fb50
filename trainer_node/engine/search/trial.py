"""One training run inside a job, what it showed, and the search's record on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from shared.files import write_atomically
from shared.json_files import read_json
from shared.planning.plan import Plan

FILE = "search.json"
LAST_PASS_RATE = 0.25  # of the run's: one pass over the development rows ends it
MOST_STARTS = 2  # of a worker in a trial without a checkpoint of it; the node gives up a job after 3


class Trial(Struct, frozen=True, kw_only=True):
    """One training run: where it differs from the plan."""

    arm: str  # what is trained: a plan's name
    rate: float = 1.0  # factor on the plan's learning rates
    epochs: float = 2.0
    batch: int = 32  # examples of one optimiser step
    seed: int = 0  # added to the job's: another order of the rows
    short: bool = False  # it compares rates, before runs of full length
    main: bool = False  # the run that takes all the time that is left
    refit: bool = False  # a run like the best one, on the development rows as well
    of: int | None = None  # a refit: the number of the trial that it repeats
    averaged: bool = False  # a refit at a rate that is too high for it alone, but not for an average
    with_best: bool = False  # a refit that is averaged with the best trial as well
    noise: float = 0.0  # on embeddings while it trains: see Plan
    last_pass: bool = False  # from the run before, over the development rows alone; it is a refit too
    leaves_s: float = 0.0  # of the job's time, for what comes after it
    stage: str = ""  # of a search by probes: short, at a constant rate, their weights are not kept

    def __str__(self) -> str:
        order = f", order {self.seed + 1}" if self.seed else ""
        order += ", development rows alone" if self.last_pass else ", all rows" if self.refit else ""
        order += f", probe ({self.stage})" if self.stage else ", to compare rates" if self.short else ""
        order += ", noise" if self.noise else ""
        epochs = f"{self.epochs:.2g}"
        noun = "epoch" if epochs == "1" else "epochs"
        return f"{self.arm}, rate x {self.rate:.2g}, {epochs} {noun}, batch {self.batch}{order}"


def last_pass_of(trial: Trial) -> Trial:
    """Return the pass over the development rows that goes on from a trial's weights."""
    rate = LAST_PASS_RATE * trial.rate
    return replace(trial, rate=rate, epochs=1.0, main=False, refit=True, last_pass=True, leaves_s=0.0)


class TrialResult(Struct, frozen=True, kw_only=True):
    """What a finished trial showed."""

    trial: Trial
    loss: float | None  # on the development rows; None: it gave no number
    tokens: int
    train_s: float  # inside the trial's training, by the run's clock
    steps: int = 0  # that were trained
    other_s: float = 0.0  # for setting up and scoring
    devices: int = 0  # that trained it together; 0: not known, of an older version
    weights: str = "weights"  # the best group of tensors in its checkpoint: weights, average or best
    snapshots: list[int] = []  # better than these: the mean of the snapshots of these steps
    lowest_epochs: float | None = None  # where its held-out loss was lowest, if it rose after that
    losses: list[float] = []  # row by row
    factor: float | None = None  # on what its last weights have changed, at which their loss is lowest
    lowest_factor: float | None = None  # the same of the lowest point's weights, if these are the best ones
    probe_loss: float | None = None  # what a probe is judged by; None: it gave no number
    step: int = 0  # of those weights
    step_tokens: int = 0  # trained up to there
    step_s: float = 0.0  # real seconds inside steps up to there
    step_skipped: int = 0  # without a finite gradient, of the steps up to there


def factor_to_apply(result: TrialResult) -> float | None:
    """Return the factor on what a trial changed that makes its kept weights better; None if none does.

    What was measured on its last weights holds for their average, too.
    """
    factor = result.lowest_factor if result.weights == "best" else result.factor
    return factor if factor != 1.0 and not result.snapshots else None


class SearchRecord(Struct, frozen=True, kw_only=True):
    """Where a search stands (`search.json`): a resumed job goes on with the same trial."""

    began_at: float
    all_s: float  # time there was when it began
    plans: dict[str, Plan]  # by arm, the job's own first
    done: list[TrialResult] = []
    trial: Trial | None = None  # that runs now
    width: int = 1  # trials that run at once, each by one process on a device of its own
    others: list[Trial] = []  # that run at the same time, by processes 1, 2, ...
    starts: int = 0  # of a worker in this trial, without a checkpoint of it
    clock_tokens: int = 0  # of the token clock when this was written
    steps_before: int = 0  # of the trials that are done
    tokens_before: int = 0
    timed: bool = False  # the speed was measured before the first trial, or a worker ended in that
    timed_arm: str = ""  # of which it was; "": none, or written by an older version
    tokens_per_s: float = 0.0  # what it was; 0: not known
    step_s: float = 0.0  # of a step besides its tokens

    @property
    def number(self) -> int:
        """Return the number of the trial that runs now, from 0."""
        return len(self.done)

    @property
    def running(self) -> list[Trial]:
        """Return the trials that run now, by process; none between two rounds."""
        return [self.trial, *self.others] if self.trial else []

    @property
    def in_probe(self) -> bool:
        """Return whether a probe runs now."""
        return self.trial is not None and bool(self.trial.stage)

    def started(self, trial: Trial, clock_tokens: int, others: Sequence[Trial] = ()) -> SearchRecord:
        """Return the record with a trial under way, and others at the same time."""
        return replace(self, trial=trial, others=list(others), starts=1, clock_tokens=clock_tokens)

    def failed(self) -> SearchRecord:
        """Return the record with the trial under way given up, if there is one."""
        if self.trial is None:
            return self
        return self.finished(without_loss(self.trial), 0, self.clock_tokens)

    def finished(self, result: TrialResult, steps: int, clock_tokens: int) -> SearchRecord:
        """Return the record with the trial's result."""
        return replace(
            self,
            done=[*self.done, replace(result, steps=steps)],
            trial=None,
            others=[],
            clock_tokens=clock_tokens,
            steps_before=self.steps_before + steps,
            tokens_before=self.tokens_before + result.tokens,
        )


def without_loss(trial: Trial) -> TrialResult:
    """Return the result of a trial that has shown nothing."""
    return TrialResult(trial=trial, loss=None, tokens=0, train_s=0.0)


def read_search(folder: Path) -> SearchRecord | None:
    """Read the search that an earlier start of this run began; None without one, or if it is damaged."""
    return read_json(folder / FILE, SearchRecord)


def write_search(folder: Path, record: SearchRecord) -> None:
    """Write down where the search stands."""
    write_atomically(folder / FILE, msgspec.json.encode(record))
