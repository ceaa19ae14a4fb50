"""Everything that changes during training, and what it needs to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shared.clock import Clock
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Packs
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.model.recorded_pass import RecordedPass
from trainer_node.engine.objectives import Loss
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.cpu_threads import CpuThreads
from trainer_node.engine.train.dev_curve import DevCurve
from trainer_node.engine.train.health import Health, is_sound
from trainer_node.engine.train.schedule import Schedule
from trainer_node.engine.train.step_results import StepResult
from trainer_node.engine.train.weight_average import TailAverage


@dataclass
class TrainState:
    """The plan, the weights, the optimiser, the position in the data, and the helpers of the loop."""

    plan: Plan
    seed: int
    deltas: Deltas
    optimizer: torch.optim.Optimizer
    objective: Loss
    examples: Examples
    packs: Packs
    schedule: Schedule
    clock: Clock
    average: TailAverage | None
    saver: Saver
    device: torch.device
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0  # real seconds inside steps, without what the first one took to compile
    first_step: int = 0  # that this process took
    first_s: float = 0.0  # of that step, if it compiled
    process_group: ProcessGroup = SINGLE_PROCESS
    forward: torch.nn.Module | None = None  # the deltas' model, or what is around it (sharding.spread)
    cpu_threads: CpuThreads | None = None  # threads that a pack is shared out to
    recorded: RecordedPass | None = None  # what stands in for a pack's passes
    alive: Callable[[], None] = lambda: None  # said at every pack: a step may take long
    cores: int = 0  # that both training and a save in its thread compute on
    since_save: tuple[float, int] = (0.0, 0)  # sum of the losses, steps
    since_report: tuple[float, int] = (0.0, 0)
    lag: int = 0  # steps whose results are not read yet: on a GPU one, which computes it meanwhile
    results: list[StepResult] = field(default_factory=list)  # of these steps
    last_loss: float = math.nan  # of the newest step whose result was read
    skipped_step: int = 0  # the newest that changed nothing
    health: Health = field(default_factory=Health)
    untrained: Callable[[], dict[str, torch.Tensor]] = dict  # the weights as they were before the first step
    dev: Examples | None = None  # the development rows that are measured during training
    dev_s: float = 0.0  # what measuring them once takes, by the run's clock
    curve: DevCurve = field(default_factory=DevCurve)
    # What this process holds of the weights at the curve's lowest point, and at several, by their steps: of
    # sharded ones its rows.
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    snapshots: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    copies: list[dict[str, torch.Tensor]] = field(default_factory=list)  # memory for weights at such points
    step_losses: list[float] | None = None  # of every step that counts; None: nobody wants them
    most_best_bytes: float = math.inf  # memory that they may take
    trial: int = 0  # the number of this training run among the job's
    steps_before: int = 0  # of earlier trials
    tokens_before: int = 0
    saves: bool = True  # whether checkpoints are made of it
    search_at: float | None = None  # when the first trial began, if there are several

    def read_results(self, *, leave: int = 0) -> None:
        """Judge by all results but the newest `leave` how training goes, and add their losses up."""
        while len(self.results) > leave:
            result = self.results.pop(0)
            loss, norm = result.read()
            self.last_loss = loss
            self.health = self.health.after(loss, norm)
            if not is_sound(loss, norm):
                self.skipped_step = result.step
                continue
            if self.step_losses is not None:
                self.step_losses.append(loss)
            self.since_save = (self.since_save[0] + loss, self.since_save[1] + 1)
            self.since_report = (self.since_report[0] + loss, self.since_report[1] + 1)
