"""Run the trials of a search: one model, set back before each; the best trials' weights stay on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from shared.clock import TokenClock
from shared.errors import EngineError
from shared.messages import ErrorCode, Phase
from shared.planning.plan import Plan
from shared.planning.planner import step_size
from shared.planning.throughput import SLACK_S
from trainer_node.engine import prepare
from trainer_node.engine.assemble import COPY_SHARE, Adapted, Place, adapt, load_base, make_state
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples, joined
from trainer_node.engine.distributed.sharding import placed
from trainer_node.engine.finish import free_optimizer
from trainer_node.engine.oom import release
from trainer_node.engine.search.rate_search import RAMP_STEPS
from trainer_node.engine.search.scoring import probed, scored
from trainer_node.engine.search.soup import mean_of
from trainer_node.engine.search.strategy import best_of
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult, write_search
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.async_saver import Saver
from trainer_node.engine.train.checkpoint import Checkpoint
from trainer_node.engine.train.oom_fallback import smaller_by, train_or_stop
from trainer_node.engine.train.saved_state import snapshot_name
from trainer_node.engine.train.state import TrainState

KEPT = 3  # trials whose weights stay on disk: the best ones, to be averaged
KEPT_BYTES = 4e9  # of trained weights: above it only the best one's stay


@dataclass(frozen=True)
class Trained:
    """What a process has to say of a trial that it trained."""

    result: TrialResult
    steps: int
    plan: Plan  # as it was carried out
    size: int  # bytes of the trained weights in fp32


@dataclass
class TrialRunner:
    """The model that all trials of one arm train, and what is known so far."""

    run: RunContext
    record: RunRecord
    data: JobData
    dev: Examples
    known: SearchRecord
    saver: Saver
    models: list[torch.nn.Module]  # the base model, until an arm is added to it: then nobody else keeps it
    arm: str = ""
    adapted: Adapted | None = None
    start: dict[str, torch.Tensor] | None = None  # the trained weights before the first step
    place: int = 0  # of this process's trial among those that run at once

    @property
    def number(self) -> int:
        """Return the number of the trial that this process runs now."""
        return self.known.number + self.place

    def note(self, known: SearchRecord) -> None:
        """Record the state of the search, in memory and on disk."""
        self.known = known
        write_known(self.run, known)

    def run_trial(self, trial: Trial, found: Checkpoint | None) -> bool:
        """Train and score one trial; return False if the job was asked to stop."""
        number = self.number
        self.run.reporter.message(f"trial {number + 1}: {trial}")
        trained = self.train(trial, found)
        if trained is None:
            return False
        self.plan_again(trial.arm, trained.plan)
        self.note(self.known.finished(trained.result, trained.steps, clock_tokens(self.run)))
        self.prune(trained.size)
        self.tell(number)
        return True

    def train(self, trial: Trial, found: Checkpoint | None) -> Trained | None:
        """Train and score one trial, and keep its weights; return None if the job was asked to stop."""
        run = self.run
        run.reporter.restarted()
        state = self.prepared(trial, found)
        run.reporter.phase(Phase.TRAIN)  # another arm's model may have been loaded
        if not train_or_stop(run, state):
            return None
        if state.step == 0 and not self.known.done:
            raise EngineError(ErrorCode.TOO_LATE, "not one step could be trained in the time that was left")
        trained_at = run.clock.time()
        free_optimizer(state)
        with run.patience():
            self.saver.wait()  # from here on the weights change
        if trial.stage:
            result = probed(run, self.record, self.dev, trial, state)
        else:
            first, saved = best_of(self.known.done) is None, self.saved(state)
            result = scored(run, self.record, self.dev, trial, state, saved, first=first)
        result = msgspec.structs.replace(result, other_s=run.clock.time() - trained_at)
        if not trial.stage:
            result = self.keep(result, state, saved)
        size = 4 * sum(value.numel() for value in state.deltas.parameters.values())
        return Trained(result, state.step, state.plan, size)

    def tell(self, number: int) -> None:
        """Report what a finished trial showed."""
        result, best = self.known.done[number], best_of(self.known.done)
        if result.trial.stage:
            probe = "no number" if result.probe_loss is None else f"{result.probe_loss:.4f}"
            self.run.reporter.message(f"trial {number + 1}: loss of the probe {probe}")
            return
        loss = "no number" if result.loss is None else f"{result.loss:.4f}"
        kind = "loss on rows that it was trained on" if result.trial.refit else "held-out loss"
        leads = f"; best so far: {best.loss:.4f}" if best and best is not result else ""
        self.run.reporter.message(f"trial {number + 1}: {kind} {loss}{leads}")

    def prepared(self, trial: Trial, found: Checkpoint | None) -> TrainState:
        """Return the state of a trial, fresh or as a checkpoint left it."""
        adapted = self.with_arm(trial.arm)
        arm = msgspec.structs.replace(self.known.plans[trial.arm], compile=adapted.plan.compile)
        record, data = rows_of(trial, self.record, self.data)
        plan = plan_of(trial, arm, record, int(data.train.lengths.max()))
        if trial.stage:
            plan = as_probe(plan)
        if trial.last_pass and found is None:
            start = self.weights_of(self.known.done[-1])
            parameters = adapted.deltas.parameters
            adapted.deltas.load_state(
                {name: placed(value, parameters[name]) for name, value in start.items()}
            )
        place = Place(
            trial=self.number,
            steps_before=self.known.steps_before,
            tokens_before=self.known.tokens_before,
            seed=trial.seed,
            search_at=self.known.began_at,
            saves=not trial.stage or not self.known.done,  # one probe is there if the node comes back late
            keeps_losses=bool(trial.stage),
            curve=not trial.refit,
            leaves_s=trial.leaves_s,
        )
        return make_state(self.run, record, replace(adapted, plan=plan), data, found, self.saver, place)

    def with_arm(self, arm: str) -> Adapted:
        """Return the model with the arm's weights as they are before the first step.

        Processes that trained alone may have models of other arms, or none: if not all have what is wanted,
        all of them load it, together.
        """
        plan, adapted, start = self.known.plans[arm], self.adapted, self.start
        kept = arm == self.arm and adapted is not None and start is not None
        held = self.run.process_group.gather_objects((kept, bool(self.models)))
        if adapted is not None and start is not None and all(kept for kept, _ in held):
            adapted.deltas.load_state(start)
            return adapted
        if not all(unused for _, unused in held):
            self.forget()
        model = self.models.pop() if self.models else load_base(self.run, plan)
        self.adapted, self.arm = adapt(self.run, plan, model, fixed_steps=False), arm
        state = self.adapted.deltas.state()
        size = sum(value.numel() * value.element_size() for value in state.values())
        if size <= COPY_SHARE * prepare.main_memory(self.run.job.hardware) / self.run.process_group.sharers:
            self.start = {name: value.to("cpu", copy=True) for name, value in state.items()}
        return self.adapted

    def forget(self) -> None:
        """Free the model: the next one would be in memory at the same time."""
        self.models.clear()
        self.adapted = self.start = None
        release()

    def saved(self, state: TrainState) -> frozenset[str]:
        """Return the groups of tensors in the last step's checkpoint: few or none if the disk is short."""
        group = self.run.process_group
        here = checkpoint.groups(self.last_step(state)) if group.is_main else frozenset[str]()
        return group.broadcast_object(here)

    def keep(self, result: TrialResult, state: TrainState, saved: frozenset[str]) -> TrialResult:
        """Keep the trial's best weights under a name of their own; without a checkpoint it has no loss."""
        if not saved:
            return msgspec.structs.replace(result, loss=None, losses=[])
        if self.run.process_group.is_main:
            kept = {result.weights, *map(snapshot_name, result.snapshots)}
            checkpoint.link(self.last_step(state), trial_folder(self.run, self.number), kept)
        return result

    def last_step(self, state: TrainState) -> Path:
        """Return where the checkpoint of the last step is, if there is one."""
        return self.saver.folder / f"step-{state.steps_before + state.step:08d}"

    def weights_of(self, result: TrialResult) -> dict[str, torch.Tensor]:
        """Read the best weights of a trial that was kept."""
        return kept_weights(trial_folder(self.run, self.known.done.index(result)), result)()

    def prune(self, size: int) -> None:
        """Free the weights, of `size` bytes each, of all but the best trials."""
        done = self.known.done
        measured = (one for one in done if one.loss is not None and not one.trial.refit)
        best = sorted(measured, key=lambda one: one.loss or 0.0)
        kept = best[: KEPT if size <= KEPT_BYTES else 1]
        refits = [one for one in done if one.trial.refit and one.loss is not None]
        kept += refits if size <= KEPT_BYTES else refits[:1]
        for number, one in enumerate(done):
            if one not in kept and self.run.process_group.is_main:
                shutil.rmtree(trial_folder(self.run, number), ignore_errors=True)

    def plan_again(self, arm: str, carried_out: Plan) -> None:
        """Let later trials need as little memory as this one came to need."""
        plan = self.known.plans[arm]
        if len(carried_out.deviations) > len(plan.deviations):  # memory ran out
            plans = {**self.known.plans, arm: smaller_by(plan, carried_out)}
            self.known = msgspec.structs.replace(self.known, plans=plans)


def is_averaged(plan: Plan) -> bool:
    """Return whether several runs of a plan may end as one average.

    LoRA's factors may not: the mean of two products isn't the product of the means. Nor may weights of which
    only one run's stay on disk.
    """
    dense = all(module.method == "dense" for module in plan.modules)
    return dense and 4 * plan.trained_parameters <= KEPT_BYTES


def rows_of(trial: Trial, record: RunRecord, data: JobData) -> tuple[RunRecord, JobData]:
    """Return the record and rows of a trial: some train on the development rows too, or on these alone."""
    if not trial.refit:
        return record, data
    train = data.dev if trial.last_pass else joined([data.train, data.dev], data.train.group)
    record = msgspec.structs.replace(record, train_examples=len(train), train_tokens=int(train.lengths.sum()))
    return record, msgspec.structs.replace(data, train=train)


def plan_of(trial: Trial, plan: Plan, record: RunRecord, longest: int) -> Plan:
    """Return the arm's plan with the trial's rate, length and batch."""
    mean_length = record.train_tokens / record.train_examples
    capacity, packs = step_size(trial.batch, mean_length, longest, plan.capacity, plan.devices)
    return msgspec.structs.replace(
        plan,
        lr_lora=plan.lr_lora * trial.rate,
        lr_dense=plan.lr_dense * trial.rate,
        lr_norms=plan.lr_norms * trial.rate,
        lr_embeddings=plan.lr_embeddings * trial.rate,
        max_epochs=trial.epochs,
        capacity=capacity,
        packs_per_step=packs,
        expected_steps=max(1, int(trial.epochs * record.train_examples / trial.batch)),
    )


def as_probe(plan: Plan) -> Plan:
    """Return the plan of a probe: a constant rate after a short ramp, and no development curve."""
    return msgspec.structs.replace(
        plan,
        decay="constant",
        warmup=min(0.5, RAMP_STEPS / plan.expected_steps),
        curve=msgspec.structs.replace(plan.curve, rows=0),
    )


def end_at(run: RunContext, record: RunRecord) -> float:
    """Return when the last trial must be over: the closing reads the best one's weights again."""
    costs = record.costs
    end = run.job.ready_by - costs.closing_s - costs.load_s - 2 * SLACK_S
    return run.process_group.broadcast_floats(end)[0]  # only rank 0 learns what a save costs


def trial_folder(run: RunContext, number: int) -> Path:
    """Return where a trial's weights are kept."""
    return run.folder / "trials" / f"{number:03d}"


def kept_weights(folder: Path, result: TrialResult) -> Callable[[], dict[str, torch.Tensor]]:
    """Return what reads the best weights of a trial. Raises OSError or ValueError if they are damaged."""
    found = {name: checkpoint.load(folder, name) for name in groups_of(result)}
    if result.snapshots:
        return lambda: mean_of(one.tensors(name) for name, one in found.items())
    return partial(found[result.weights].tensors, result.weights)


def groups_of(result: TrialResult) -> list[str]:
    """Return the groups of tensors that a trial's best weights are made of."""
    return list(map(snapshot_name, result.snapshots)) or [result.weights]


def write_known(run: RunContext, known: SearchRecord) -> None:
    """Write down where the search stands."""
    if run.process_group.is_main:
        write_search(run.folder, known)


def clock_tokens(run: RunContext) -> int:
    """Return the token clock's tokens; 0 on another clock."""
    return run.own_clock.tokens if isinstance(run.own_clock, TokenClock) else 0
